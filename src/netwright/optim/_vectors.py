"""Parameters as one long vector: norms, products and steps over lists of tensors, compiled or by torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from netwright.optim._fused import (
    ADD,
    ADD_AND_LOOK,
    ADD_SQUARES,
    APPROACH,
    DISTANCE,
    LERP,
    SQUARES,
    Kernel,
    Row,
    gathered,
    run,
    split,
    update,
)

__all__ = ["add", "add_and_look", "add_squares", "approach", "distance", "lerp", "squares", "wide"]

Group = dict[str, Any]
Values: TypeAlias = Callable[..., list[Tensor] | tuple[Tensor, ...]]


def squares(owner: object, group: Group, values: Sequence[Tensor]) -> float:
    """Sum of the squares of all entries."""
    return _sum(owner, group, SQUARES, [(value,) for value in values])


def distance(owner: object, group: Group, left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Sum of the squares of ``left - right``."""
    return _sum(owner, group, DISTANCE, list(zip(left, right, strict=True)))


def add(owner: object, group: Group, into: Sequence[Tensor], values: Sequence[Tensor], factor: float) -> None:
    """``into += factor * values``."""
    _write(owner, group, ADD, list(zip(into, values, strict=True)), factor)


def lerp(owner: object, group: Group, into: Sequence[Tensor], values: Sequence[Tensor], weight: float) -> None:
    """``into += weight * (values - into)``."""
    _write(owner, group, LERP, list(zip(into, values, strict=True)), weight)


def approach(owner: object, group: Group, rows: Sequence[Row], weight: float) -> None:
    """For rows ``into, start, offset``: ``into += weight * (start + offset - into)``."""
    taken, left = split(owner, group, rows, APPROACH)
    if taken:
        run(APPROACH, taken, weight)
    update(group, left, _foreach_approach, weight)


def add_and_look(owner: object, group: Group, rows: Sequence[Row], factor: float, other: float) -> float:
    """For rows ``into, values, offset``: ``into += factor * values``; squared length of ``offset + other * values``."""
    taken, left = split(owner, group, rows, ADD_AND_LOOK)
    total = run(ADD_AND_LOOK, taken, factor, other) if taken else 0.0
    if left:
        update(group, [(into, values) for into, values, _ in left], _foreach_add, factor)
        total += _total(group, left, lambda _, values, offset: torch._foreach_add(offset, values, alpha=other))
    return total


def add_squares(owner: object, group: Group, into: Sequence[Tensor], values: Sequence[Tensor], factor: float) -> float:
    """``into += factor * values``; sum of the squares of what comes out."""
    taken, left = split(owner, group, list(zip(into, values, strict=True)), ADD_SQUARES)
    total = run(ADD_SQUARES, taken, factor) if taken else 0.0
    if left:
        update(group, left, _foreach_add, factor)
        total += _total(group, left, lambda moved, _: moved)
    return total


def wide(value: Tensor) -> Tensor:
    """Zeros like ``value``, in at least float32: small movements of a half-precision parameter add up in it."""
    return torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32))


def _sum(owner: object, group: Group, kernel: Kernel, rows: list[Row]) -> float:
    taken, left = split(owner, group, rows, kernel)
    total = run(kernel, taken) if taken else 0.0
    return total + _total(group, left, _TERMS[kernel]) if left else total


def _write(owner: object, group: Group, kernel: Kernel, rows: list[Row], factor: float) -> None:
    taken, left = split(owner, group, rows, kernel)
    if taken:
        run(kernel, taken, factor)
    update(group, left, _foreach_add if kernel is ADD else _foreach_lerp, factor)


def _foreach_add(into: list[Tensor], values: list[Tensor], factor: float) -> None:
    torch._foreach_add_(into, [v.to(i.dtype) for i, v in zip(into, values, strict=True)], alpha=factor)


def _foreach_lerp(into: list[Tensor], values: list[Tensor], weight: float) -> None:
    torch._foreach_lerp_(into, [v.to(i.dtype) for i, v in zip(into, values, strict=True)], weight)


def _foreach_approach(into: list[Tensor], start: list[Tensor], offset: list[Tensor], weight: float) -> None:
    _foreach_lerp(into, start, weight)
    _foreach_add(into, offset, weight)


def _total(group: Group, rows: Sequence[Row], values_of: Values) -> float:
    """The sum of the squares of what ``values_of`` makes of lists of the rows' tensors."""
    norms: list[Tensor] = []
    for together in gathered(group, rows):
        norms += torch._foreach_norm(values_of(*map(list, zip(*together, strict=True))), 2, dtype=torch.float64)
    return float(torch.stack(norms).square().sum())


_TERMS: Mapping[Kernel, Values] = {
    SQUARES: lambda values: values,
    DISTANCE: torch._foreach_sub,
}
