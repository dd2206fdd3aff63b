"""Choosing from what was measured: which candidates deserve a full recovery, and which is handed back."""

from collections.abc import Callable, Sequence

from netwright.core.front import Front
from netwright.workshop.point import Point, ratios
from netwright.workshop.target import Keep, Limit

__all__ = ["REFERENCE", "excess", "finalists", "front_of", "front_volume", "ranking", "shortfall"]

REFERENCE = 1.1
"""Ratio at which a cost stops to count for the hypervolume: a little beyond the baseline's own."""


_RESERVE = 0.5  # of what may be given up of the score is held back against the luck of the validation split
_SLACK = 3.0
_LEAST_SLACK = 0.005  # of the score, where nothing may be given up


def front_of(points: Sequence[Point], baseline: Point, limits: Sequence[Limit]) -> list[Point]:
    """The points that no other one beats in score and in every targeted metric."""
    return list(Front(list(points), [lambda point: -point.val, *_shares(baseline, limits)]))


def front_volume(points: Sequence[Point], baseline: Point, limits: Sequence[Limit], floor: float) -> float:
    """Hypervolume of the points, as a share of the box that the target leaves open.

    Score counts from ``floor`` (twice the loss that the user accepts below the baseline) up to the
    baseline, ratios from 0 up to 1.1; a point beyond the box counts nothing. Higher is better.
    """
    depth = max(baseline.val - floor, 1e-9)
    front = Front(
        list(points),
        [
            lambda point: max(0.0, (baseline.val - point.val) / depth),
            *_shares(baseline, limits),
        ],
    )
    return front.hypervolume([1.0, *(REFERENCE for _ in limits)]) / REFERENCE ** len(limits)


def _shares(baseline: Point, limits: Sequence[Limit]) -> list[Callable[[Point], float]]:
    def share(metric: str) -> Callable[[Point], float]:
        return lambda point: ratios(point, baseline)[metric]

    return [share(limit.metric) for limit in limits]


def excess(point: Point, baseline: Point, limits: Sequence[Limit]) -> float:
    """By what factor the worst metric exceeds its limit; at most 1 when every target is met."""
    shares = ratios(point, baseline)
    return max(shares[limit.metric] / limit.ratio(baseline.cost) for limit in limits)


def shortfall(point: Point, baseline: Point, keep: Keep) -> float:
    """How far the validation score lies below what must be kept; at most 0 when it is kept."""
    return baseline.val + keep.change - point.val


def ranking(points: Sequence[Point], baseline: Point, limits: Sequence[Limit], keep: Keep) -> list[Point]:
    """Points in the order in which they would be handed back.

    First those that meet every target and keep the score with half of what may be given up in reserve, smallest costs
    first: a candidate chosen among many for its validation score scores a little lower on new data. Then those that
    keep it without that reserve; then those that only keep the score, nearest to the target first; then the rest, by
    how much score they lack.
    """
    reserve = _RESERVE * max(-keep.change, 0.0)

    def order(point: Point) -> tuple[float, ...]:
        over, lacking = excess(point, baseline, limits), shortfall(point, baseline, keep)
        if lacking <= 0:
            return (2.0 if over > 1 else 1.0 if lacking > -reserve else 0.0, over, -point.val)
        return (3.0, lacking, over)

    return sorted(points, key=order)


def finalists(points: Sequence[Point], baseline: Point, limits: Sequence[Limit], keep: Keep, count: int) -> list[Point]:
    """Which candidates deserve a full recovery, most promising first.

    Candidates trained only briefly while searching, so one that meets every target and lacks a little of the score (up
    to three times what may be given up) is expected to regain it, and goes before one that keeps the score beyond
    a target. Of those that keep it with a reserve (see :func:`ranking`), the cheapest come first; of the others, those
    with the best score.
    """
    reserve = _RESERVE * max(-keep.change, 0.0)
    slack = _SLACK * max(abs(keep.change), _LEAST_SLACK)

    def order(point: Point) -> tuple[float, ...]:
        over, lacking = excess(point, baseline, limits), shortfall(point, baseline, keep)
        if over <= 1 and lacking <= -reserve:
            return (0.0, over)
        if over <= 1 and lacking <= slack:
            return (1.0, lacking)
        return (2.0, over, lacking) if lacking <= 0 else (3.0, lacking, over)

    return sorted(points, key=order)[:count]
