"""What is known about the dimensions of a tensor while a traced graph is walked.

Every dimension of every tensor is an :data:`Axis`: a row-major product of factors. A static factor carries one
integer *atom* for each of its entries; two entries with the same atom, or with atoms tied to each other, are removed
together or not at all. A symbolic factor (the batch) carries none. A dimension of length one is the empty product.

Products are kept apart as long as possible: flattening ``(C, H, W)`` gives one axis of three factors, and a view that
splits it again finds them as they were.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Axis", "Factor", "IntArray", "Value", "extent", "size_of"]

IntArray: TypeAlias = npt.NDArray[np.int64]
"""An array of 64-bit integers."""


@dataclass(frozen=True, eq=False)
class Factor:
    """One factor of an axis.

    Args:
        size: its length; for a symbolic factor the number that multiplies the symbol.
        atoms: ``(size,)`` the atom of every entry; None where the factor is symbolic.
        symbol: the name of the unknown length, "" where the factor is static.
    """

    size: int
    atoms: IntArray | None
    symbol: str = ""


Axis: TypeAlias = tuple[Factor, ...]
"""A dimension of a tensor as a product of factors, slowest first; ``()`` is a dimension of length 1."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the traced graph.

    Args:
        axes: one axis per dimension.
        null: for each dimension, whether the tensor's entries at a removed unit are zero once the unit's parameters
            are zero. Sums over such a dimension do not notice the removal.
        parameter: the name of the parameter or buffer that this tensor is, "" for an activation.
    """

    axes: tuple[Axis, ...]
    null: tuple[bool, ...]
    parameter: str = ""


def extent(length: Any) -> tuple[int, str]:
    """The length of a dimension as ``(number, symbol)``: 12 is ``(12, "")``, four times the batch ``(4, "s0")``.

    Example:
        >>> extent(12)
        (12, '')
    """
    if isinstance(length, int):
        return length, ""
    factor, rest = length.node.expr.as_coeff_Mul()
    return (int(factor), str(rest)) if factor.is_Integer else (1, str(length.node.expr))


def size_of(axis: Axis) -> tuple[int, str]:
    """The length of an axis as ``(number, symbol)``; the symbols of several symbolic factors are joined."""
    return prod(factor.size for factor in axis), "*".join(factor.symbol for factor in axis if factor.symbol)
