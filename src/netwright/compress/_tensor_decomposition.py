"""Tensors of order three as sums of few rank-one tensors, with components that do not cancel; Tucker's form beside it.

Factors of a tensor ``(I, J, K)`` at rank ``R`` are matrices ``A (I, R)``, ``B (J, R)`` and ``C (K, R)``, and stand for

    P[i, j, k] = sum_r A[i, r] B[j, r] C[k, r]
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "Objective",
    "balanced",
    "bounded_least_norm",
    "component_norms",
    "compose",
    "corrected",
    "cp_als",
    "sensitivity",
    "tucker2",
]

Objective = Literal["norm", "sensitivity"]

_FLOOR = 1e-6  # of the tensor's norm: the least error that the correction can tell from none
_STEADY = 1e-5  # relative change at which sweeps stop
_HALVINGS = 80
_OTHERS = ((1, 2), (0, 2), (0, 1))


def compose(factors: Sequence[Tensor]) -> Tensor:
    """The tensor ``(I, J, K)`` that factors stand for."""
    first, second, third = factors
    return torch.einsum("ir,jr,kr->ijk", first, second, third)


def component_norms(factors: Sequence[Tensor]) -> Tensor:
    """The Frobenius norm of each rank-one component, ``(R,)``.

    Example:
        >>> component_norms([torch.full((4, 1), 1.0), torch.full((1, 1), 3.0), torch.full((9, 1), 1.0)])
        tensor([18.])
    """
    first, second, third = (factor.square().sum(0).sqrt() for factor in factors)
    return first * second * third


def sensitivity(factors: Sequence[Tensor]) -> Tensor:
    r"""How far the tensor moves when all entries of the factors are disturbed by independent noise of variance one.

    .. math:: K \sum_r \lVert a_r \rVert^2 \lVert b_r \rVert^2 + I \sum_r \lVert b_r \rVert^2 \lVert c_r \rVert^2
              + J \sum_r \lVert a_r \rVert^2 \lVert c_r \rVert^2

    the expected squared distance, to second order in the noise.
    """
    first, second, third = (factor.square().sum(0) for factor in factors)
    size_i, size_j, size_k = (len(factor) for factor in factors)
    return (size_k * first * second + size_i * second * third + size_j * first * third).sum()


def balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensor with factors whose columns have equal root mean squares: the least sensitive scaling."""
    means = torch.stack([factor.square().mean(0).sqrt() for factor in factors])
    common = means.prod(0).pow(1 / 3)
    scale = torch.where(means > 0, common / means.clamp(min=torch.finfo(means.dtype).tiny), torch.zeros_like(means))
    return [factor * row for factor, row in zip(factors, scale, strict=True)]


def cp_als(tensor: Tensor, rank: int, sweeps: int, generator: torch.Generator) -> list[Tensor]:
    """Factors of a nearby tensor by alternating least squares.

    Starts from the leading singular vectors of the unfoldings, and random columns where there are too few.

    Args:
        tensor: ``(I, J, K)``, in float64.
        rank: number of components.
        sweeps: at most so many updates of each factor.
        generator: draws random columns.
    """
    factors = [_leading(tensor, mode, rank, generator) for mode in range(3)]
    total = tensor.square().sum()
    last = float("inf")
    for _ in range(sweeps):
        for mode in range(3):
            projected, gram = _normal_equations(tensor, factors, mode)
            factors[mode] = projected @ torch.linalg.pinv(gram, hermitian=True)
        factors = balanced(factors)
        error = float((tensor - compose(factors)).square().sum())
        if last - error <= _STEADY * 1e-2 * float(total):
            break
        last = error
    return factors


def corrected(
    tensor: Tensor, factors: Sequence[Tensor], bound: float, sweeps: int, objective: Objective = "sensitivity"
) -> list[Tensor]:
    r"""Factors of smaller norm that are as close to ``tensor`` as wanted.

    .. math:: \min \sum_r \lVert a_r \rVert^2 \lVert b_r \rVert^2 \lVert c_r \rVert^2 \quad\text{or}\quad
              \min \mathrm{sensitivity} \qquad\text{subject to}\quad \lVert X - P \rVert_F \le \delta

    by one factor after the other, each step solved exactly. The objective never grows.

    Args:
        tensor: ``(I, J, K)``, in float64.
        factors: where to start, with an error of at most ``bound``.
        bound: the largest error.
        sweeps: at most so many updates of each factor.
        objective: what is made small.
    """
    factors = balanced(factors)
    bound = max(bound, _FLOOR * float(tensor.norm()))
    last = float("inf")
    for _ in range(sweeps):
        for mode in range(3):
            projected, gram = _normal_equations(tensor, factors, mode)
            weight = _weights(factors, mode, objective).clamp(min=torch.finfo(tensor.dtype).tiny).sqrt()
            scaled = bounded_least_norm(
                projected / weight, gram / torch.outer(weight, weight), float(tensor.square().sum()), bound
            )
            if scaled is not None:
                factors[mode] = scaled / weight
        factors = balanced(factors)
        value = float(component_norms(factors).square().sum() if objective == "norm" else sensitivity(factors))
        if last - value <= _STEADY * value:
            break
        last = value
    return factors


def bounded_least_norm(projected: Tensor, gram: Tensor, square: float, bound: float) -> Tensor | None:
    r"""The matrix of least norm whose product with given rows is near enough to a target.

    .. math:: \min_A \lVert A \rVert_F^2 \quad\text{subject to}\quad \lVert Y - A Z^\top \rVert_F \le \delta

    whose solution is :math:`A = Y Z (Z^\top Z + \mu I)^{-1}` with the :math:`\mu \ge 0` at which the bound is met
    exactly; zero, where :math:`\lVert Y \rVert_F \le \delta`.

    Args:
        projected: ``(m, r)``, :math:`Y Z`.
        gram: ``(r, r)``, :math:`Z^\top Z`.
        square: :math:`\lVert Y \rVert_F^2`.
        bound: :math:`\delta`.

    Returns:
        ``(m, r)``; None where no matrix meets the bound.
    """
    if square <= bound**2:
        return torch.zeros_like(projected)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values[-1] * torch.finfo(values.dtype).eps * len(values)
    values, turned = values[kept], (projected @ vectors)[:, kept]
    energy = turned.square().sum(0)

    def error(multiplier: float) -> float:
        return square - float((energy * (values + 2 * multiplier) / (values + multiplier).square()).sum())

    if error(0.0) > bound**2:
        return None
    low, high = 0.0, float(values[-1])
    while error(high) <= bound**2:
        low, high = high, 4 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if error(middle) <= bound**2 else (low, middle)
    solution: Tensor = (turned / (values + low)) @ vectors[:, kept].t()
    return solution


def tucker2(tensor: Tensor, ranks: tuple[int, int], sweeps: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """``P[i, j, k] = sum_pq G[i, p, q] U[j, p] V[k, q]`` near a tensor, by higher-order orthogonal iteration.

    Args:
        tensor: ``(I, J, K)``.
        ranks: columns of ``U`` and of ``V``.
        sweeps: updates of each.

    Returns:
        ``G (I, p, q)``, and ``U (J, p)`` and ``V (K, q)`` with orthonormal columns.
    """
    right = _directions(tensor.permute(2, 0, 1).flatten(1), ranks[1])
    left = _directions(tensor.permute(1, 0, 2).flatten(1), ranks[0])
    for _ in range(sweeps):
        left = _directions((tensor @ right).permute(1, 0, 2).flatten(1), ranks[0])
        right = _directions(torch.einsum("ijk,jp->kip", tensor, left).flatten(1), ranks[1])
    return torch.einsum("ijk,jp,kq->ipq", tensor, left, right), left, right


def _normal_equations(tensor: Tensor, factors: Sequence[Tensor], mode: int) -> tuple[Tensor, Tensor]:
    """``Y Z`` and ``Z' Z`` for the unfolding ``Y`` and the Khatri-Rao product ``Z`` of the two other factors."""
    one, two = (factors[other] for other in _OTHERS[mode])
    moved = tensor.movedim(mode, 0)
    return ((moved @ two) * one).sum(1), (one.t() @ one) * (two.t() @ two)


def _weights(factors: Sequence[Tensor], mode: int, objective: Objective) -> Tensor:
    """What the squared norm of each column of one factor counts in the objective."""
    one, two = _OTHERS[mode]
    first, second = (factors[other].square().sum(0) for other in (one, two))
    if objective == "norm":
        return first * second
    return len(factors[two]) * first + len(factors[one]) * second


def _leading(tensor: Tensor, mode: int, rank: int, generator: torch.Generator) -> Tensor:
    unfolded = tensor.movedim(mode, 0).flatten(1)
    found = _directions(unfolded, rank)
    missing = rank - found.shape[1]
    drawn = torch.randn(len(tensor.movedim(mode, 0)), missing, generator=generator, dtype=torch.float64)
    return torch.cat([found, drawn.to(tensor) / len(drawn) ** 0.5], dim=1)


def _directions(matrix: Tensor, count: int) -> Tensor:
    """The leading left singular vectors, at most ``count``."""
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.t())[1]
    return vectors.flip(1)[:, :count]
