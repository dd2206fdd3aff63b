"""How much each unit matters, from its parameters and their gradients on one batch."""

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["unit_saliency"]

_TINY = 1e-30


def unit_saliency(vectors: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""The mean of five criteria, each divided by its mean over all units of all groups.

    .. math:: \|x_g\|, \quad \frac{\|x_g\|}{\sqrt{n_g}}, \quad
              1 - \frac{x_g^\top \nabla_g f}{\|x_g\|\,\|\nabla_g f\|}, \quad
              |x_g^\top \nabla_g f|, \quad \tfrac12 (x_g^\top \nabla_g f)^2

    The third is small where descent on the loss leads towards zero; the last stands for the second term of Taylor's
    series with the gradient's outer product as Hessian.

    Args:
        vectors: ``(units, entries)`` for each group.
        gradients: of the loss, of the same shapes.

    Returns:
        For each group ``(units,)`` in float64, low where a unit is redundant.
    """
    criteria: list[list[Tensor]] = []
    for name, vector in vectors.items():
        x, g = vector.double().cpu(), gradients[name].double().cpu()
        norm, slope = x.norm(dim=1), (x * g).sum(1)
        cosine = slope / (norm * g.norm(dim=1)).clamp_min(_TINY)
        criteria.append([norm, norm / x.shape[1] ** 0.5, 1.0 - cosine, slope.abs(), 0.5 * slope.square()])
    means = [torch.cat(parts).mean().clamp_min(_TINY) for parts in zip(*criteria, strict=True)]
    return {
        name: torch.stack([part / mean for part, mean in zip(parts, means, strict=True)]).mean(0)
        for name, parts in zip(vectors, criteria, strict=True)
    }
