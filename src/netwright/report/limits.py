"""Targets and floors such as ``<=0.2x`` as numbers that can be drawn."""

import re
from collections.abc import Mapping

from netwright.report.run import COSTS, Cost, Point

__all__ = ["main_cost", "score_change", "score_floor", "target_limit"]

_UNITS: Mapping[str, float] = {
    "": 1.0,
    "ms": 1.0,
    "us": 1e-3,
    "µs": 1e-3,
    "s": 1e3,
    "B": 1.0,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "K": 1e3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
}
_LIMIT = re.compile(r"\s*(<=|>=|<|>)\s*([+-]?)(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*([a-zA-Zµ]*)\s*")


def target_limit(cost: Cost, wanted: str, baseline: Point | None) -> float | None:
    """The cost that a target allows, in ms, bytes or counts; None where it cannot be told.

    Args:
        cost: which cost.
        wanted: the target as in ``result.json``: an operator, a number and a unit.
        baseline: what ``x`` is relative to.
    """
    match = _LIMIT.fullmatch(wanted)
    if match is None:
        return None
    _, sign, number, unit = match.groups()
    value = float(f"{sign}{number}")
    if unit == "x":
        return None if baseline is None else value * baseline.cost(cost)
    return value * _UNITS[unit] if unit in _UNITS else None


def score_change(keep: Mapping[str, str]) -> float | None:
    """The change of the score that is still accepted, such as -0.01; None where nothing was said."""
    match = _LIMIT.fullmatch(keep.get("score", ""))
    return None if match is None else float(match.group(2) + match.group(3))


def score_floor(keep: Mapping[str, str], baseline: Point | None) -> float | None:
    """The lowest validation score that is kept: the baseline's plus the change that ``keep`` allows.

    Args:
        keep: the ``keep`` object of ``result.json``, such as ``{"score": ">=-0.01"}``.
        baseline: what the change is relative to.
    """
    change = score_change(keep)
    return None if change is None or baseline is None else baseline.score.val + change


def main_cost(target: Mapping[str, str]) -> Cost:
    """The cost that the run was about: the first one with a target, else latency."""
    return next((cost for name in target for cost in COSTS if cost == name), "latency")
