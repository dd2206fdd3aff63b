"""The main job: a task and a target in, a front and a better model out."""

import time
from typing import Any

from torch import nn

from netwright.compress import Int8
from netwright.core.check import check_task
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.graph import Graph, trace
from netwright.core.ray_cluster import import_ray
from netwright.core.rundir import MARK, RunDirectory
from netwright.core.task import Task, load_task
from netwright.core.transform import Progress
from netwright.version import __version__
from netwright.workshop.finish import RESULT
from netwright.workshop.job import Job
from netwright.workshop.pace import check_pace
from netwright.workshop.plan import prunable
from netwright.workshop.rehearsal import rehearse
from netwright.workshop.resuming import KIND, asked, check_same, is_finished, measured
from netwright.workshop.session import Session
from netwright.workshop.space import check_steps

__all__ = ["prepare", "run_job"]


def prepare(job: Job) -> tuple[Task, Graph]:
    """Load and check the task and trace its model; nothing is written.

    Raises:
        NetwrightError: what the user can mend.
    """
    check_steps(job.steps, any(limit.metric == "size" for limit in job.limits))
    if job.engine == "ray":
        import_ray()
    task = load_task(job.task) if isinstance(job.task, str) else job.task
    check_task(task)
    model = task.build(job.seed)
    graph = trace(model, task.example(2))
    if not prunable(graph):
        _check_quantizable(model, task, graph)
    if not task.trained:
        rehearse(model, task)
    return task, graph


def _check_quantizable(model: nn.Module, task: Task, graph: Graph) -> None:
    """Where nothing can be pruned, see before any training whether at least a lower precision is open."""
    try:
        Int8(calibration_items=8)(model, task)
    except TransformError as error:
        stopped = "; ".join(f"{entry.name}: {entry.operation} ({entry.reason})" for entry in graph.blocked[:5])
        raise NothingToPruneError(
            f"Nothing in this network can be pruned or quantized. Pruning: {stopped or 'no layers with units'}. {error}"
        ) from error


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
    began = time.perf_counter()
    run = RunDirectory(job.out)
    check_same(run, job) if resume else run.check_new()
    task, graph = prepare(job)
    if not resume:
        check_pace(task, job.budget, job.seed)
    with _owned(run, job, task, resume):
        if resume and is_finished(run):
            finished: dict[str, Any] = run.read(RESULT)
            return finished
        session = Session(run, job, task, graph, progress or _silent, began)
        try:
            return session.go()
        except KeyboardInterrupt:
            return session.interrupted()


def _owned(run: RunDirectory, job: Job, task: Task, resume: bool) -> RunDirectory:
    if not resume:
        return run.create(_settings(job, task))
    run.open()
    try:
        if not is_finished(run):
            run.write(MARK, {**run.settings, **asked(job)})
    except BaseException:
        run.close()
        raise
    return run


def _settings(job: Job, task: Task) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": KIND,
        "netwright": __version__,
        "task": job.name,
        "task_file": job.file,
        "description": task.description,
        "score": _score_name(task),
        "seed": job.seed,
        "command": job.command,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **measured(job),
        **asked(job),
    }


def _score_name(task: Task) -> str:
    """How the score is called, where its function has a name that says so."""
    name = "score" if task.evaluate is not None else getattr(task.score, "__name__", "score")
    return name if name.isidentifier() else "score"  # a lambda is called <lambda>


def _silent(fraction: float, what: str) -> None:
    """Tell nobody."""
