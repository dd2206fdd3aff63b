"""A job from a user's words; what a resumed run is not told again stays as it was."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from netwright.core.rundir import RunDirectory
from netwright.core.task import Task
from netwright.workshop.evaluation import Measuring
from netwright.workshop.job import Job, Sampler
from netwright.workshop.resuming import settings_of
from netwright.workshop.space import parse_steps
from netwright.workshop.target import parse_budget, parse_keep, parse_targets

__all__ = ["make_job", "usual_place"]


def make_job(
    task: Task | str,
    target: str | Sequence[str] | None = None,
    *,
    keep: str | None = None,
    budget: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    engine: Literal["local", "ray"] | None = None,
    workers: int | None = None,
    evaluations: int | None = None,
    seed: int | None = None,
    batch: int | None = None,
    threads: int | None = None,
    steps: str | Sequence[str] | None = None,
    sampler: Sampler | None = None,
    command: str = "",
) -> Job:
    """The job that :func:`netwright.optimize` does, by its arguments; None is a default, or what the run had.

    Raises:
        TargetError: words that do not parse.
        RunDirectoryError: ``resume``, where there is no run, or one of another command.

    Example:
        >>> job = make_job("digits", "latency<=0.4x")
        >>> job.keep.change, job.budget, job.seed
        (-0.01, 120.0, 0)
    """
    name = task if isinstance(task, str) else task.name
    place = usual_place(name) if out is None else Path(out)
    had = settings_of(RunDirectory(place)) if resume else {}
    if not target and had:
        target = [f"{metric}{text}" for metric, text in had.get("target", {}).items()]
    if keep is None and had:
        keep = f"score{had.get('keep', {}).get('score', '>=-0.01')}"
    return Job(
        task=task,
        limits=parse_targets([target] if isinstance(target, str) else target or []),
        keep=parse_keep("score>=-0.01" if keep is None else keep),
        budget=float(had.get("budget_s", 120.0)) if budget is None else parse_budget(budget),
        out=place,
        seed=_first(seed, had.get("seed"), 0),
        engine=_first(engine, had.get("engine"), "local"),
        workers=_first(workers, had.get("workers") or None, None),
        evaluations=_first(evaluations, had.get("evaluations"), None),
        measuring=Measuring(batch=_first(batch, had.get("batch"), 1), threads=_first(threads, had.get("threads"), 1)),
        steps=parse_steps(steps),
        sampler=_first(sampler, had.get("sampler"), "linas"),
        command=command,
    )


def usual_place(name: str) -> Path:
    """The run directory of a task where none is given."""
    return Path("runs") / name.replace(":", "-").replace("/", "-")


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
