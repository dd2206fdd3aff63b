"""Orthonormal filter banks: an initialization, and a penalty that keeps them near it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from netwright.param._layers import check_number, find_layers, free_weight, from_rows, row_groups, to_rows

__all__ = ["OrthonormalPenalty", "orthonormal", "orthonormal_"]


def _banks(weight: Tensor, layer: nn.Module) -> Tensor:
    """The filters of a layer, ``(groups, outputs per group, inputs per group * kernel)``."""
    rows = to_rows(weight, row_groups(layer))
    groups = getattr(layer, "groups", 1)
    assert isinstance(groups, int)
    return rows.reshape(groups, -1, rows.shape[1])


def _deviation(banks: Tensor) -> Tensor:
    """The sum over ``banks`` ``(b, m, n)`` of ``||G - I||_F^2``, with ``G`` the smaller of the two Gram matrices."""
    short = banks if banks.shape[1] <= banks.shape[2] else banks.mH
    gram = short @ short.mH
    gap = gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.sum((torch.view_as_real(gap) if gap.is_complex() else gap).square())


def _draw(bank: Tensor, gain: float, generator: torch.Generator | None) -> None:
    """Fill ``bank`` ``(m, n)`` with ``gain`` times a uniformly random matrix of orthonormal rows or columns."""
    if not bank.is_complex():
        nn.init.orthogonal_(bank, gain, generator)
        return
    tall = torch.empty_like(bank if bank.shape[0] >= bank.shape[1] else bank.mT).normal_(generator=generator)
    basis, triangle = torch.linalg.qr(tall)
    basis = basis * triangle.diagonal().sgn() * gain
    bank.copy_(basis if basis.shape == bank.shape else basis.mT)


class OrthonormalPenalty:
    """What :func:`orthonormal` returns: call it for the penalty at the present weights.

    Args:
        layers: whose weights are held near orthonormal, by name.
        strength: factor of the penalty.
    """

    def __init__(self, layers: dict[str, nn.Module], strength: float) -> None:
        self.strength = strength
        self.names = tuple(layers)
        self._layers = tuple(layers.values())

    def __call__(self) -> Tensor:
        """The penalty, a scalar with its graph."""
        alike: dict[tuple[object, ...], list[Tensor]] = {}
        for layer in self._layers:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            banks = _banks(weight, layer)
            alike.setdefault((banks.shape[1:], banks.dtype, banks.device), []).append(banks)
        terms = [_deviation(torch.cat(parts)) for parts in alike.values()]
        return 0.5 * self.strength * sum((term.to(terms[0]) for term in terms[1:]), start=terms[0])


def orthonormal(
    model: nn.Module,
    strength: float = 1e-4,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Callable[[], Tensor]:
    r"""A penalty on filters that are not orthonormal, to be added to the loss.

    Reach for it, in place of weight decay, when a deep network without shortcuts trains slowly or not at all: a layer
    with orthonormal filters hands errors back at the length at which they came. Start from :func:`orthonormal_`, and
    add :class:`~netwright.param.backward_modulation.BackwardModulation` where depth is extreme.

    With :math:`W_l` the filters of layer :math:`l` unfolded to a matrix with one column for each output, of
    :math:`f_\text{out}` columns and :math:`f_\text{in}` = inputs × kernel rows, the penalty is

    .. math:: R = \frac{\lambda}{2} \sum_l \lVert W_l^\top W_l - I \rVert_F^2, \qquad
              \nabla_{W_l} R = 2 \lambda\, W_l (W_l^\top W_l - I).

    With more outputs than inputs, :math:`W_l W_l^\top` takes the place of :math:`W_l^\top W_l`: the value is smaller by
    :math:`\lambda (f_\text{out} - f_\text{in}) / 2` and can reach zero, the gradient is the same. Grouped convolutions
    have one bank for each group; of complex filters :math:`\top` also conjugates.

    Cost: :math:`f_\text{in} f_\text{out} \min(f_\text{in}, f_\text{out})` operations for each layer, layers of one
    shape at once, and one copy of the weights; nothing per item of the batch.

    Args:
        model: a layer or a model around layers. Not changed; weights are read afresh at every call, also through
            parametrizations.
        strength: :math:`\lambda`.
        include: patterns of layer names to which it is confined.
        exclude: patterns of layer names to leave out.

    Returns:
        A callable without arguments that returns the penalty as a scalar with its graph.

    Raises:
        SettingError: a negative or infinite strength, no layer, a pattern that matches none, or a lazy layer.

    Example:
        >>> model = orthonormal_(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)))
        >>> penalty = orthonormal(model, strength=0.1)
        >>> bool(penalty() < 1e-10)
        True
        >>> with torch.no_grad():
        ...     model[0].weight *= 2
        >>> round(penalty().item(), 4)  # 0.1 / 2 * (4 * (2 ** 2 - 1) ** 2)
        1.8

    Source: paper 212, D. Xie, J. Xiong, S. Pu, "All You Need is Beyond a Good Init: Exploring Better Solution for
    Training Extremely Deep Convolutional Neural Networks with Orthonormality and Modulation", 2017, arXiv 1703.01827.

    Differs: only the abstract could be read; the penalty is the form in which it is commonly cited, and the default of
    ``strength`` is that of such a citation. Layers with more outputs than inputs are handled as said above.
    """
    check_number("orthonormal", "strength", strength)
    return OrthonormalPenalty(find_layers("orthonormal", model, include, exclude), strength)


@torch.no_grad()
def orthonormal_(
    model: nn.Module,
    gain: float = 1.0,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Draw the weights of linear and convolution layers anew, with orthonormal filters; biases stay.

    The filters of each layer (of each group of a grouped convolution), unfolded as in :func:`orthonormal`, become
    ``gain`` times a uniformly random matrix with orthonormal columns, or rows where there are more filters than
    entries in one. Cost: a QR decomposition of each weight, once.

    Args:
        model: a layer or a model around layers. Changed in place.
        gain: length of the filters, or of the rows.
        include: patterns of layer names to which it is confined.
        exclude: patterns of layer names to leave out.
        generator: of the random numbers; the global one where it is None.

    Returns:
        The model.

    Raises:
        SettingError: a gain that is not positive, no layer, a pattern that matches none, a lazy layer, or a weight
            that modules share or that is parametrized. Nothing is changed then.

    Example:
        >>> layer = orthonormal_(nn.Linear(5, 3))
        >>> torch.allclose(layer.weight @ layer.weight.T, torch.eye(3), atol=1e-6)
        True

    Source: paper 212, see :func:`orthonormal`.
    """
    check_number("orthonormal_", "gain", gain, above=True)
    layers = find_layers("orthonormal_", model, include, exclude)
    weights = {name: free_weight("orthonormal_", model, layer, name, "weight") for name, layer in layers.items()}
    for name, weight in weights.items():
        layer = layers[name]
        banks = _banks(weight, layer)
        wide = torch.promote_types(weight.dtype, torch.float32)
        for bank in (drawn := torch.empty(banks.shape, dtype=wide, device=weight.device)):
            _draw(bank, gain, generator)
        weight.copy_(from_rows(drawn.flatten(0, 1), weight.shape, row_groups(layer)))
    return model
