"""What a run is asked for: limits on costs, and how much score may be given up."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from netwright.core.cost import Cost
from netwright.core.errors import TargetError

__all__ = ["METRICS", "Keep", "Limit", "parse_budget", "parse_keep", "parse_targets"]

METRICS = ("latency", "memory", "size", "macs", "parameters")
"""What a target can speak of."""

# What each unit stands for, in the unit in which a Cost holds the metric.
_UNITS: dict[str, dict[str, float]] = {
    "latency": {"ms": 1.0, "us": 1e-3, "s": 1e3},
    "memory": {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9},
    "size": {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9},
    "macs": {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9},
    "parameters": {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9},
}
_LIMIT = re.compile(r"\s*([A-Za-z_]+)\s*(<=|>=|==|=|<|>)\s*([-+]?[0-9.]+(?:[eE][-+]?\d+)?)\s*([A-Za-z]*)\s*")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_LENGTH = re.compile(r"\s*([0-9.]+)\s*([a-z]*)\s*")


@dataclass(frozen=True)
class Limit:
    """An upper limit on one metric.

    Args:
        metric: one of "latency", "memory", "size", "macs", "parameters".
        value: the limit, as a share of the baseline or in milliseconds, bytes or plain counts.
        relative: whether it is a share of the baseline.
        text: how the user wrote it, without the metric.
    """

    metric: str
    value: float
    relative: bool
    text: str

    def ratio(self, baseline: Cost) -> float:
        """The limit as a share of the baseline's cost; infinite where that is 0."""
        if self.relative:
            return self.value
        cost = metric_of(baseline, self.metric)
        return self.value / cost if cost else math.inf


@dataclass(frozen=True)
class Keep:
    """The least change of the score, in points of the score itself, that is still acceptable.

    Args:
        change: for example -0.01: at most 0.01 below the baseline.
        text: how the user wrote it, without the word "score".
    """

    change: float
    text: str


def metric_of(cost: Cost, metric: str) -> float:
    """The figure of ``cost`` that a limit on ``metric`` speaks of: milliseconds, bytes, or a count."""
    figures = {
        "latency": cost.latency.median_ms,
        "memory": cost.memory_bytes,
        "size": cost.size_bytes,
        "macs": cost.macs,
        "parameters": cost.parameters,
    }
    return float(figures[metric])


def parse_targets(texts: Sequence[str]) -> tuple[Limit, ...]:
    """Limits from texts such as ``latency<=0.4x`` or ``size<=200KB``; commas separate several.

    Raises:
        TargetError: a text that does not parse, an unknown metric, operator or unit, a value that is not
            positive, two limits on one metric, or only ones that every baseline meets.

    Example:
        >>> [(limit.metric, limit.value, limit.relative) for limit in parse_targets(["latency<=0.4x,size<=200KB"])]
        [('latency', 0.4, True), ('size', 200000.0, False)]
    """
    limits = tuple(_limit(part) for text in texts for part in text.split(","))
    if not limits:
        raise TargetError("No target was given. Write one, for example latency<=0.4x.")
    seen = [limit.metric for limit in limits]
    for metric in seen:
        if seen.count(metric) > 1:
            raise TargetError(f"Two targets speak of {metric}. Give one limit for each metric.")
    if all(limit.relative and limit.value >= 1 for limit in limits):
        asked = ",".join(f"{limit.metric}{limit.text}" for limit in limits)
        raise TargetError(f"The baseline itself meets {asked}. Ask for less than 1x of something, as {seen[0]}<=0.4x.")
    return limits


def parse_keep(text: str) -> Keep:
    """The floor of the score from a text such as ``score>=-0.01``.

    It is a change against the baseline's score: a loss is written ``-0.01``, a gain ``+0.01``.

    Raises:
        TargetError: a text that does not parse, that speaks of something else than the score, or that reads as a score
            rather than as a change of it.

    Example:
        >>> parse_keep("score>=-0.01").change
        -0.01
    """
    metric, operator, value, unit = _split(text)
    if metric != "score":
        raise TargetError(f"--keep speaks of the score, got {metric!r} in {text!r}. Write score>=-0.01.")
    if operator != ">=":
        raise TargetError(f"--keep needs the operator >=, got {operator!r} in {text!r}. Write score>=-0.01.")
    if unit:
        raise TargetError(
            f"--keep takes points of the score without a unit, got {unit!r} in {text!r}. One point of accuracy is "
            "score>=-0.01."
        )
    if value > 0 and "+" not in text:
        raise TargetError(
            f"--keep is a change against the baseline's score, so {text!r} asks for a gain of {value:g}. Write "
            f"score>=-0.01 for at most 0.01 below it; if a gain is meant, score>=+{value:g}."
        )
    return Keep(value, f">={value:+g}" if value > 0 else f">={value:g}")


def parse_budget(text: str) -> float:
    """Seconds from a text such as ``120s``, ``10m`` or ``1.5h``.

    Raises:
        TargetError: a text that does not parse, or a length that is not positive.

    Example:
        >>> parse_budget("10m")
        600.0
    """
    match = _LENGTH.fullmatch(text)
    number = _number(match.group(1)) if match else None
    if match is None or number is None or match.group(2) not in _SECONDS:
        raise TargetError(f"{text!r} is not a length of time. Write 90s, 10m or 2h.")
    seconds = number * _SECONDS[match.group(2)]
    if not seconds > 0:
        raise TargetError(f"A budget must be longer than zero, got {text!r}.")
    return seconds


def _limit(text: str) -> Limit:
    metric, operator, value, unit = _split(text)
    if metric not in METRICS:
        raise TargetError(f"Unknown metric {metric!r} in {text!r}. Known are {', '.join(METRICS)}.")
    if operator != "<=":
        raise TargetError(f"A target needs the operator <=, got {operator!r} in {text!r}. Write {metric}<=0.4x.")
    if not (math.isfinite(value) and value > 0):
        raise TargetError(f"A target must be positive, got {value:g} in {text!r}.")
    written = f"<={value:g}{unit}"
    if unit == "x":
        return Limit(metric, value, True, written)
    if unit not in _UNITS[metric]:
        known = ["x", *(name for name in _UNITS[metric] if name)]
        raise TargetError(
            f"Unknown unit {unit!r} for {metric} in {text!r}. Known are {', '.join(known)} (x is the baseline)."
        )
    if "B" not in _UNITS[metric] and metric != "latency" and value * _UNITS[metric][unit] < 1:
        raise TargetError(f"{text!r} asks for less than one. For a share of the baseline's {metric} write {written}x.")
    return Limit(metric, value * _UNITS[metric][unit], False, written)


def _split(text: str) -> tuple[str, str, float, str]:
    match = _LIMIT.fullmatch(text)
    number = _number(match.group(3)) if match else None
    if match is None or number is None:
        raise TargetError(f"{text!r} is not a target. Write metric, operator, number and unit: latency<=0.4x.")
    return match.group(1), match.group(2), number, match.group(4)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
