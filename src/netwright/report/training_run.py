"""A run of ``netwright train``, read from its directory."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netwright.core.records import read_lines
from netwright.report.fields import Fields, load_object

__all__ = ["OWN_FIT", "CurvePoint", "Training", "TrainingRun", "is_training", "read_training", "training_state"]

OWN_FIT = "its own fit"
"""What stands for an optimizer where the task trained by its own ``fit``."""

_REMEDY = "Restore it, or train again in another folder."


@dataclass(frozen=True)
class CurvePoint:
    """One record of a training.

    Args:
        epoch: passes over the data done.
        train_loss: mean since the record before; None where it is not known.
        val_score: at the end of an epoch; None between.
    """

    epoch: float
    train_loss: float | None
    val_score: float | None


@dataclass(frozen=True)
class Training:
    """One training.

    Args:
        entry: its number.
        name: what is compared; "its own fit" where the task trained by that.
        recipe: how it was trained, as JSON.
        curve: its records.
        val: score at the end; None where it diverged.
        test: score on the test set; None where it was not chosen.
        test_interval: 95% interval of ``test``.
        steps: iterations of Netwright's loop; 0 where the task trained by its own fit, None where it diverged.
        seconds: wall time.
        optimizer_bytes: what the optimizer kept between steps.
        leader: whether it is the best of its name.
        error: why it ended early, or None.
    """

    entry: int
    name: str
    recipe: Mapping[str, Any]
    curve: tuple[CurvePoint, ...]
    val: float | None
    test: float | None
    test_interval: tuple[float, float] | None
    steps: int | None
    seconds: float | None
    optimizer_bytes: int | None
    leader: bool
    error: str | None

    @property
    def lr(self) -> float | None:
        """The learning rate of its recipe; None where the task trained by its own fit, which has no use for it."""
        if self.steps == 0:
            return None
        found = self.recipe.get("optimizer_settings", {}).get("lr")
        return float(found) if isinstance(found, int | float) else None


@dataclass(frozen=True)
class TrainingRun:
    """All trainings of a run.

    Args:
        task: its name.
        description: of the task.
        seed: source of weights and batches.
        created: when it began.
        command: that repeats it.
        netwright: version.
        planned: how many trainings there are to be.
        trainings: those that have ended, in their order.
        best: number of the best; None while the run goes on.
        machine: where it ran; empty while it goes on.
    """

    task: str
    description: str
    seed: int
    created: str
    command: str
    netwright: str
    planned: int
    trainings: tuple[Training, ...]
    best: int | None
    machine: Mapping[str, object]


def is_training(path: Path) -> bool:
    """Whether ``path`` holds a run of ``netwright train``."""
    try:
        settings = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and settings.get("kind") == "training"


def read_training(path: Path) -> TrainingRun:
    """The run in ``path``, finished or not.

    Raises:
        CorruptRunError: a file that is missing or damaged.
    """
    settings = load_object(path / "run.json", _REMEDY)
    finished = (path / "training.json").exists()
    if finished:
        result = load_object(path / "training.json", _REMEDY)
        rows = result.inners("trainings")
    else:
        lines = read_lines(path / "trainings.jsonl")[0]
        rows = tuple(Fields(f"trainings.jsonl[{i}]", line, _REMEDY) for i, line in enumerate(lines))
    return TrainingRun(
        task=settings.text("task"),
        description=settings.text("description", ""),
        seed=settings.integer("seed"),
        created=settings.text("created", ""),
        command=settings.text("command", ""),
        netwright=settings.text("netwright"),
        planned=len(settings.inners("entries")),
        trainings=tuple(_training(row) for row in rows),
        best=result.integer("best") if finished else None,
        machine=result.plain("machine") if finished else {},
    )


def training_state(path: Path) -> dict[str, Any]:
    """What the run in ``path`` says as plain data: its ``training.json``, or what is known while it goes on.

    Raises:
        CorruptRunError: a file that is damaged.
    """
    if (path / "training.json").exists():
        return dict(load_object(path / "training.json", _REMEDY).content)
    settings = load_object(path / "run.json", _REMEDY)
    return {
        "schema": 1,
        "netwright": settings.text("netwright"),
        "task": settings.text("task"),
        "seed": settings.integer("seed"),
        "status": "unfinished",
        "trainings": read_lines(path / "trainings.jsonl")[0],
    }


def _training(row: Fields) -> Training:
    steps = row.integer("steps") if row.has("steps") else None
    test = row.inner("test") if row.has("test") else None
    return Training(
        entry=row.integer("entry"),
        name=OWN_FIT if steps == 0 else row.text("name"),
        recipe=row.plain("recipe"),
        curve=tuple(
            CurvePoint(point.number("epoch"), point.maybe_number("train_loss"), point.maybe_number("val_score"))
            for point in row.inners("history")
        ),
        val=row.maybe_number("val"),
        test=None if test is None else test.number("score"),
        test_interval=None if test is None else test.interval("ci95"),
        steps=steps,
        seconds=row.maybe_number("seconds"),
        optimizer_bytes=row.integer("optimizer_bytes") if row.has("optimizer_bytes") else None,
        leader=row.flag("leader"),
        error=row.text("error", "") or None,
    )
