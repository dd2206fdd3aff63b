"""What a run is asked for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from netwright.core.task import Task
from netwright.workshop.evaluation import Measuring
from netwright.workshop.target import Keep, Limit

__all__ = ["Job", "Sampler"]

Sampler: TypeAlias = Literal["linas", "nsga2"]
"""What proposes the candidates of a run."""


@dataclass(frozen=True)
class Job:
    """What a run is asked for.

    Args:
        task: a task, or its name as on the command line.
        limits: upper limits on costs; see :func:`netwright.workshop.target.parse_targets`.
        keep: least change of the score.
        budget: seconds for everything, training of the baseline included.
        out: the run directory; kept as an absolute path, for loading a task may change the working directory.
        seed: source of all randomness.
        engine: "local" for processes on this machine, "ray" for a Ray cluster.
        workers: evaluations side by side; by default one for each core.
        evaluations: most candidates to evaluate; by default as many as the budget allows.
        measuring: how latency is measured.
        steps: what may be done to the network, by the names in :data:`netwright.workshop.STEPS`; by default all.
        sampler: what proposes candidates: "linas" for evolution on predictors of what was measured, "nsga2" for
            evolution on the measurements themselves.
        command: the command line that replays the run, for the report.
        file: the file that the task's name speaks of, as an absolute path; None where it speaks of none.
    """

    task: Task | str
    limits: tuple[Limit, ...]
    keep: Keep
    budget: float
    out: Path
    seed: int = 0
    engine: Literal["local", "ray"] = "local"
    workers: int | None = None
    evaluations: int | None = None
    measuring: Measuring = field(default_factory=Measuring)
    steps: tuple[str, ...] | None = None
    sampler: Sampler = "linas"
    command: str = ""
    file: str | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", self.out.absolute())
        place = self.task.rpartition(":")[0] if isinstance(self.task, str) else ""
        object.__setattr__(self, "file", str(Path(place).resolve()) if place.endswith(".py") else None)

    @property
    def name(self) -> str:
        """How the task is called in files."""
        return self.task if isinstance(self.task, str) else self.task.name
