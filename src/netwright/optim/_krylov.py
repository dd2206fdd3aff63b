"""An orthonormal basis of a Krylov subspace, and a symmetric matrix seen in it."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["krylov"]


def krylov(
    gradient: Tensor, product: Callable[[Tensor], Tensor], size: int, previous: Tensor | None
) -> tuple[Tensor, Tensor]:
    """An orthonormal basis ``(k, d)`` of a Krylov subspace, and the symmetric matrix in it, ``(k, k)`` in float64.

    The first row is the unit gradient, the next are Krylov vectors, the last is what ``previous`` adds to them. There
    are fewer than ``size`` rows where the matrix maps their span into itself.

    Args:
        gradient: ``(d,)``, not zero.
        product: multiplies the matrix with a vector; called once for each row.
        size: rows at most.
        previous: ``(d,)``, or None.
    """
    basis = gradient.new_empty(size, len(gradient))
    projected = gradient.new_zeros(size, size, dtype=torch.float64)
    candidate, scale, largest = gradient, gradient.norm(), gradient.new_zeros(())
    count = 0
    while count < size:
        found = None
        if previous is not None and count == size - 1 > 0:
            found, previous = _orthonormal(previous, basis[:count], previous.norm()), None
        if found is None:
            found = _orthonormal(candidate, basis[:count], scale)
        if found is None and previous is not None:
            found, previous = _orthonormal(previous, basis[:count], previous.norm()), None
        if found is None:
            break
        basis[count] = found
        candidate = product(found)
        scale = largest = torch.maximum(largest, candidate.norm())
        count += 1
        projected[:count, count - 1] = basis[:count] @ candidate
    upper = projected[:count, :count]
    return basis[:count], upper + upper.triu(1).mT


def _orthonormal(vector: Tensor, basis: Tensor, scale: Tensor) -> Tensor | None:
    """The unit vector of what ``vector`` adds to the rows of ``basis``; None where it is rounding beside ``scale``."""
    for _ in range(2):
        vector = vector - basis.mT @ (basis @ vector)
    rest = vector.norm()
    if not bool(rest > torch.finfo(vector.dtype).eps ** 0.75 * scale):
        return None
    return vector.div(rest)
