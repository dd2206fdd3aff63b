"""A candidate with its scores and costs, as ``result.json`` writes it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from netwright.core.cost import Cost, Ratio
from netwright.core.errors import TransformError
from netwright.core.recipe import resolve
from netwright.core.transform import Transform
from netwright.workshop.target import METRICS, metric_of

__all__ = ["Point", "Step", "key", "ratios"]


@dataclass(frozen=True)
class Step:
    """One transform by name, with its settings.

    Args:
        method: import path of a transform, such as ``netwright.compress:Prune``.
        settings: its keyword arguments, plain data.
    """

    method: str
    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As files have it."""
        return {"method": self.method, "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Step":
        """The step that :meth:`to_dict` wrote.

        Raises:
            KeyError, TypeError: data that is no step; see :func:`netwright.core.records.reading`.
        """
        method, settings = data["method"], data["settings"]
        if not (isinstance(method, str) and isinstance(settings, Mapping)):
            raise TypeError(f"a step has a method and settings, got {method!r} and {settings!r}")
        return cls(method, settings)

    def build(self) -> Transform:
        """The transform itself.

        Raises:
            TransformError: a name that leads to anything else, which is not called then.
        """
        kind: Any = resolve(self.method)
        called = any("__call__" in vars(base) for base in kind.__mro__) if isinstance(kind, type) else False
        if not (called and hasattr(kind, "__dataclass_fields__")):
            raise TransformError(f"{self.method} is not a transform: a class whose objects take a model and a task.")
        made: Transform = kind(**self.settings)
        return made


@dataclass(frozen=True)
class Point:
    """A list of steps with its scores and costs.

    Args:
        steps: the steps, in order; empty for the baseline.
        val: score on the validation split.
        cost: what it costs on this machine.
        latency_ratio: latency as a share of the baseline's, measured interleaved with it; None for the
            baseline itself.
        test: score on the test split, read once and only for points that are reported.
        test_ci95: its 95% bootstrap interval.
    """

    steps: tuple[Step, ...]
    val: float
    cost: Cost
    latency_ratio: Ratio | None = None
    test: float | None = None
    test_ci95: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The POINT of ``result.json``."""
        ratio = None if self.latency_ratio is None else asdict(self.latency_ratio)
        return {
            "steps": [step.to_dict() for step in self.steps],
            "score": {
                "val": self.val,
                "test": self.test,
                "test_ci95": None if self.test_ci95 is None else list(self.test_ci95),
            },
            **self.cost.to_dict(),
            "latency_ratio": ratio,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Point":
        """The point that :meth:`to_dict` wrote.

        Raises:
            KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError: data that is no point; see
                :func:`netwright.core.records.reading`.
        """
        score, ratio = data["score"], data.get("latency_ratio")
        interval = score["test_ci95"]
        found = cls(
            steps=tuple(map(Step.from_dict, data["steps"])),
            val=score["val"],
            cost=Cost.from_dict(data),
            latency_ratio=None if ratio is None else Ratio(**ratio),
            test=score["test"],
            test_ci95=None if interval is None else (interval[0], interval[1]),
        )
        shares = [] if ratio is None else [ratio["median"], ratio["low"], ratio["high"]]
        tested = [] if found.test is None else [found.test]
        costs = [metric_of(found.cost, name) for name in METRICS]
        if not all(map(math.isfinite, (found.val, *costs, *shares, *tested, *(found.test_ci95 or ())))):
            raise ValueError("a score or a cost is not finite")
        return found


def ratios(point: Point, baseline: Point) -> dict[str, float]:
    """Every metric of ``point`` as a share of the baseline's; latency as it was measured interleaved."""
    shares = {name: _share(metric_of(point.cost, name), metric_of(baseline.cost, name)) for name in METRICS}
    if point.latency_ratio is not None:
        shares["latency"] = point.latency_ratio.median
    return shares


def key(steps: Sequence[Step]) -> str:
    """A text that is equal for equal lists of steps."""
    return json.dumps([[step.method, dict(step.settings)] for step in steps], sort_keys=True)


def _share(value: float, reference: float) -> float:
    return value / reference if reference else 1.0
