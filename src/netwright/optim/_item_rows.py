"""Rows of the Jacobian by the parameters of one layer, from what went into it and what comes back to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional

__all__ = ["KNOWN", "Piece", "Use", "piece_of", "wide"]

_PAIRS = 2**24  # entries that a product of two Gram matrices may have


class Use(NamedTuple):
    """Where a parameter enters the graph: as input ``place`` of ``node``, ``transposed`` first or not."""

    param: Tensor
    node: Node
    place: int
    transposed: bool


def wide(rows: Tensor) -> Tensor:
    """Half precision as float32, everything else as it is."""
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


@dataclass(frozen=True)
class _Product:
    """A weight ``(o, d)``: inputs ``(b, t, d)`` times what comes back ``(k, b, t, o)``."""

    inputs: Tensor
    shape: Sequence[int]
    transposed: bool
    outputs_last: bool

    def laid_out(self, back: Tensor) -> Tensor:
        """What comes back, as ``(k, b, t, o)``."""
        items, places, _ = self.inputs.shape
        if self.outputs_last:
            return back.reshape(len(back), items, places, -1)
        return back.flatten(3).transpose(2, 3)

    def rows(self, back: Tensor) -> Tensor:
        count, items, places, outs = (back := self.laid_out(back)).shape
        left = back.permute(1, 0, 3, 2).reshape(items, count * outs, places)
        rows = torch.bmm(left, self.inputs).view(items, count, outs, -1)
        rows = rows if self.transposed else rows.transpose(2, 3)
        return rows.reshape(items, count, *self.shape)

    def total(self, back: Tensor) -> Tensor:
        laid = self.laid_out(back[None])[0].flatten(0, 1)
        total = laid.T @ self.inputs.flatten(0, 1)
        return (total if self.transposed else total.T).reshape(*self.shape)

    def along(self, back: Tensor, direction: Tensor) -> Tensor:
        weight = direction.reshape(-1, self.inputs.shape[2]).T if self.transposed else direction
        return (self.laid_out(back) * (self.inputs @ weight.to(self.inputs.dtype))).sum((2, 3)).T

    def gram(self, back: Tensor) -> Tensor | None:
        """The rows' Gram matrix without the rows, where that is cheaper; None elsewhere."""
        count, items, places, outs = (back := self.laid_out(back)).shape
        size = self.inputs.shape[2]
        pairs = (items * count * places) ** 2
        if pairs * (outs + 2) + (items * places) ** 2 * size > (items * count) ** 2 * outs * size or pairs > _PAIRS:
            return None
        left = wide(self.inputs.flatten(0, 1))
        right = wide(back.permute(1, 0, 2, 3).reshape(items * count * places, outs))
        ins, outers = left @ left.T, right @ right.T
        if places == count == 1:
            return ins.mul_(outers)
        ins = ins.view(items, 1, places, items, 1, places)
        outers = outers.view(items, count, places, items, count, places)
        inner: Tensor = (ins * outers).sum((2, 5)).view(items * count, items * count)
        return inner


@dataclass(frozen=True)
class _Scaled:
    """A bias, or the weight of a normalization: what comes back, times ``inputs``, summed over places."""

    inputs: Tensor | None
    shape: Sequence[int]
    lead: int

    def rows(self, back: Tensor) -> Tensor:
        back = back if self.inputs is None else back * self.inputs.reshape(back.shape[1:])
        if self.lead:  # channels follow the items
            return back.reshape(*back.shape[:3], -1).sum(3).transpose(0, 1)
        return back.reshape(len(back), back.shape[1], -1, *self.shape).sum(2).transpose(0, 1)

    def total(self, back: Tensor) -> Tensor:
        return self.rows(back[None]).sum((0, 1))

    def along(self, back: Tensor, direction: Tensor) -> Tensor:
        return (self.rows(back) * direction).flatten(2).sum(2)

    def gram(self, back: Tensor) -> Tensor | None:
        return None


Piece: TypeAlias = _Product | _Scaled


def piece_of(use: Use, items: int) -> Piece | None:
    """How the rows of ``use`` follow from what comes back to its node; None where autograd has to say."""
    build = KNOWN.get(use.node.name())
    return None if build is None else build(use, items, use.node)


def _from_product(use: Use, items: int, node: Any) -> Piece | None:
    add = node.name() == "AddmmBackward0"
    if add and (node._saved_alpha != 1 or node._saved_beta != 1):
        return None
    if add and use.place == 0:
        return _Scaled(None, use.param.shape, 0) if use.param.dim() == 1 and not use.transposed else None
    inputs = node._saved_mat1 if add else node._saved_self
    if use.place != (2 if add else 1) or inputs is None or len(inputs) % items:
        return None
    return _Product(inputs.reshape(items, -1, inputs.shape[1]), use.param.shape, use.transposed, True)


def _from_convolution(use: Use, items: int, node: Any) -> Piece | None:
    if use.transposed or node._saved_transposed or node._saved_input.dim() != 4 or len(node._saved_input) != items:
        return None
    if use.place == 2:
        return _Scaled(None, use.param.shape, 1)
    if use.place != 1 or node._saved_groups != 1:
        return None
    patches = functional.unfold(
        node._saved_input, use.param.shape[2:], node._saved_dilation, node._saved_padding, node._saved_stride
    )
    return _Product(patches.transpose(1, 2), use.param.shape, True, False)


def _from_batch_norm(use: Use, items: int, node: Any) -> Piece | None:
    inputs = node._saved_input
    if use.place not in (1, 2) or use.transposed or len(inputs) != items:
        return None
    if use.place == 2:
        return _Scaled(None, use.param.shape, 1)
    if node._saved_training:
        mean, scale = node._saved_result1, node._saved_result2
    else:
        mean, scale = node._saved_running_mean, (node._saved_running_var + node._saved_eps).rsqrt()
    across = (1, -1, *(1,) * (inputs.dim() - 2))
    return _Scaled((inputs - mean.view(across)) * scale.view(across), use.param.shape, 1)


def _from_layer_norm(use: Use, items: int, node: Any) -> Piece | None:
    inputs = node._saved_input
    if use.place not in (1, 2) or use.transposed or len(inputs) % items:
        return None
    scaled = None if use.place == 2 else (inputs - node._saved_result1) * node._saved_result2
    return _Scaled(scaled, use.param.shape, 0)


KNOWN: dict[str, Callable[[Use, int, Any], Piece | None]] = {
    "AddmmBackward0": _from_product,
    "MmBackward0": _from_product,
    "ConvolutionBackward0": _from_convolution,
    "NativeBatchNormBackward0": _from_batch_norm,
    "CudnnBatchNormBackward0": _from_batch_norm,
    "NativeLayerNormBackward0": _from_layer_norm,
}
