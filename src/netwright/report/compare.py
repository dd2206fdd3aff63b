"""Baseline against chosen, row by row, for the page and for the terminal."""

from dataclasses import dataclass
from typing import Literal

from netwright.report.format import COST_NAMES, TIMES, ScoreStyle, compact, quantity, times
from netwright.report.run import COSTS, Cost, Point, Result

__all__ = ["CostChange", "Row", "compare", "cost_change"]

Verdict = Literal["better", "worse", "same"]

_WORDS: dict[Cost, tuple[str, str]] = {
    "latency": ("faster", "slower"),
    "size": ("smaller", "larger"),
    "memory": ("less memory", "more memory"),
    "macs": ("fewer MACs", "more MACs"),
    "parameters": ("fewer parameters", "more parameters"),
}


@dataclass(frozen=True)
class CostChange:
    """A cost of the chosen network over the baseline's, with its spread where it was measured."""

    cost: Cost
    ratio: float
    interval: tuple[float, float] | None
    noisy: bool

    @property
    def verdict(self) -> Verdict:
        """Better or worse only where the difference is larger than its uncertainty."""
        low, high = self.interval or (self.ratio, self.ratio)
        if low <= 1 <= high or abs(self.ratio - 1) < 0.005:
            return "same"
        return "better" if self.ratio < 1 else "worse"

    @property
    def words(self) -> str:
        """``8.1× faster``, ``1.4× slower``, or ``no faster``."""
        better, worse = _WORDS[self.cost]
        if self.verdict == "same":
            return "no measurable change" if self.interval else "unchanged"
        return f"{times(self.ratio)}{TIMES} {better if self.verdict == 'better' else worse}"


@dataclass(frozen=True)
class Row:
    """One line of the table: what, before, after, change, and whether that is better."""

    name: str
    note: str
    baseline: str
    baseline_interval: str
    chosen: str
    chosen_interval: str
    change: str
    change_interval: str
    words: str
    verdict: Verdict


def cost_change(result: Result, cost: Cost) -> CostChange | None:
    """How a cost changed; for latency the interleaved ratio where there is one, never two figures of two moments."""
    if result.chosen is None:
        return None
    paired = result.latency_ratio or result.chosen.latency_ratio
    if cost == "latency" and paired is not None:
        return CostChange(cost, paired.median, (paired.low, paired.high), paired.noisy)
    share = result.ratios.get(cost)
    return CostChange(cost, result.chosen.share(cost, result.baseline) if share is None else share, None, False)


def compare(result: Result, style: ScoreStyle) -> tuple[Row, ...]:
    """The table of baseline against chosen: scores with 95% intervals, then every cost.

    Args:
        result: the parsed ``result.json``.
        style: how scores are written.
    """
    return (*_score_rows(result, style), *(_cost_row(result, cost) for cost in COSTS))


def _score_rows(result: Result, style: ScoreStyle) -> list[Row]:
    rows = []
    base, chosen, drop = result.baseline.score, result.chosen.score if result.chosen else None, result.score_drop
    if base.test is not None:
        after = chosen.test if chosen else None
        difference = drop.test if drop else None if after is None else after - base.test
        rows.append(
            Row(
                name=f"{style.title}, test",
                note="read once, at the end; 95% interval",
                baseline=style.value(base.test),
                baseline_interval=style.interval(base.test_ci95) if base.test_ci95 else "",
                chosen="" if after is None else style.value(after),
                chosen_interval=style.interval(chosen.test_ci95) if chosen and chosen.test_ci95 else "",
                change="" if difference is None else style.change(difference),
                change_interval=style.change_interval(drop.ci95) if drop and drop.ci95 else "",
                words="",
                verdict=_score_verdict(difference, drop.ci95 if drop else None),
            )
        )
    difference = chosen.val - base.val if chosen else None
    rows.append(
        Row(
            name=f"{style.title}, validation",
            note="what the search saw",
            baseline=style.value(base.val),
            baseline_interval="",
            chosen=style.value(chosen.val) if chosen else "",
            chosen_interval="",
            change="" if difference is None else style.change(difference),
            change_interval="",
            words="",
            verdict=_score_verdict(difference, None),
        )
    )
    return rows


def _score_verdict(difference: float | None, interval: tuple[float, float] | None) -> Verdict:
    low, high = interval or (difference or 0.0, difference or 0.0)
    return "better" if low > 0 else "worse" if high < 0 else "same"


def _cost_row(result: Result, cost: Cost) -> Row:
    change = cost_change(result, cost)
    return Row(
        name=COST_NAMES[cost],
        note=_note(result, cost),
        baseline=quantity(cost, result.baseline.cost(cost)),
        baseline_interval=_spread(result.baseline, cost),
        chosen=quantity(cost, result.chosen.cost(cost)) if result.chosen else "",
        chosen_interval=_spread(result.chosen, cost) if result.chosen else "",
        change=f"{compact(change.ratio)}{TIMES}" if change else "",
        change_interval=f"{compact(change.interval[0])} to {compact(change.interval[1])}"
        if change and change.interval
        else "",
        words=change.words if change else "",
        verdict=change.verdict if change else "same",
    )


def _note(result: Result, cost: Cost) -> str:
    if cost != "latency":
        return ""
    taken = result.baseline.latency_ms
    threads = "1 thread" if taken.threads == 1 else f"{taken.threads} threads"
    noisy = result.latency_ratio is not None and result.latency_ratio.noisy
    return f"median, 10th to 90th percentile; batch {taken.batch}, {threads}, {taken.runtime}" + (
        "; the machine was noisy while this was measured" if noisy else ""
    )


def _spread(point: Point, cost: Cost) -> str:
    if cost != "latency":
        return ""
    taken = point.latency_ms
    return f"{quantity('latency', taken.p10)} to {quantity('latency', taken.p90)}"
