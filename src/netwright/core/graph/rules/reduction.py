"""Sums, means and other statistics, and operations that compare the entries of a dimension."""

from collections.abc import Sequence
from operator import getitem

from netwright.core.graph.axes import Axis, Value
from netwright.core.graph.call import Answer, Call
from netwright.core.graph.table import rule

__all__ = ["reduce", "whole"]

_SUMS = ("sum", "norm", "linalg_vector_norm", "nansum", "count_nonzero")
_KEEP_ZERO = (*_SUMS, "mean", "var", "std", "amax", "amin", "max", "min", "prod", "var_mean", "std_mean", "nanmean")
_BY_POSITION = ("argmax", "argmin")
_WITH_POSITION = ("max", "min", "median")  # with a dimension, they return the entry and where it is


@rule(*_KEEP_ZERO, *_BY_POSITION, "logsumexp", "all", "any", "median")
def reduce(call: Call) -> Answer:
    """Dimensions that are reduced go (or become one).

    A sum does not notice that a unit is gone whose entries were zero; any other statistic does. Positions stay what
    they are only where the whole dimension stays.
    """
    name = call.name
    tensors = call.tensors()
    if name in ("max", "min") and len(tensors) == 2:
        from netwright.core.graph.rules.elementwise import pointwise

        return pointwise(call)
    x = tensors[0]
    dims = _dims(call, len(x.axes))
    with_position = name in _WITH_POSITION and len(call.shapes) == 2
    for dim in dims:
        if name in _BY_POSITION or (with_position and _position_used(call)):
            call.freeze(x.axes[dim], "the position of its largest or smallest entry is asked for")
        elif name not in _SUMS or not x.null[dim]:
            call.inexact(x.axes[dim], f"{name} runs over this dimension")
    axes: list[Axis] = []
    null: list[bool] = []
    keep = bool(call.get("keepdim", False))
    for dim, axis in enumerate(x.axes):
        if dim in dims:
            if keep:
                axes.append(())
                null.append(False)
        else:
            axes.append(axis)
            null.append(x.null[dim] and name in _KEEP_ZERO)
    value = Value(tuple(axes), tuple(null))
    if with_position:
        return [value, Value(value.axes, tuple(False for _ in axes))]
    return [value for _ in call.shapes] if len(call.shapes) > 1 else value


def _position_used(call: Call) -> bool:
    """Whether anything reads the second result."""
    return any(user.target is not getitem or (user.args[1] == 1 and bool(user.users)) for user in call.node.users)


def _dims(call: Call, rank: int) -> Sequence[int]:
    dims = call.get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [dim % rank for dim in (dims if isinstance(dims, list) else [dims])]


@rule(
    "softmax",
    "log_softmax",
    "_softmax",
    "_log_softmax",
    "softmin",
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "sort",
    "argsort",
    "topk",
    "diff",
)
def whole(call: Call) -> Answer:
    """Every entry of one dimension depends on all of them, by value or by order: none may be removed."""
    x = call.tensors()[0]
    dim = call.get("dim")
    dim = (-1 if dim is None else dim) % max(1, len(x.axes))
    name = call.name.lstrip("_")
    reason = f"{name} runs over this dimension"
    if not x.axes:
        return [x for _ in call.shapes] if len(call.shapes) > 1 else x
    call.freeze(x.axes[dim], reason)
    zero = name in ("cumsum", "diff")
    axes = list(x.axes)
    results = []
    for shape in call.shapes:
        if not isinstance(shape[dim], int) or shape[dim] != sum(f.size for f in axes[dim]):
            axes[dim] = call.fixed(shape[dim], reason)
        results.append(Value(tuple(axes), tuple(flag and zero and at != dim for at, flag in enumerate(x.null))))
    return results if len(results) > 1 else results[0]
