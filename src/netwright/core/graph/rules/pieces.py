"""Joining tensors and taking them apart along a dimension."""

import numpy as np

from netwright.core.graph.axes import Axis, Factor, Value, extent
from netwright.core.graph.call import Answer, Call, UnprovableError
from netwright.core.graph.table import rule

__all__ = ["concatenate", "pieces"]

_POSITION = "its entries are addressed by position"


@rule("cat", "concat", "concatenate")
def concatenate(call: Call) -> Answer:
    """Entries of all tensors one behind the other; other dimensions go together.

    The entry of a tensor of length one stays, for nothing says which parameters compute it.
    """
    tensors = call["tensors"]
    rank = len(call.shape)
    tensors = [value for value in tensors if len(value.axes) == rank]
    dim = call.get("dim", call.get("axis", 0)) % rank
    axes = list(tensors[0].axes)
    for value in tensors[1:]:
        for position in range(rank):
            if position != dim:
                call.tie(axes[position], value.axes[position])
                axes[position] = axes[position] or value.axes[position]
    if extent(call.shape[dim])[1]:
        for value in tensors:
            call.freeze(value.axes[dim], "it is joined along the batch")
        axes[dim] = call.fixed(call.shape[dim], "it is joined along the batch")
    else:
        parts = [call.flat(value.axes[dim]) for value in tensors]
        for atoms in parts:
            if atoms.size == 1:
                call.freeze((Factor(1, atoms),), "it is the only entry of a tensor")
        axes[dim] = call.axis(np.concatenate(parts))
    return Value(tuple(axes), tuple(all(value.null[position] for value in tensors) for position in range(rank)))


@rule("stack")
def stack(call: Call) -> Answer:
    """A new dimension that counts the tensors."""
    tensors = call["tensors"]
    rank = len(call.shape)
    dim = call["dim"] % rank
    axes = list(tensors[0].axes)
    for value in tensors[1:]:
        for position, axis in enumerate(value.axes):
            call.tie(axes[position], axis)
    null = [all(value.null[position] for value in tensors) for position in range(rank - 1)]
    axes.insert(dim, call.fixed(len(tensors), "it counts the tensors that are stacked"))
    null.insert(dim, False)
    return Value(tuple(axes), tuple(null))


@rule("chunk", "split", "split_with_sizes", "tensor_split", "split_copy", "unsafe_split", "unsafe_chunk")
def pieces(call: Call) -> Answer:
    """Runs of entries, each with the atoms it had."""
    x = call.tensors()[0]
    dim = call["dim"] % len(x.axes)
    atoms = call.flat(x.axes[dim])
    results: list[Value] = []
    start = 0
    for shape in call.shapes:
        size = extent(shape[dim])[0]
        results.append(_replaced(x, dim, call.axis(atoms[start : start + size])))
        start += size
    return results


@rule("slice", "narrow")
def part(call: Call) -> Answer:
    """A run of entries."""
    x = call["self"]
    dim = call["dim"] % len(x.axes)
    axis = x.axes[dim]
    start, step = _bounds(call)
    if start == 0 and step == 1 and extent(call.shape[dim]) == _length(axis):
        return Value(x.axes, x.null)
    if any(factor.atoms is None for factor in axis) or not isinstance(start, int):
        call.freeze(axis, _POSITION)
        return _replaced(x, dim, call.fixed(call.shape[dim], _POSITION))
    atoms = call.flat(axis)
    if step != 1:
        call.freeze(axis, "every so manieth entry of it is taken")
    size = extent(call.shape[dim])[0]
    start = start if start >= 0 else atoms.size + start
    return _replaced(x, dim, call.axis(atoms[start : start + (size - 1) * step + 1 : step]))


def _bounds(call: Call) -> tuple[object, int]:
    if "length" in call.arguments:
        return call["start"], 1
    return call["start"] or 0, call["step"]


def _length(axis: Axis) -> tuple[int, str]:
    size, symbol = 1, []
    for factor in axis:
        size *= factor.size
        symbol += [factor.symbol] if factor.symbol else []
    return size, "*".join(symbol)


def _replaced(x: Value, dim: int, axis: Axis) -> Value:
    return Value((*x.axes[:dim], axis, *x.axes[dim + 1 :]), x.null)


@rule("select")
def select(call: Call) -> Answer:
    """One entry, by its position: the dimension goes, and none of its entries may."""
    x = call["self"]
    dim = call["dim"] % len(x.axes)
    call.freeze(x.axes[dim], "one entry of it is taken by position")
    return Value(x.axes[:dim] + x.axes[dim + 1 :], x.null[:dim] + x.null[dim + 1 :])


@rule("unbind")
def unbind(call: Call) -> Answer:
    """Every entry apart: the dimension goes, and none of its entries may."""
    x = call["self"]
    dim = call["dim"] % len(x.axes)
    call.freeze(x.axes[dim], "its entries are taken apart by position")
    value = Value(x.axes[:dim] + x.axes[dim + 1 :], x.null[:dim] + x.null[dim + 1 :])
    return [value for _ in call.shapes]


@rule("index_select", "gather", "take_along_dim")
def index_select(call: Call) -> Answer:
    """Entries by number along one dimension."""
    if not call.operation.startswith("aten.index_select"):
        raise UnprovableError(_POSITION)
    x, dim = call["self"], call["dim"] % len(call["self"].axes)
    call.freeze(x.axes[dim], _POSITION)
    return _replaced(x, dim, call.fixed(call.shape[dim], _POSITION))


@rule("index")
def index(call: Call) -> Answer:
    """``x[:, table]``: the indexed dimensions stay, the others pass."""
    x, indices = call["self"], call["indices"]
    used = [position for position, item in enumerate(indices) if item is not None]
    if used != list(range(used[0], used[-1] + 1)):
        raise UnprovableError(_POSITION)
    inserted = max(len(indices[position].axes) for position in used)
    if len(call.shape) != len(x.axes) - len(used) + inserted:
        raise UnprovableError("it is indexed with a mask")
    for position in used:
        call.freeze(x.axes[position], _POSITION)
        for axis in indices[position].axes:
            call.freeze(axis, _POSITION)
    new = tuple(call.fixed(length, _POSITION) for length in call.shape[used[0] : used[0] + inserted])
    after = used[-1] + 1
    return Value(
        (*x.axes[: used[0]], *new, *x.axes[after:]), (*x.null[: used[0]], *(False,) * inserted, *x.null[after:])
    )


@rule("pad", "constant_pad_nd", "zero_pad2d", "zero_pad1d")
def pad(call: Call) -> Answer:
    """New entries before and behind; zeros that are padded to channels can go with the channels they meet."""
    x = call["self"]
    mode, value = call.get("mode", "constant"), call.get("value") or 0
    axes, null = list(x.axes), list(x.null)
    for position in range(len(call["pad"]) // 2):
        before, behind = call["pad"][2 * position], call["pad"][2 * position + 1]
        dim = len(axes) - 1 - position
        if before == 0 and behind == 0:
            continue
        if mode != "constant" or before < 0 or behind < 0 or extent(call.shape[dim])[1] or value != 0:
            call.freeze(axes[dim], "it is padded")
            axes[dim], null[dim] = call.fixed(call.shape[dim], "it is padded"), False
            continue
        atoms = [call.flat(axis) for axis in (call.fresh(before), axes[dim], call.fresh(behind))]
        present = [part for part, size in zip(atoms, (before, 1, behind), strict=True) if size]
        axes[dim] = (Factor(sum(part.size for part in present), np.concatenate(present)),)
    return Value(tuple(axes), tuple(null))
