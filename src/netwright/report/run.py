"""What a run directory says, as frozen dataclasses: the words of ``result.json`` and its neighbours."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = [
    "COSTS",
    "Cost",
    "Epoch",
    "Evaluation",
    "Latency",
    "LatencyRatio",
    "Layer",
    "Point",
    "Result",
    "Run",
    "Score",
    "ScoreDrop",
    "Settings",
    "Step",
]

Cost = Literal["latency", "size", "memory", "macs", "parameters"]
"""The name of a cost."""

COSTS: tuple[Cost, ...] = ("latency", "size", "memory", "macs", "parameters")
"""The costs of a point, in the order in which the report shows them; lower is better for each."""


@dataclass(frozen=True)
class Step:
    """One transform by name and its settings."""

    method: str
    settings: Mapping[str, object]


@dataclass(frozen=True)
class Score:
    """Score on the validation and the test set; ``test`` is None for points that never saw the test set."""

    val: float
    test: float | None = None
    test_ci95: tuple[float, float] | None = None


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one call: median and the 10th and 90th percentile, and how they were taken."""

    median: float
    p10: float
    p90: float
    batch: int
    threads: int
    runtime: str


@dataclass(frozen=True)
class LatencyRatio:
    """Latency over the baseline's, measured in turns: median, 10th and 90th percentile of the rounds."""

    median: float
    low: float
    high: float
    noisy: bool


@dataclass(frozen=True)
class Point:
    """One network: how it was made, its scores and its measured costs."""

    steps: tuple[Step, ...]
    score: Score
    latency_ms: Latency
    memory_bytes: int
    size_bytes: int
    macs: int
    parameters: int
    latency_ratio: LatencyRatio | None = None

    def share(self, name: Cost, baseline: "Point") -> float:
        """A cost as a share of the baseline's; latency as it was measured in turns with it, where it was."""
        if self == baseline:
            return 1.0
        if name == "latency" and self.latency_ratio is not None:
            return self.latency_ratio.median
        before = baseline.cost(name)
        return self.cost(name) / before if before else 1.0

    def cost(self, name: Cost) -> float:
        """A cost by its name, in milliseconds, bytes or counts."""
        costs: dict[Cost, float] = {
            "latency": self.latency_ms.median,
            "size": float(self.size_bytes),
            "memory": float(self.memory_bytes),
            "macs": float(self.macs),
            "parameters": float(self.parameters),
        }
        return costs[name]


@dataclass(frozen=True)
class ScoreDrop:
    """Test score of the chosen network minus that of the baseline, with its 95% interval."""

    test: float
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class Result:
    """``result.json``: how a run ended. ``raw`` is the file's own content."""

    task: str
    seed: int
    status: Literal["met", "not_met", "interrupted"]
    explanation: str
    target: Mapping[str, str]
    keep: Mapping[str, str]
    machine: Mapping[str, object]
    baseline: Point
    chosen: Point | None
    ratios: Mapping[str, float]
    latency_ratio: LatencyRatio | None
    score_drop: ScoreDrop | None
    front: tuple[Point, ...]
    hypervolume: float | None
    evaluations: int
    failed: int
    wall_s: float
    raw: Mapping[str, object]


@dataclass(frozen=True)
class Settings:
    """``run.json``: what was asked for, and the command that asks for it again."""

    netwright: str
    task: str
    description: str
    score: str
    target: Mapping[str, str]
    keep: Mapping[str, str]
    budget_s: float | None
    seed: int
    engine: str
    workers: int
    command: str
    created: str


@dataclass(frozen=True)
class Evaluation:
    """One line of ``evaluations.jsonl``: a candidate that was tried, measured or failed with a cause."""

    trial: int
    state: Literal["ok", "failed"]
    point: Point | None
    error: str | None
    seconds: float
    finished_s: float


@dataclass(frozen=True)
class Epoch:
    """One entry of a training history."""

    step: int
    epoch: float
    train_loss: float | None
    val_score: float | None
    lr: float | None
    seconds: float | None


@dataclass(frozen=True)
class Layer:
    """One layer before and after; ``chosen_shape`` is None where it was removed."""

    layer: str
    kind: str
    baseline_shape: tuple[int, ...]
    chosen_shape: tuple[int, ...] | None
    baseline_macs: int
    chosen_macs: int
    baseline_parameters: int
    chosen_parameters: int
    precision: str


@dataclass(frozen=True)
class Run:
    """A whole run directory, finished or not.

    ``result`` is None while the run is still going (or was killed before it could write one), and
    ``remarks`` holds one sentence for every part that is absent or was left out.
    """

    path: Path
    settings: Settings
    result: Result | None
    evaluations: tuple[Evaluation, ...]
    history: Mapping[str, tuple[Epoch, ...]]
    layers: tuple[Layer, ...]
    remarks: tuple[str, ...]

    @property
    def baseline(self) -> Point | None:
        """The baseline: from the result, else the first evaluated candidate without steps."""
        if self.result is not None:
            return self.result.baseline
        return next((point for point in self.points if not point.steps), None)

    @property
    def points(self) -> tuple[Point, ...]:
        """Every candidate that was measured, in the order of trials."""
        return tuple(entry.point for entry in self.evaluations if entry.point is not None)

    @property
    def failures(self) -> tuple[Evaluation, ...]:
        """Every candidate that failed."""
        return tuple(entry for entry in self.evaluations if entry.state == "failed")

    def state(self) -> dict[str, object]:
        """The run's state as plain data for ``netwright report --json``.

        A finished run gives ``result.json`` as it stands; an unfinished one the same settings with
        the status ``"unfinished"`` and what is known so far. Both carry ``remarks``.
        """
        if self.result is not None:
            return {**self.result.raw, "remarks": list(self.remarks)}
        return {
            "schema": 1,
            "netwright": self.settings.netwright,
            "task": self.settings.task,
            "seed": self.settings.seed,
            "status": "unfinished",
            "explanation": "There is no result.json yet: the run is still going, or was killed.",
            "target": dict(self.settings.target),
            "keep": dict(self.settings.keep),
            "evaluations": len(self.evaluations),
            "failed": len(self.failures),
            "wall_s": max((entry.finished_s for entry in self.evaluations), default=0.0),
            "command": self.settings.command,
            "remarks": list(self.remarks),
        }
