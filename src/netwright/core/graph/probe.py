"""What an entrywise operation makes of zeros, found by asking it."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["zero_image"]

_PROBES = (0.7, -1.3)  # two values that no common function maps to zero
_MOST = 4  # tensors that are varied independently


def zero_image(node: fx.Node, null: Sequence[bool]) -> tuple[bool, bool]:
    """Apply ``node``'s operation to single entries: zero in the tensors flagged, something else in the others.

    Args:
        node: a call of an entrywise operation.
        null: one flag for each tensor argument, in order.

    Returns:
        Whether the result is zero whatever the other tensors are, and whether the zeros make it infinite or NaN
        where other values would not.
    """
    if not any(null):
        return False, False
    zero, singular = True, False
    for probes in product(_PROBES, repeat=min(list(null).count(False), _MOST)):
        others = iter((*probes, *(_PROBES[0] for _ in null)))
        entries = [0.0 if flag else next(others) for flag in null]
        result = _apply(node, entries)
        if result is None:
            return False, False
        zero = zero and bool((result == 0).all())
        if not bool(torch.isfinite(result).all()):
            usual = _apply(node, [_PROBES[0] if flag else entry for flag, entry in zip(null, entries, strict=True)])
            singular = singular or (usual is not None and bool(torch.isfinite(usual).all()))
    return zero, singular


def _apply(node: fx.Node, entries: Sequence[float]) -> Tensor | None:
    remaining = iter(entries)
    assert callable(node.target)
    try:
        args = [_filled(argument, remaining) for argument in node.args]
        kwargs = {name: _filled(argument, remaining) for name, argument in node.kwargs.items()}
        with torch.no_grad():
            result = node.target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError):  # it cannot take single entries: nothing is known
        return None
    return result if isinstance(result, Tensor) else None


def _filled(argument: Any, entries: Iterator[float]) -> Any:
    if isinstance(argument, fx.Node):
        value = argument.meta.get("val")
        if not isinstance(value, Tensor):
            return 2  # a symbolic size
        entry = next(entries)
        if value.dtype == torch.bool:
            return torch.full((1,), entry > 0)
        return torch.full((1,), entry if value.is_floating_point() else round(entry), dtype=value.dtype)
    if isinstance(argument, list | tuple):
        return [_filled(item, entries) for item in argument]
    return argument
