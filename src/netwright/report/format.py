"""Numbers as people read them: milliseconds, bytes, counts, scores and ratios."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from netwright.report.run import Cost, Point, Step

__all__ = [
    "COST_NAMES",
    "MINUS",
    "TIMES",
    "ScoreStyle",
    "Unit",
    "compact",
    "duration",
    "moment",
    "plain_steps",
    "pretty_limit",
    "quantity",
    "times",
    "unit_for",
]

TIMES = "\N{MULTIPLICATION SIGN}"
"""The sign after a ratio."""
MINUS = "\N{MINUS SIGN}"
"""The sign before a negative number."""

COST_NAMES: Mapping[Cost, str] = {
    "latency": "Latency",
    "size": "Size on disk",
    "memory": "Peak memory",
    "macs": "MACs",
    "parameters": "Parameters",
}
"""How each cost is called in tables and on axes."""


@dataclass(frozen=True)
class Unit:
    """A unit and how many of the stored unit (ms, bytes, counts) it is worth."""

    name: str
    worth: float


_UNITS: Mapping[Cost, tuple[Unit, ...]] = {
    "latency": (Unit("s", 1e3), Unit("ms", 1.0), Unit("µs", 1e-3)),
    "size": (Unit("GB", 1e9), Unit("MB", 1e6), Unit("KB", 1e3), Unit("B", 1.0)),
    "memory": (Unit("GB", 1e9), Unit("MB", 1e6), Unit("KB", 1e3), Unit("B", 1.0)),
    "macs": (Unit("G", 1e9), Unit("M", 1e6), Unit("k", 1e3), Unit("", 1.0)),
    "parameters": (Unit("G", 1e9), Unit("M", 1e6), Unit("k", 1e3), Unit("", 1.0)),
}


def unit_for(cost: Cost, value: float) -> Unit:
    """The largest unit in which a value is at least about one.

    Example:
        >>> unit_for("size", 2_400_000), unit_for("latency", 0.03)
        (Unit(name='MB', worth=1000000.0), Unit(name='µs', worth=0.001))
    """
    units = _UNITS[cost]
    floor = 0.1 if cost == "latency" else 1.0
    return next((unit for unit in units if abs(value) >= floor * unit.worth), units[-1])


def quantity(cost: Cost, value: float) -> str:
    """A cost with its unit, three significant digits.

    Example:
        >>> quantity("latency", 0.3512), quantity("size", 93_000), quantity("macs", 4_812_345), quantity("memory", 0)
        ('0.351 ms', '93.0 KB', '4.81 M', '0 B')
    """
    unit = unit_for(cost, value)
    return f"{compact(value / unit.worth)} {unit.name}".strip()


def compact(value: float) -> str:
    """Three significant digits without an exponent for everyday magnitudes.

    Example:
        >>> compact(8.1234), compact(52.4), compact(1234.5), compact(0.0812), compact(0)
        ('8.12', '52.4', '1234', '0.0812', '0')
    """
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -6 or magnitude > 9:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - magnitude)}f}"


def times(ratio: float) -> str:
    """How many times a ratio is away from one, in either direction.

    Example:
        >>> times(0.123), times(0.019), times(1.4), times(0.96)
        ('8.1', '53', '1.4', '1.04')
    """
    factor = max(ratio, 1 / ratio) if ratio > 0 else math.inf
    if math.isinf(factor):
        return "∞"
    return f"{factor:.2f}" if factor < 1.1 else f"{factor:.1f}" if factor < 9.95 else f"{factor:.0f}"


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> duration(31.04), duration(118), duration(4000)
        ('31 s', '1 min 58 s', '1 h 06 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def moment(iso: str) -> str:
    """A point in time as a person writes it; text that is not ISO 8601 comes back as it is.

    Example:
        >>> moment("2025-01-05T09:30:00+00:00"), moment("yesterday")
        ('5 January 2025, 09:30 UTC', 'yesterday')
    """
    try:
        when = datetime.fromisoformat(iso)
    except ValueError:
        return iso
    return f"{when.day} {when:%B %Y, %H:%M} {when.tzname() or ''}".strip()


def pretty_limit(limit: str) -> str:
    """A target or floor with proper signs, and a space that no line break can take.

    Example:
        >>> print(pretty_limit("<=0.2x"), pretty_limit(">=-0.01"))
        ≤ 0.2× ≥ −0.01
    """
    shown = re.sub(r"(?<=[0-9.])x$", TIMES, limit.strip())
    return shown.replace("<=", "≤\u00a0").replace(">=", "≥\u00a0").replace("-", MINUS)


@dataclass(frozen=True)
class ScoreStyle:
    """How a score is written: accuracies from 0 to 1 in percent and their changes in points, others as they are.

    Args:
        name: the score's name in the task.
        known: the baseline's scores, as far as there are any; see :meth:`of`.

    Example:
        >>> ScoreStyle("accuracy").value(0.9731), ScoreStyle("accuracy").change(-0.003)
        ('97.3%', '−0.3 points')
        >>> ScoreStyle("r2").value(0.8123), ScoreStyle("r2").change(0.0123)
        ('0.8123', '+0.0123')
        >>> ScoreStyle("accuracy", (97.31,)).value(97.31)
        '97.3100'
    """

    name: str
    known: tuple[float, ...] = ()

    @classmethod
    def of(cls, name: str, baseline: Point | None) -> "ScoreStyle":
        """The style of a score by its name and by what the baseline scored; None where nothing has been scored."""
        scores = () if baseline is None else (baseline.score.val, baseline.score.test)
        return cls(name, tuple(score for score in scores if score is not None))

    @property
    def percent(self) -> bool:
        """Whether the score is a share of right answers: named so, and from 0 to 1 where it is known."""
        words = [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", self.name)]
        return "accuracy" in words and all(0 <= score <= 1 for score in self.known)

    @property
    def title(self) -> str:
        """The name as a label."""
        return self.name[:1].upper() + self.name[1:].replace("_", " ")

    @property
    def worth(self) -> float:
        """How many times larger the shown number is than the stored one."""
        return 100.0 if self.percent else 1.0

    def value(self, score: float) -> str:
        """A score."""
        return f"{100 * score:.1f}%" if self.percent else f"{score:.4f}"

    def interval(self, ends: tuple[float, float]) -> str:
        """A score's interval."""
        low, high = ends
        return f"{100 * low:.1f} to {100 * high:.1f}%" if self.percent else f"{low:.4f} to {high:.4f}"

    def amount(self, difference: float) -> str:
        """The size of a change, without its sign and unit."""
        return f"{abs(100 * difference):.1f}" if self.percent else f"{abs(difference):.4f}"

    def change(self, difference: float) -> str:
        """A change with its sign; a true minus sign, so that it cannot be read as a dash."""
        return f"{self._signed(difference)} points" if self.percent else self._signed(difference)

    def change_interval(self, ends: tuple[float, float]) -> str:
        """The interval of a change."""
        return f"{self._signed(ends[0])} to {self._signed(ends[1])}"

    def _signed(self, difference: float) -> str:
        amount = self.amount(difference)
        zero = float(amount) == 0
        return amount if zero else f"{'+' if difference > 0 else MINUS}{amount}"


def plain_steps(steps: tuple[Step, ...], most: int | None = 4) -> str:
    """Steps in one line; at most ``most`` settings of each are spelled out (None for all).

    Example:
        >>> plain_steps((Step("netwright.compress:Prune", {"ratio": 0.5, "saliency": "taylor"}), Step("int8", {})))
        'Prune(ratio 0.5, saliency taylor) → int8'
        >>> plain_steps(())
        'no steps'
    """
    return " → ".join(_step(step, most) for step in steps) or "no steps"


def _step(step: Step, most: int | None) -> str:
    name = re.split(r"[:.]", step.method)[-1] if re.fullmatch(r"[\w.]+:\w+", step.method) else step.method
    leaves = _leaves(step.settings, most is not None)
    shown = leaves if most is None or len(leaves) <= most else [*leaves[:most], f"… {len(leaves) - most} more"]
    return f"{name}({', '.join(shown)})" if shown else name


def _leaves(settings: Mapping[str, object], brief: bool) -> list[str]:
    leaves: list[str] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            leaves.extend([_range(key, value)] if brief and _is_long(value) else _leaves(value, brief))
        elif value is not None:
            leaves.append(f"{key} {_setting(value)}")
    return leaves


def _is_long(values: Mapping[str, object]) -> bool:
    return len(values) > 3 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values.values())


def _range(key: str, values: Mapping[str, object]) -> str:
    """Many figures under one name, such as a pruning ratio for every group, as their range."""
    figures = [float(value) for value in values.values() if isinstance(value, int | float)]
    return f"{key} {min(figures):.3g} to {max(figures):.3g} in {len(figures)} groups"


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return f"[{', '.join(_setting(entry) for entry in value)}]"
    return str(value)
