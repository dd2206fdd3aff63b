"""Linear algebra of Kronecker-factored optimizers: factors of a layer, damped inverses, inverse roots."""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = [
    "Layer",
    "Sharing",
    "Split",
    "as_type",
    "damped_inverse",
    "inverse_roots",
    "layer_gradients",
    "layer_inputs",
    "leading_inverse",
    "split_damping",
    "wide_dtype",
]

Layer: TypeAlias = nn.Linear | nn.Conv2d
Sharing: TypeAlias = Literal["expand", "reduce"]
Split: TypeAlias = Literal["pi", "plain", "trace"]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics of a parameter are kept: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def as_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``, without a call where nothing changes."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def layer_inputs(layer: Layer, inputs: Tensor, *, bias: bool, sharing: Sharing) -> Tensor:
    """What multiplies the rows of the weight, ``(batch, positions, columns)``, with a last 1 where there is a bias.

    Args:
        layer: linear or convolutional.
        inputs: ``(batch, ..., in_features)`` or ``(batch, channels, height, width)``.
        bias: whether the bias is an additional column.
        sharing: "reduce" gives the mean over positions as the only one.
    """
    if isinstance(layer, nn.Conv2d):
        images = inputs if inputs.dim() == 4 else inputs[None]
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        patches = functional.unfold(
            functional.pad(images, _pads(layer), mode=mode),
            (layer.kernel_size[0], layer.kernel_size[1]),
            dilation=(layer.dilation[0], layer.dilation[1]),
            stride=(layer.stride[0], layer.stride[1]),
        )
        rows = patches.transpose(1, 2)
    else:
        rows = (inputs if inputs.dim() > 1 else inputs[None]).reshape(_batch(inputs, 1), -1, inputs.shape[-1])
    rows = as_type(rows, wide_dtype(rows.dtype))
    if sharing == "reduce":
        rows = rows.mean(1, keepdim=True)
    return functional.pad(rows, (0, 1), value=1.0) if bias else rows


def layer_gradients(layer: Layer, grads: Tensor, *, sharing: Sharing) -> Tensor:
    """The loss's gradient at the layer's output, ``(batch, positions, rows)``; "reduce" sums over positions."""
    if isinstance(layer, nn.Conv2d):
        rows = (grads if grads.dim() == 4 else grads[None]).flatten(2).transpose(1, 2)
    else:
        rows = (grads if grads.dim() > 1 else grads[None]).reshape(_batch(grads, 1), -1, grads.shape[-1])
    rows = as_type(rows, wide_dtype(rows.dtype))
    return rows.sum(1, keepdim=True) if sharing == "reduce" else rows


def _batch(tensor: Tensor, item_dims: int) -> int:
    return tensor.shape[0] if tensor.dim() > item_dims else 1


def _pads(layer: nn.Conv2d) -> list[int]:
    """Padding as ``torch.nn.functional.pad`` takes it: last dimension first, before and after."""
    pads: list[int] = []
    for dim in (1, 0):
        if isinstance(layer.padding, str):
            total = layer.dilation[dim] * (layer.kernel_size[dim] - 1) if layer.padding == "same" else 0
            pads += [total // 2, total - total // 2]
        else:
            pads += [layer.padding[dim]] * 2
    return pads


def split_damping(a: Tensor, b: Tensor, damping: float | Sequence[float], split: Split) -> tuple[float, float]:
    """How much is added to the diagonals of the factors ``a`` and ``b``; see ``KFAC``."""
    if not isinstance(damping, int | float):
        first, second = damping
        return float(first), float(second)
    root = math.sqrt(damping)
    if split == "plain":
        return root, root
    trace_a, trace_b = float(a.trace()), float(b.trace())
    if split == "trace":
        return root * trace_a, root * trace_b
    means = trace_a / a.shape[0], trace_b / b.shape[0]
    pi = math.sqrt(means[0] / means[1]) if min(means) > 0 and math.isfinite(means[0] / means[1]) else 1.0
    return root * pi, root / pi


def damped_inverse(matrix: Tensor, damping: float) -> Tensor:
    """``(matrix + damping I)^-1`` of a symmetric positive semidefinite matrix; never raises.

    Cholesky in the matrix's own type, then in float64, then the eigenvalues, and where even these cannot be found the
    inverse of the diagonal. Without damping, directions of eigenvalue zero are left out (the pseudo-inverse).
    """
    for kind in dict.fromkeys((matrix.dtype, torch.float64)):
        damped = matrix.to(kind, copy=True)
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            inverse = torch.cholesky_inverse(factor)
            if _sound(inverse, damped):
                return as_type(inverse, matrix.dtype)
    try:
        values, vectors = torch.linalg.eigh(matrix.double())
    except RuntimeError:  # torch's LinAlgError is one
        spread = (matrix.diagonal() + damping).nan_to_num(nan=1.0, posinf=1.0)
        return torch.diag(1 / spread.clamp_min(max(damping, torch.finfo(matrix.dtype).eps)))
    values = values.clamp_min(0) + damping
    floor = float(values.amax()) * values.numel() * torch.finfo(torch.float64).eps
    inverses = torch.where(values > floor, 1 / values.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    found: Tensor = (vectors * inverses) @ vectors.mT
    return as_type(found, matrix.dtype)


def leading_inverse(inverse: Tensor) -> Tensor:
    """The inverse of a symmetric matrix without its last row and column, from the inverse of the whole."""
    last = inverse[:-1, -1:]
    return inverse[:-1, :-1] - last @ last.mT / inverse[-1, -1]


def _sound(inverse: Tensor, matrix: Tensor) -> bool:
    """Whether rounding has left an inverse: by the condition in the 1-norm."""
    condition = torch.linalg.matrix_norm(inverse, 1) * torch.linalg.matrix_norm(matrix, 1)
    return bool(condition * torch.finfo(matrix.dtype).eps < 0.1)  # False for a NaN too


def inverse_roots(matrices: Sequence[Tensor], orders: Sequence[int], dampings: Sequence[float]) -> list[Tensor | None]:
    """``(H + damping I)^(-1/order)`` for each symmetric positive semidefinite ``H``; None where it cannot be found.

    Matrices of one size, order and damping go through one batched eigendecomposition in float64. Without damping,
    directions of eigenvalue zero are left out.

    Args:
        matrices: square, of any sizes.
        orders: of the root, for each.
        dampings: at least 0, for each.
    """
    alike: dict[tuple[int, int, float, torch.device], list[int]] = {}
    for place, (matrix, order, damping) in enumerate(zip(matrices, orders, dampings, strict=True)):
        alike.setdefault((matrix.shape[0], order, damping, matrix.device), []).append(place)
    roots: list[Tensor | None] = [None] * len(matrices)
    for (_, order, damping, _), places in alike.items():
        stack = torch.stack([as_type(matrices[place], torch.float64) for place in places])
        for place, root in zip(places, _stacked_roots(stack, order, damping), strict=True):
            roots[place] = None if root is None else as_type(root, matrices[place].dtype)
    return roots


def _stacked_roots(stack: Tensor, order: int, damping: float) -> list[Tensor | None]:
    try:
        values, vectors = torch.linalg.eigh(stack)
    except RuntimeError:  # torch's LinAlgError is one
        if len(stack) == 1:
            return [None]
        return [
            root for place in range(len(stack)) for root in _stacked_roots(stack[place : place + 1], order, damping)
        ]
    powers = (values.clamp_min(0) + damping) ** (-1 / order)
    if damping == 0:
        floor = values.amax(1, keepdim=True) * values.shape[1] * torch.finfo(values.dtype).eps
        powers = torch.where(values > floor, powers, 0.0)
    roots = (vectors * powers[:, None, :]) @ vectors.mT
    return [root if bool(root.isfinite().all()) else None for root in roots]
