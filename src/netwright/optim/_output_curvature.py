"""What a loss says of a network's outputs, item by item: its gradient, and its curvature in factors."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from netwright.core.errors import ClosureError
from netwright.optim._base import BaseOptimizer

__all__ = ["Curvature", "Head", "head_of", "loss_and_outputs", "other_half", "slopes_and_curvatures"]

Curvature = Literal["exact", "residual"]

_FLAT = 10.0  # eigenvalues below this many roundings of an item's largest are zero
_LEFT = 1e3  # a residual that is explained to this many roundings is explained


class Head(NamedTuple):
    """Seeds for rows of the Jacobian: item ``i`` has ``r_i = sum_k weights_ik s_ik``, ``Q_i = sum_k s_ik s_ik'``.

    Args:
        seeds: ``(k, b, c)``; ``s_ik`` is ``scale_ik seeds_ki``.
        scale: ``(b, k)``.
        weights: ``(b, k)``.
        curved: ``(b, k)``, 1 where ``s_ik`` counts in ``Q_i``, 0 where it is there for ``r_i`` alone.
    """

    seeds: Tensor
    scale: Tensor
    weights: Tensor
    curved: Tensor


def loss_and_outputs(owner: BaseOptimizer, returned: Any) -> tuple[Tensor, Tensor]:
    """What a closure of kind "outputs" returned.

    Args:
        owner: whose closure it is, for the message.
        returned: by the closure.

    Raises:
        ClosureError: anything but a scalar loss and outputs ``(b, ...)``, both with a graph.
    """
    name = type(owner).__name__
    if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[1], Tensor):
        raise ClosureError(
            f"{name}: the closure must return the loss and the outputs, got {type(returned).__name__}. "
            "Write `return loss_function(outputs, targets), outputs`."
        )
    loss, outputs = owner.loss_of(returned[0]), returned[1]
    if outputs.dim() == 0 or outputs.numel() == 0 or not outputs.is_floating_point():
        raise ClosureError(
            f"{name}: the outputs must be real numbers for at least one item, (b, ...), got shape "
            f"{tuple(outputs.shape)} and {outputs.dtype}."
        )
    if outputs.grad_fn is None or loss.grad_fn is None:
        raise ClosureError(
            f"{name}: the closure returned a loss or outputs without a graph. Call neither backward() nor detach() in "
            "it, and do not run it under torch.no_grad()."
        )
    return loss, outputs


def other_half(items: int, device: torch.device) -> Tensor:
    """A mask of half of the items, always the same."""
    order = torch.randperm(items, generator=torch.Generator().manual_seed(items))
    return (order < items // 2).to(device)


def slopes_and_curvatures(loss: Tensor, outputs: Tensor, *, check: bool) -> tuple[Tensor, Tensor]:
    """``r_i``, ``(b, c)``, and ``Q_i``, ``(b, c, c)``, both float64, of a loss that is the mean over items.

    Args:
        loss: scalar, with its graph.
        outputs: ``(b, ...)``, of which it is a function.
        check: whether to make sure that the loss separates over items.

    Raises:
        ClosureError: a loss that does not depend on the outputs, or does not separate.
    """
    items = len(outputs)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss, outputs, create_graph=True, allow_unused=True)
    if slope is None:
        raise ClosureError(
            "ExactGaussNewton: the loss does not depend on the outputs that the closure returned. Return the very "
            "tensor that the loss was computed from."
        )
    residual = (slope.detach() * items).reshape(items, -1)
    wide = residual.shape[1]
    if not slope.requires_grad:  # a linear loss
        return residual.double(), residual.new_zeros(items, wide, wide, dtype=torch.float64)
    if check and items > 1:
        half = other_half(items, outputs.device)
        seed = torch.ones_like(slope) * half.view(-1, *(1,) * (slope.dim() - 1))
        (bend,) = torch.autograd.grad(slope, outputs, seed, retain_graph=True)
        if bool((bend[~half] != 0).any()):
            raise ClosureError(
                "ExactGaussNewton needs a loss that is a mean over items of functions of their own outputs, and this "
                "one couples items. Take such a loss, or another optimizer."
            )
    identity = torch.eye(wide, dtype=slope.dtype, device=slope.device)[:, None].expand(wide, items, wide)
    seeds = identity.reshape(wide, *slope.shape)
    if wide == 1:
        (bend,) = torch.autograd.grad(slope, outputs, seeds[0], retain_graph=True)
        bend = bend[None]
    else:
        (bend,) = torch.autograd.grad(slope, outputs, seeds, retain_graph=True, is_grads_batched=True)
    curvature = (bend * items).reshape(wide, items, wide).transpose(0, 1).double()
    return residual.double(), (curvature + curvature.mT) / 2


def head_of(residual: Tensor, curvature: Tensor, kind: Curvature, rounding: float) -> Head:
    """Factors of ``Q_i`` for the seeds of a backward pass.

    ``"exact"`` has the eigenvectors of ``Q_i`` times the roots of their eigenvalues, and, where these do not reach all
    of ``r_i``, what is left of it. ``"residual"`` has ``r_i / sqrt(r_i' Q_i^+ r_i)``, whose square is the largest
    multiple of ``r_i r_i'`` that is nowhere above ``Q_i``.

    Args:
        residual: ``r``, ``(b, c)``.
        curvature: ``Q``, ``(b, c, c)``.
        kind: which of them.
        rounding: relative accuracy of both.
    """
    one = curvature.shape[1] == 1
    values, vectors = (curvature[:, :, 0], torch.ones_like(curvature)) if one else torch.linalg.eigh(curvature)
    kept = values > _FLAT * rounding * values[:, -1:].clamp_min(0.0)
    along = (vectors.mT @ residual[:, :, None])[:, :, 0]
    roots = torch.where(kept, values, 0.0).sqrt()
    weights = torch.where(kept, along / torch.where(kept, roots, 1.0), 0.0)
    left = residual - (vectors @ torch.where(kept, along, 0.0)[:, :, None])[:, :, 0]
    beyond = left.norm(dim=1, keepdim=True) > _LEFT * rounding * residual.norm(dim=1).max()
    if kind == "residual":
        reach = weights.norm(dim=1, keepdim=True)
        curved = ~beyond & (reach > 0)
        reach = torch.where(curved, reach, 1.0)
        return Head(residual[None], 1 / reach, reach, curved.double())
    first = values.shape[1] - int(kept.sum(1).max())
    seeds = (vectors * roots[:, None])[:, :, first:].permute(2, 0, 1)
    weights, curved = weights[:, first:], torch.ones_like(weights[:, first:])
    if bool(beyond.any()) or first == values.shape[1]:
        unit = torch.ones_like(residual[:, :1])
        seeds, weights = torch.cat((seeds, left[None])), torch.cat((weights, unit), 1)
        curved = torch.cat((curved, 0 * unit), 1)
    return Head(seeds, torch.ones_like(weights), weights, curved)
