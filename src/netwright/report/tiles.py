"""The key figures at the head of the page."""

from dataclasses import dataclass

from netwright.report.compare import CostChange, Verdict, compare, cost_change
from netwright.report.format import COST_NAMES, TIMES, ScoreStyle, quantity, times
from netwright.report.run import COSTS, Run

__all__ = ["Tile", "tiles"]


@dataclass(frozen=True)
class Tile:
    """A key figure: a large value with its unit, what it is, before and after, and how sure it is."""

    value: str
    label: str
    detail: str
    verdict: Verdict
    unit: str = ""
    spread: str = ""


def tiles(run: Run, style: ScoreStyle) -> list[Tile]:
    """The change of the score and of every cost; without a chosen network, the baseline's costs.

    Args:
        run: the run.
        style: how scores are written.
    """
    result = run.result
    if result is None or result.chosen is None:
        base = run.baseline
        costs = [] if base is None else [(COST_NAMES[cost], quantity(cost, base.cost(cost))) for cost in COSTS]
        return [Tile(shown, name, "baseline", "same") for name, shown in costs]
    score = compare(result, style)[0]
    value, _, unit = (score.change or "=").partition(" ")
    sure = f"95% interval {score.change_interval}" if score.change_interval else ""
    made = [Tile(value, score.name, f"{score.baseline} → {score.chosen}", score.verdict, unit, sure)]
    for cost in COSTS:
        before, after = result.baseline.cost(cost), result.chosen.cost(cost)
        detail = f"{quantity(cost, before)} → {quantity(cost, after)}"
        made.append(_cost_tile(COST_NAMES[cost], detail, cost_change(result, cost)))
    return made


def _cost_tile(name: str, detail: str, change: CostChange | None) -> Tile:
    if change is None or change.verdict == "same":
        return Tile("=", name, detail, "same")
    value, _, words = change.words.partition(" ")
    ends = sorted(map(times, change.interval), key=float) if change.interval else []
    spread = f"{ends[0]} to {ends[1]}{TIMES}" if ends and ends[0] != ends[1] else ""
    return Tile(value, words, detail, change.verdict, spread=spread)
