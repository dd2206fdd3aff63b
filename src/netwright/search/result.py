"""What a search measured: evaluations, the front of them, how it grew."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from netwright.core.errors import SettingError
from netwright.core.front import Front, hypervolume

__all__ = ["Direction", "Evaluation", "Limit", "SearchResult"]

Direction: TypeAlias = Literal["maximize", "minimize"]
"""What is wanted of an objective."""
_LIMIT = re.compile(r"\s*([A-Za-z_]\w*)\s*(<=|>=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Limit:
    """A hard constraint on a measured metric, such as ``latency_ms<=5``.

    Args:
        metric: name of a metric that the evaluation returns.
        upper: whether ``bound`` is the largest value allowed; else the smallest.
        bound: in the metric's own unit.

    Example:
        >>> Limit.parse("latency_ms<=5").violation({"latency_ms": 7.0})
        2.0
    """

    metric: str
    upper: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Limit":
        """Read ``METRIC<=NUMBER`` or ``METRIC>=NUMBER``.

        Raises:
            SettingError: it reads otherwise.
        """
        match = _LIMIT.fullmatch(text)
        if match is None:
            raise SettingError(
                f"Constraint {text!r} is not of the form METRIC<=NUMBER or METRIC>=NUMBER, such as 'latency_ms<=5'. "
                "The number has the metric's own unit."
            )
        return cls(match[1], match[2] == "<=", float(match[3]))

    def violation(self, metrics: Mapping[str, float]) -> float:
        """How far the metric lies beyond the bound; at most 0 where the constraint is met."""
        return metrics[self.metric] - self.bound if self.upper else self.bound - metrics[self.metric]

    @property
    def exact(self) -> str:
        """What :meth:`parse` reads, to the last digit."""
        return f"{self.metric}{'<=' if self.upper else '>='}{self.bound!r}"

    def __str__(self) -> str:
        return f"{self.metric}{'<=' if self.upper else '>='}{self.bound:g}"


@dataclass(frozen=True)
class Evaluation:
    """One candidate, evaluated once.

    Attributes:
        number: in the order of proposals.
        params: its decisions.
        metrics: what was measured; None where it failed.
        error: why it failed; None where it did not.
        violations: how far each constraint is broken, at most 0 where it is met; in the order of the constraints.
        seconds: what the evaluation took.
    """

    number: int
    params: Mapping[str, Any]
    metrics: Mapping[str, float] | None
    error: str | None
    violations: tuple[float, ...]
    seconds: float

    @property
    def feasible(self) -> bool:
        """Whether it was measured and meets every constraint."""
        return self.metrics is not None and all(excess <= 0 for excess in self.violations)


@dataclass(frozen=True)
class SearchResult:
    """Everything a search measured.

    Attributes:
        objectives: the direction of each.
        evaluations: in the order in which they ended.
        seconds: wall time of the search, all its parts together where it was resumed.
        proposing_s: of them, what the sampler took.
        exhausted: whether it ended early, since every candidate of the space had been evaluated. A search also ends
            early, and is not exhausted, where the sampler asks to stop before, and where no new candidate turns up
            among 1,000 random ones of a space of more than 100,000 combinations.
    """

    objectives: Mapping[str, Direction]
    evaluations: Sequence[Evaluation]
    seconds: float
    proposing_s: float
    exhausted: bool

    @property
    def front(self) -> Front[Evaluation]:
        """The non-dominated among the measured, feasible candidates."""
        return Front(
            [entry for entry in self.evaluations if entry.feasible],
            [partial(self._value, name) for name in self.objectives],
        )

    @property
    def failed(self) -> tuple[Evaluation, ...]:
        """The evaluations without a result, each with its ``error``."""
        return tuple(entry for entry in self.evaluations if entry.metrics is None)

    def values(self, evaluations: Sequence[Evaluation] | None = None) -> NDArray[np.float64]:
        """Objectives ``(n, m)`` of feasible evaluations, all to be minimized (a maximized one has its sign turned)."""
        chosen = self.evaluations if evaluations is None else evaluations
        rows = [[self._value(name, entry) for name in self.objectives] for entry in chosen if entry.feasible]
        return np.array(rows, dtype=float).reshape(len(rows), len(self.objectives))

    def hypervolumes(self, reference: ArrayLike) -> list[float]:
        """Hypervolume of the front after each evaluation, up to ``reference`` in the signs of :meth:`values`."""
        found: list[float] = []
        kept: list[Evaluation] = []
        for entry in self.evaluations:
            volume = found[-1] if found else 0.0
            if entry.feasible:
                wider = Front([*kept, entry], [partial(self._value, name) for name in self.objectives])
                if entry in wider.points:
                    kept = list(wider)
                    volume = hypervolume(self.values(kept), reference)
            found.append(volume)
        return found

    def _value(self, name: str, entry: Evaluation) -> float:
        assert entry.metrics is not None
        return -entry.metrics[name] if self.objectives[name] == "maximize" else entry.metrics[name]
