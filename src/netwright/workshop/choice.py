"""Choosing from what was measured: which candidates deserve a full recovery, and which is handed back."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from netwright.core.front import Front
from netwright.workshop.point import Point, ratios
from netwright.workshop.target import Keep, Limit

__all__ = [
    "REFERENCE",
    "Finalist",
    "excess",
    "front_of",
    "front_volume",
    "meets",
    "next_finalist",
    "ranking",
    "regain",
    "saves",
    "shortfall",
]

REFERENCE = 1.1
"""Ratio at which a cost stops to count for the hypervolume: a little beyond the baseline's own."""


_RESERVE = 0.5  # of what may be given up of the score is held back against the luck of the validation split
_SLACK = 3.0
_LEAST_SLACK = 0.005  # of the score, where nothing may be given up
_HOPE = 4.0  # times what the best candidate lacks may be regained, as long as nothing is known
_LEAST_PROMISE = 0.01  # of a full recovery: a hundredth of the cost
_TINY = 1e-12


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


def saves(point: Point, baseline: Point, limits: Sequence[Limit], keep: Keep) -> bool:
    """Whether the point may be handed back in place of the baseline.

    It costs less in a targeted metric, and in none more than the baseline or than what that metric's limit allows. A
    baseline that meets every target and keeps the score gives way only to a point that does so too.

    Args:
        point: what was measured.
        baseline: the reference of every ratio.
        limits: the targets.
        keep: the floor of the score.
    """
    shares = ratios(point, baseline)
    if meets(baseline, baseline, limits, keep) and not meets(point, baseline, limits, keep):
        return False
    return any(shares[limit.metric] < 1 for limit in limits) and all(
        shares[limit.metric] <= max(1.0, limit.ratio(baseline.cost)) for limit in limits
    )


def meets(point: Point, baseline: Point, limits: Sequence[Limit], keep: Keep) -> bool:
    """Whether the point is within every limit and keeps the validation score."""
    return excess(point, baseline, limits) <= 1 and shortfall(point, baseline, keep) <= 0


def ranking(points: Sequence[Point], baseline: Point, limits: Sequence[Limit], keep: Keep) -> list[Point]:
    """Points in the order in which they would be handed back.

    First those that meet every target and keep the score with half of what may be given up in reserve, smallest costs
    first: a candidate chosen among many for its validation score scores a little lower on new data. Then those that
    keep it without that reserve; then those that only keep the score, with the reserve and without, nearest to the
    target first; then the rest, by how much score they lack.
    """
    reserve = _RESERVE * max(-keep.change, 0.0)

    def order(point: Point) -> tuple[float, ...]:
        over, lacking = excess(point, baseline, limits), shortfall(point, baseline, keep)
        if lacking <= 0:
            return (2.0 if over > 1 else 0.0, lacking > -reserve, over, -point.val)
        return (3.0, lacking, over)

    return sorted(points, key=order)


def regain(keep: Keep, trained: float, gains: Sequence[float] = ()) -> float:
    r"""The most score that a full recovery may give back to a candidate.

    It is three times what may be given up, less what the candidate had already, :math:`D_0`; or more, where full
    recoveries gave back more, :math:`g_1 \dots g_n`: were gains spread evenly between 0 and :math:`D`, their mean would
    be :math:`D / 2`, and with :math:`D_0` counting as one of them

    .. math:: D = \max\Big(D_0, \frac{D_0 + 2 \sum_i g_i}{1 + n}\Big).

    Args:
        keep: the floor of the score.
        trained: the share of the longest recovery that it had, 0 to 1.
        gains: what full recoveries gave back.

    Example:
        >>> from netwright.workshop.target import parse_keep
        >>> keep = parse_keep("score>=-0.01")
        >>> round(regain(keep, 0.2), 3), round(regain(keep, 0.2, [0.04]), 3)
        (0.024, 0.052)
    """
    usual = _SLACK * max(abs(keep.change), _LEAST_SLACK) * (1.0 - trained)
    return max(usual, (usual + 2 * math.fsum(gains)) / (1 + len(gains)))


@dataclass(frozen=True)
class Finalist:
    """A candidate for a full recovery.

    Args:
        point: as it was measured.
        trained: the share of the longest recovery that it had, 0 to 1.
    """

    point: Point
    trained: float


def next_finalist(
    waiting: Sequence[Finalist],
    standing: Sequence[Point],
    baseline: Point,
    limits: Sequence[Limit],
    keep: Keep,
    *,
    insure: bool,
    gains: Sequence[float] = (),
) -> Finalist | None:
    """Which candidate deserves a full recovery next.

    Candidates trained only briefly while searching, so one that lacks a little of the score (see :func:`regain`) may
    well get it back. First comes the cheapest of those that lack nothing: it can be handed back whatever becomes of the
    others. Where all lack something it is the one that meets every target and lacks least; or else, where recovery is
    not known to save any, that with the largest gain over the baseline if four times what the best one lacks can be
    regained. Then, if it misses a target that others meet, those of them that lack least; else the one with the largest
    expected gain,

        (1 - d / D) * log(c / c'),

    ``d`` what it lacks, ``D`` how much may be regained, ``c`` the cost of the cheapest that stands and ``c'`` its own.
    Where none promises a gain and one is wanted nevertheless, it is the one that lacks least of those that cost less
    than what stands: what it gives back says whether others can be saved.

    Args:
        waiting: candidates that had no full recovery.
        standing: results of full recoveries, and candidates on their way to one.
        baseline: the reference of every ratio.
        limits: the targets.
        keep: the floor of the score.
        insure: whether to name one even where none promises a gain, for it costs no time.
        gains: what full recoveries gave back so far.
    """
    if not waiting:
        return None
    reserve = _RESERVE * max(-keep.change, 0.0)

    def cost(point: Point) -> float:
        return max(excess(point, baseline, limits), _TINY)

    def lacks(point: Point) -> float:
        """How far it is from keeping the score with the reserve of :func:`ranking`."""
        return shortfall(point, baseline, keep) + reserve

    def chance(one: Finalist) -> float:
        lacking, room = lacks(one.point), regain(keep, one.trained, gains)
        return 1.0 if lacking <= 0 else max(0.0, 1.0 - lacking / room) if room > 0 else 0.0

    def order(one: Finalist) -> tuple[float, ...]:
        over, lacking, meets = cost(one.point), lacks(one.point), cost(one.point) <= 1
        if lacking <= 0:
            return (0.0 if meets else 2.0, over)
        return (1.0 if meets and chance(one) > 0 else 3.0, lacking, over)

    least = min((cost(point) for point in standing if lacks(point) <= 0), default=None)
    if least is None:
        sound = [one for one in waiting if lacks(one.point) <= 0]
        if sound:
            return min(sound, key=lambda one: cost(one.point))
        room = _HOPE * min(lacks(one.point) for one in waiting)
        hopes = [(1 - lacks(one.point) / room) * math.log(cost(baseline) / cost(one.point)) for one in waiting]
        first = min(waiting, key=order)
        saved = cost(first.point) <= 1 and chance(first) > 0
        return first if saved or max(hopes) <= 0 else waiting[hopes.index(max(hopes))]
    meeting = [one for one in waiting if cost(one.point) <= 1 and chance(one) > 0]
    if least > 1 and meeting:
        return max(meeting, key=chance)
    best = max(waiting, key=lambda one: chance(one) * math.log(least / cost(one.point)))
    if chance(best) * math.log(least / cost(best.point)) > _LEAST_PROMISE:
        return best
    cheaper = [one for one in waiting if cost(one.point) < least]
    return min(cheaper or waiting, key=order) if insure else None
