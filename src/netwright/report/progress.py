"""How the search went: the best network so far and the volume that the front covers, after each evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from netwright.core.front import hypervolume
from netwright.report.limits import main_cost, score_change, score_floor
from netwright.report.run import COSTS, Cost, Point, Run

__all__ = ["Progress", "follow"]

_WORST_SHARE = 1.1  # the corner of the box that the volume is measured in: a little beyond the baseline's cost
_DEPTH = 2.0  # and this many times the loss of score that is accepted


@dataclass(frozen=True)
class Progress:
    """One entry per measured candidate, in the order in which they finished.

    Args:
        cost: the cost that is followed.
        seconds: when each finished, in seconds since the start.
        ratios: its cost over the baseline's.
        kept: whether it kept the score above the floor.
        best: the smallest ratio among the kept ones so far (1 until there is one below 1: the baseline stands).
        volume: the share of the box between nothing and the corner that the front covers so far, in [0, 1]. The
            box spans the score, from twice the accepted loss up to the baseline, and every targeted cost, from
            0 to 1.1 of the baseline's.
        start: the volume before the first candidate, which the baseline alone covers.
    """

    cost: Cost
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    kept: tuple[bool, ...]
    best: tuple[float, ...]
    volume: tuple[float, ...]
    start: float


def follow(run: Run) -> Progress | None:
    """Progress of a run towards its first target; None without a baseline or a measured candidate.

    Time grows with the number of candidates times the size of the front.
    """
    baseline = run.baseline
    done = sorted(
        ((entry.finished_s, entry.point) for entry in run.evaluations if entry.point is not None),
        key=lambda pair: pair[0],
    )
    if baseline is None or not done:
        return None
    cost = main_cost(run.settings.target)
    floor = score_floor(run.settings.keep, baseline)
    points = [point for _, point in done]
    ratios = [point.share(cost, baseline) for point in points]
    kept = [floor is None or point.score.val >= floor for point in points]
    best: list[float] = []
    for ratio, good in zip(ratios, kept, strict=True):
        before = best[-1] if best else 1.0
        best.append(min(before, ratio) if good else before)
    start, *volume = _volumes([baseline, *points], baseline, run.settings.target, run.settings.keep)
    return Progress(
        cost=cost,
        seconds=tuple(at for at, _ in done),
        ratios=tuple(ratios),
        kept=tuple(kept),
        best=tuple(best),
        volume=tuple(volume),
        start=start,
    )


def _volumes(
    points: Sequence[Point], baseline: Point, target: Mapping[str, str], keep: Mapping[str, str]
) -> list[float]:
    """Covered share of the box after each point."""
    costs = [cost for cost in COSTS if cost in target] or [main_cost(target)]
    depth = _DEPTH * max(-(score_change(keep) or 0.0), 1e-3)
    corner = [1.0, *(_WORST_SHARE for _ in costs)]
    front: list[tuple[float, ...]] = []
    volumes: list[float] = []
    for point in points:
        loss = max(0.0, (baseline.score.val - point.score.val) / depth)
        row = (loss, *(point.share(cost, baseline) for cost in costs))
        if any(all(a <= b for a, b in zip(other, row, strict=True)) for other in front):
            volumes.append(volumes[-1])
            continue
        front = [other for other in front if not all(a <= b for a, b in zip(row, other, strict=True))] + [row]
        volumes.append(hypervolume(front, corner) / _WORST_SHARE ** len(costs))
    return volumes
