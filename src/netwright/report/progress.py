"""How the search went: the best network so far and the area that the front covers, after each evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

from netwright.core.front import hypervolume
from netwright.report.limits import main_cost, score_floor
from netwright.report.run import Cost, Point, Run

__all__ = ["Progress", "follow"]


@dataclass(frozen=True)
class Progress:
    """One entry per measured candidate, in the order in which they finished.

    Args:
        cost: the cost that is followed.
        seconds: when each finished, in seconds since the start.
        ratios: its cost over the baseline's.
        kept: whether it kept the score above the floor.
        best: the smallest ratio among the kept ones so far (1 until there is one below 1: the baseline stands).
        area: the share of the final dominated area that is covered so far, in [0, 1].
    """

    cost: Cost
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    kept: tuple[bool, ...]
    best: tuple[float, ...]
    area: tuple[float, ...]


def follow(run: Run) -> Progress | None:
    """Progress of a run towards its first target; None without a baseline or a measured candidate.

    Time grows with the number of candidates times the size of the front.
    """
    baseline = run.baseline
    done = sorted(
        ((entry.finished_s, entry.point) for entry in run.evaluations if entry.point is not None),
        key=lambda pair: pair[0],
    )
    cost = main_cost(run.settings.target)
    if baseline is None or not done or baseline.cost(cost) <= 0:
        return None
    floor = score_floor(run.settings.keep, baseline)
    points = [point for _, point in done]
    ratios = [point.cost(cost) / baseline.cost(cost) for point in points]
    kept = [floor is None or point.score.val >= floor for point in points]
    best: list[float] = []
    for ratio, good in zip(ratios, kept, strict=True):
        before = best[-1] if best else 1.0
        best.append(min(before, ratio) if good else before)
    area = _areas(points, ratios)
    return Progress(cost, tuple(at for at, _ in done), tuple(ratios), tuple(kept), tuple(best), area)


def _areas(points: Sequence[Point], ratios: Sequence[float]) -> tuple[float, ...]:
    """Dominated area after each candidate over the final one; the corner is (1, lowest score tried)."""
    pairs = [(ratio, -point.score.val) for ratio, point in zip(ratios, points, strict=True)]
    corner = (1.0, max(loss for _, loss in pairs))
    front: list[tuple[float, float]] = []
    areas: list[float] = []
    for pair in pairs:
        if any(other[0] <= pair[0] and other[1] <= pair[1] for other in front):
            areas.append(areas[-1])
            continue
        front = [other for other in front if not (pair[0] <= other[0] and pair[1] <= other[1])] + [pair]
        areas.append(hypervolume(front, corner))
    return tuple(area / areas[-1] if areas[-1] > 0 else 0.0 for area in areas)
