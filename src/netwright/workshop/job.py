"""The main job: a task and a target in, a front and a better model out."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from netwright.core.check import check_task
from netwright.core.errors import RunDirectoryError
from netwright.core.graph import Graph, trace
from netwright.core.recipe import Recipe
from netwright.core.rundir import RunDirectory
from netwright.core.task import Task, load_task
from netwright.core.transform import Progress
from netwright.version import __version__
from netwright.workshop.evaluation import Measuring
from netwright.workshop.finish import RESULT
from netwright.workshop.session import Session
from netwright.workshop.target import Keep, Limit

__all__ = ["Job", "prepare", "run_job"]


@dataclass(frozen=True)
class Job:
    """What a run is asked for.

    Args:
        task: a task, or its name as on the command line.
        limits: upper limits on costs; see :func:`netwright.workshop.target.parse_targets`.
        keep: least change of the score.
        budget: seconds for everything, training of the baseline included.
        out: the run directory.
        seed: source of all randomness.
        engine: "local" for processes on this machine, "ray" for a Ray cluster.
        workers: evaluations side by side; by default one for each core.
        evaluations: most candidates to evaluate; by default as many as the budget allows.
        measuring: how latency is measured.
        command: the command line that replays the run, for the report.
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
    command: str = ""

    @property
    def name(self) -> str:
        """How the task is called in files."""
        return self.task if isinstance(self.task, str) else self.task.name


def prepare(job: Job) -> tuple[Task, Graph]:
    """Load and check the task and trace its model; nothing is written.

    Raises:
        NetwrightError: what the user can mend.
    """
    task = load_task(job.task) if isinstance(job.task, str) else job.task
    check_task(task)
    return task, trace(task.build(job.seed), task.example(2))


def run_job(job: Job, *, resume: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Make a network better: search, measure, choose, hand back.

    The baseline is trained (or taken as it came) and measured; its graph gives the space of steps; the
    sampler proposes, workers apply, recover and measure; the most promising candidates are recovered in full; the
    chosen one is measured against the baseline in one process and scored on the test split, once. The run directory
    holds all of it at every moment, and Ctrl-C leaves a valid ``result.json``.

    Args:
        job: what is asked for.
        resume: go on with the run that lies in ``job.out``; a finished one is returned as it is.
        progress: told the finished fraction and what is going on.

    Returns:
        The content of ``result.json``; ``status`` is "met", "not_met" or "interrupted".

    Raises:
        NetwrightError: anything that the user can mend; where it can be seen beforehand, nothing was written.

    Cost: ``budget`` seconds; memory for one copy of the model and the data here and in each worker.
    """
    run = RunDirectory(job.out)
    run.check_old() if resume else run.check_new()
    task, graph = prepare(job)
    with _owned(run, job, task, resume):
        if resume and run.has(RESULT) and (run.read(RESULT))["status"] != "interrupted":
            finished: dict[str, Any] = run.read(RESULT)
            return finished
        session = Session(
            run=run,
            task=task,
            name=job.name,
            graph=graph,
            recipe=task.recipe or Recipe(),
            limits=job.limits,
            keep=job.keep,
            budget=job.budget,
            seed=job.seed,
            engine=job.engine,
            workers=job.workers,
            evaluations=job.evaluations,
            measuring=job.measuring,
            progress=progress or _silent,
        )
        try:
            return session.go()
        except KeyboardInterrupt:
            return session.interrupted()


def _owned(run: RunDirectory, job: Job, task: Task, resume: bool) -> RunDirectory:
    if not resume:
        return run.create(_settings(job, task))
    run.open()
    old = run.settings
    for what, then, now in (("task", old["task"], job.name), ("seed", old["seed"], job.seed)):
        if then != now:
            run.close()
            raise RunDirectoryError(
                f"The run in {job.out} has {what} {then!r}, not {now!r}. Resume it with the same, or start another one."
            )
    run.write("run.json", {**old, **_asked(job)})
    return run


def _settings(job: Job, task: Task) -> dict[str, Any]:
    return {
        "schema": 1,
        "netwright": __version__,
        "task": job.name,
        "description": task.description,
        "score": getattr(task.score or task.evaluate, "__name__", "score"),
        "seed": job.seed,
        "command": job.command,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **_asked(job),
    }


def _asked(job: Job) -> dict[str, Any]:
    """What a resumed run may be asked anew."""
    return {
        "target": {limit.metric: limit.text for limit in job.limits},
        "keep": {"score": job.keep.text},
        "budget_s": job.budget,
        "engine": job.engine,
        "workers": job.workers or 0,
    }


def _silent(fraction: float, what: str) -> None:
    """Tell nobody."""
