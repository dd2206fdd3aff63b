"""Least squares with at most k entries that are not zero, by hard thresholding."""

import torch
from torch import Tensor

from netwright.compress._elimination import eliminate
from netwright.compress._least_squares import LeastSquares, refit
from netwright.compress._sparse_recipe_masks import largest

__all__ = ["hard_threshold_step", "solve_sparse"]

_ACTIVE = 1.5  # columns in the active set, in multiples of k
_FALL = 1e-3  # relative fall of the objective below which a loop ends
_HALVINGS = 10
_FITTED = 1e-4  # share of the gradient inside the support below which the support counts as fitted


def hard_threshold_step(problem: LeastSquares, w: Tensor, count: int, value: float) -> tuple[Tensor, float]:
    r"""One step :math:`w \leftarrow P_k(w - \tau \nabla f(w))`.

    :math:`P_k` keeps the k largest of :math:`|w|`.
    While the support stays, :math:`f` is a parabola in :math:`\tau`, whose lowest point is taken. Where the support
    changes before that, :math:`\tau` is doubled while the objective falls, or halved until it does.

    Args:
        problem: what to minimize.
        w: ``(p,)`` with at most ``count`` entries that are not zero.
        count: k.
        value: the objective at ``w``.

    Returns:
        The next point and its objective, which is never above ``value``.
    """
    gradient = problem.gradient(w)
    support = w != 0
    along, within = gradient, int(support.sum()) >= count
    if within:
        inside = torch.where(support, gradient, 0.0)
        within = bool(inside.norm() > _FITTED * gradient.norm())  # else only an exchange helps
        along = inside if within else gradient
    if not bool(along.any()):
        return w, value
    rate = float(along.double().square().sum()) / problem.curvature(along)
    if within and rate <= _first_change(w, gradient, support):
        moved = w - rate * along
        found = problem.value(moved)
        return (moved, found) if found < value else (w, value)

    def moved_by(tau: float) -> tuple[Tensor, float]:
        trial = w - tau * gradient
        trial = trial * largest(trial.abs(), count)
        return trial, problem.value(trial)

    best, low = moved_by(rate)
    if low < value:
        while True:
            rate *= 2
            trial, found = moved_by(rate)
            if found >= low:
                return best, low
            best, low = trial, found
    for _ in range(_HALVINGS):
        rate /= 2
        best, low = moved_by(rate)
        if low < value:
            return best, low
    return w, value


def _first_change(w: Tensor, gradient: Tensor, support: Tensor) -> float:
    """The smallest step at which an entry outside the support overtakes one inside."""
    if bool(support.all()):
        return float("inf")
    outside = gradient[~support].abs().max()
    closing = outside + torch.sign(w[support]) * gradient[support]
    times = torch.where(closing > 0, w[support].abs() / closing, torch.inf)
    return float(times.min())


def solve_sparse(problem: LeastSquares, start: Tensor, count: int, *, steps: int = 50, rounds: int = 5) -> Tensor:
    """A vector of at most ``count`` entries other than zero that neither steps nor a refit improve by much.

    It begins with what :func:`~netwright.compress._elimination.eliminate` leaves of ``start``. Steps act on an active
    set, the ``1.5 count`` entries that a step from all of them would make largest; then the support is fitted exactly,
    and the gradient of all entries chooses the active set anew.

    Args:
        problem: what to minimize.
        start: ``(p,)``; all but ``count`` of its entries go first.
        count: k.
        steps: of hard thresholding in a round, at most.
        rounds: active sets, at most.

    Cost: ``O(n p)`` for each round, ``O(n k)`` for each step, ``O(n**2 k + n**3)`` for each fit; ``3 n k`` words.
    """
    w = eliminate(problem, start, count)
    value = problem.value(w)
    for _ in range(rounds):
        active = _active_set(problem, w, count)
        part = problem.columns(active)
        inner = w[active]
        first = low = part.value(inner)
        for _ in range(steps):
            before = low
            inner, low = hard_threshold_step(part, inner, count, before)
            if low >= (1 - _FALL) * before:
                break
        inner, low = _fitted(part, inner, low)
        fall = first - low
        if fall > 0:
            w = torch.zeros_like(w)
            w[active] = inner
        if fall <= _FALL * abs(value):
            break
        value -= fall
    return w


def _fitted(problem: LeastSquares, w: Tensor, value: float) -> tuple[Tensor, float]:
    """The exact fit on the support of ``w``, where rounding does not make it worse."""
    index = w.nonzero().flatten()
    fitted = torch.zeros_like(w)
    fitted[index] = refit(problem, index)
    found = problem.value(fitted)
    return (fitted, found) if found < value else (w, value)


def _active_set(problem: LeastSquares, w: Tensor, count: int) -> Tensor:
    """Indices of the support and of what a step on all entries would make largest."""
    size = min(len(w), int(_ACTIVE * count) + 1)
    gradient = problem.gradient(w)
    square = float(gradient.double().square().sum())
    rate = square / problem.curvature(gradient) if square > 0 else 0.0
    reach = torch.where(w != 0, torch.inf, (w - rate * gradient).abs())
    return largest(reach, size).nonzero().flatten()
