"""One layer as a product of two: its matrix, the directions that matter, and the layers that come of them."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from netwright.compress._layer_inputs import Moments
from netwright.compress._low_rank_layers import Convolution, Layer, pointwise

__all__ = ["Count", "Option", "Way", "cost_of", "effective_rank", "factorized", "matrix_of", "option_of"]

Count = Literal["macs", "parameters"]
Way = Literal["channel", "spatial"]


@dataclass(frozen=True)
class Option:
    """One way to factorize one layer.

    Args:
        layer: which.
        way: how its weight is read as a matrix.
        basis: ``(rows, k)``, orthonormal directions of its columns, the most important first.
        mean: ``(rows,)``, what the matrix gives on average, without the bias.
        unit: what one unit of rank costs.
        dense: what the whole layer costs.
        effective: the effective rank of the matrix.
    """

    layer: Layer
    way: Way
    basis: Tensor
    mean: Tensor
    unit: float
    dense: float
    effective: float

    @property
    def full(self) -> int:
        """The largest rank of the matrix."""
        return self.basis.shape[1]

    def cost(self, rank: int) -> float:
        """What the layer costs at ``rank``; where that is no less than the whole layer, it stays whole."""
        return min(self.dense, rank * self.unit)


def effective_rank(singular_values: Tensor) -> float:
    """The exponential of the entropy of the singular values, normalized to sum to one; 1 for a matrix of zeros.

    Args:
        singular_values: ``(k,)``, none negative.

    Example:
        >>> effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0]))
        3.0
    """
    values = singular_values.double()
    total = values.sum()
    if total == 0:
        return 1.0
    share = values / total
    return round(float(torch.special.entr(share).sum().exp()), 12)


def matrix_of(module: nn.Linear | Convolution, way: Way) -> Tensor:
    """The weight as the matrix that is factorized: ``(n, c h w)`` by channel, ``(c h, n w)`` in space."""
    weight = module.weight.detach()
    if way == "spatial":
        return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    return weight.flatten(1)


def factorized(module: nn.Linear | Convolution, way: Way, basis: Tensor, mean: Tensor, rank: int) -> nn.Sequential:
    """Two layers that compute what ``module`` does, its weight projected onto the first ``rank`` directions.

    Args:
        module: left as it is.
        way: how its weight is read as a matrix ``W``.
        basis: ``(rows of W, k)``, orthonormal columns ``U``; ``W`` becomes ``U U' W``.
        mean: ``(rows of W,)``, the mean of ``W x``, which the new bias keeps.
        rank: how many directions stay.
    """
    matrix = matrix_of(module, way).double()
    left = basis[:, :rank]
    right = left.t() @ matrix
    shift = mean - left @ (left.t() @ mean)
    root = right.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    left, right = left * root, right / root[:, None]
    bias = _shifted(module, None if way == "spatial" else shift)
    first: Any
    second: Any
    if isinstance(module, nn.Linear):
        first = nn.Linear(module.in_features, rank, bias=False, device="meta")
        second = nn.Linear(rank, module.out_features, bias=bias is not None, device="meta")
        weights = right, left
    elif way == "channel":
        first = _part(module, module.in_channels, rank, slice(None))
        second = pointwise(module, rank, module.out_channels)
        weights = right.reshape(rank, *module.weight.shape[1:]), left.reshape(*second.weight.shape)
    else:
        first = _part(module, module.in_channels, rank, slice(0, 1))
        second = _part(module, rank, module.out_channels, slice(1, 2))
        height, width = module.weight.shape[2:]
        weights = (
            left.reshape(module.in_channels, height, rank).permute(2, 0, 1)[..., None],
            right.reshape(rank, module.out_channels, width).permute(1, 0, 2)[:, :, None],
        )
    second.bias = bias
    for layer, weight in zip((first, second), weights, strict=True):
        layer.weight = nn.Parameter(
            weight.to(module.weight.dtype).contiguous(), requires_grad=module.weight.requires_grad
        )
    return nn.Sequential(first, second)


def _shifted(module: nn.Linear | Convolution, shift: Tensor | None) -> nn.Parameter | None:
    """The bias with ``shift`` added, where there is any."""
    if shift is None or not bool(shift.any()):
        kept = module.bias
        return None if kept is None else nn.Parameter(kept.detach().clone(), requires_grad=kept.requires_grad)
    given = 0.0 if module.bias is None else module.bias.detach().double()
    trainable = (module.weight if module.bias is None else module.bias).requires_grad
    return nn.Parameter((shift + given).to(module.weight.dtype), requires_grad=trainable)


def _part(module: Convolution, inputs: int, outputs: int, along: slice) -> Any:
    """A convolution without weights that does along some spatial dimensions what ``module`` does along all."""

    def pick(values: Any, other: int) -> Any:
        if isinstance(values, str):
            return values
        inside = range(len(values))[along]
        return tuple(value if position in inside else other for position, value in enumerate(values))

    return type(module)(
        inputs,
        outputs,
        pick(module.kernel_size, 1),
        stride=pick(module.stride, 1),
        padding=pick(module.padding, 0),
        dilation=pick(module.dilation, 1),
        bias=False,
        padding_mode=module.padding_mode,
        device="meta",
    )


def option_of(layer: Layer, way: Way, count: Count, seen: Moments | None) -> Option:
    """How ``layer`` is factorized: by what it gives where ``seen`` has its moments, else by its weight."""
    matrix = matrix_of(layer.module, way).double()
    rows, columns = matrix.shape
    if seen is None:
        basis, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        mean = matrix.new_zeros(rows)
    else:
        squares, basis = torch.linalg.eigh(seen.covariance)
        values, basis = squares.clamp(min=0).sqrt().flip(0)[:columns], basis.flip(1)[:, :columns]
        mean = seen.mean if layer.module.bias is None else seen.mean - layer.module.bias.detach().double()
    first, second = layer.after, layer.after
    if way == "spatial":  # the first part has moved along the height alone
        first = sum(after[0] * before[1] for before, after in layer.calls)
        rows, columns = columns, rows
    unit = first * columns + second * rows if count == "macs" else float(rows + columns)
    return Option(layer, way, basis, mean, unit, cost_of(layer, count), effective_rank(values))


def cost_of(layer: Layer, count: Count) -> float:
    """What the whole layer costs."""
    return layer.macs if count == "macs" else float(layer.module.weight.numel())
