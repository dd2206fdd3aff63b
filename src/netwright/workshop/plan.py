"""The plan of a run: what may be done to this network on this machine, and how the time is shared out."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from netwright.compress import PruneBranches, fastest_int8
from netwright.core.errors import ArtifactError, NothingToPruneError, TraceError, TransformError
from netwright.core.graph import Graph
from netwright.core.graph.branches import traced_branches, without_branches
from netwright.core.records import reading
from netwright.core.rundir import RunDirectory
from netwright.core.task import Task
from netwright.workshop.baseline import Baseline
from netwright.workshop.evaluation import Measuring
from netwright.workshop.job import Job
from netwright.workshop.quiet import QuietRoom
from netwright.workshop.space import STEPS, Droppable, Space, weight_bits

__all__ = ["Plan", "default_workers", "make_plan", "prunable", "space_of"]

_RECORD = "plan.json"
_FINAL_SHARE = 0.35  # of the time after the baseline goes into full recovery
_CANDIDATES = 32  # evaluations aimed at
_LEAST_SECONDS = 1.5  # of training for one candidate
_HANDLING_SECONDS = 3.5  # of tracing, exporting, scoring and measuring it
_FEWEST_ITEMS, _MOST_ITEMS = 32, 256  # on which branches are ranked
_TARGETS = 4096  # in these items, where that leaves enough of them


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Args:
        space: what may be proposed.
        workers: evaluations side by side.
        started: second of the run at which the search began.
        candidate_seconds: training time of one candidate.
        final_seconds: time kept for full recovery.
        int8_table: what was measured of every pair of operand types.
    """

    space: Space
    workers: int
    started: float
    candidate_seconds: float
    final_seconds: float
    int8_table: Sequence[Mapping[str, Any]]


def default_workers() -> int:
    """One worker for each core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def prunable(graph: Graph) -> tuple[tuple[str, int], ...]:
    """Name and size of every group that has at least two units."""
    return tuple((group.name, group.size) for group in graph.groups if group.size > 1)


def space_of(
    graph: Graph,
    steps: Sequence[str],
    *,
    int8: Mapping[str, Any] | None,
    branches: tuple[Droppable, ...],
    codebooks: bool,
    widths: tuple[int, ...],
    gradients: bool,
) -> Space:
    """The space of a network; of attention heads any number may be kept."""
    heads = frozenset(group.name for group in graph.groups if group.kind == "heads")
    return Space(prunable(graph) if "prune" in steps else (), int8, branches, codebooks, widths, heads, gradients)


def make_plan(
    run: RunDirectory, job: Job, task: Task, baseline: Baseline, graph: Graph, clock: Callable[[], float]
) -> Plan:
    """Choose operand types by measurement, order the branches, share out the time; or read the plan of ``run``.

    Raises:
        NothingToPruneError: a network in which nothing can be pruned and nothing quantized.
        CorruptRunError: a plan that was edited or damaged.
    """
    if not run.has(_RECORD):
        steps = job.steps or STEPS
        sized = any(limit.metric == "size" for limit in job.limits)
        bits = weight_bits(steps, sized)
        settings, table, left_out = _int8(task, baseline, job.measuring) if bits else (None, [], None)
        branches = _branches(task, baseline, graph) if "branches" in steps else ()
        books = "codebooks" in steps and sized
        if not (prunable(graph) and "prune" in steps) and settings is None and not branches and not books:
            raise NothingToPruneError(_nothing(graph))
        elapsed = clock()
        left = max(job.budget - elapsed, 0.0)
        final = _FINAL_SHARE * left
        count = job.workers or default_workers()
        seconds = max(_LEAST_SECONDS, (left - final) * count / _CANDIDATES - _HANDLING_SECONDS)
        run.write(
            _RECORD,
            {
                "steps": list(steps),
                "int8": settings,
                "int8_table": table,
                "int8_left_out": left_out,
                "branches": [asdict(branch) for branch in branches],
                "codebooks": books,
                "widths": list(bits),
                "workers": count,
                "started": elapsed,
                "candidate_seconds": seconds,
                "final_seconds": final,
            },
        )
    record = run.read(
        _RECORD, "steps", "int8", "int8_table", "workers", "started", "candidate_seconds", "final_seconds"
    )
    with reading(run.path / _RECORD, "a plan"):
        return Plan(
            space=space_of(
                graph,
                list(record["steps"]),
                int8=None if record["int8"] is None else dict(record["int8"]),
                branches=tuple(Droppable(each["name"], tuple(each["groups"])) for each in record.get("branches", ())),
                codebooks=bool(record.get("codebooks", False)),
                widths=tuple(map(int, record.get("widths", [8]))),
                gradients=task.loss is not None,
            ),
            workers=job.workers or int(record["workers"]),
            started=float(record["started"]),
            candidate_seconds=float(record["candidate_seconds"]),
            final_seconds=float(record["final_seconds"]),
            int8_table=list(record["int8_table"]),
        )


def _int8(
    task: Task, baseline: Baseline, measuring: Measuring
) -> tuple[dict[str, Any] | None, list[dict[str, Any]], str | None]:
    """Settings of the fastest sound pair of operand types, None where there is none; what was measured; why none."""
    try:
        with QuietRoom().measure():
            found = fastest_int8(baseline.model, task, batch=measuring.batch, threads=measuring.threads)
    except (TransformError, TraceError, ArtifactError) as error:
        return None, [], str(error)
    return asdict(found.settings), [asdict(row) for row in found.table], None


def _branches(task: Task, baseline: Baseline, graph: Graph) -> tuple[Droppable, ...]:
    """The residual branches, the most dispensable first, with the groups that lie within each; none where none are."""
    found = []
    try:
        order = PruneBranches(items=_ranking_items(task)).plan(baseline.model, task, seed=0)
        traced, _ = traced_branches(baseline.model, task.example())
        for name in order:
            left = dict(without_branches(baseline.model, traced, [name]).named_parameters())
            within = [
                group.name for group in graph.groups if not any(place.parameter in left for place in group.places)
            ]
            found.append(Droppable(name, tuple(within)))
    except (NothingToPruneError, TransformError, TraceError):  # no branches, or nothing to rank them by
        return ()
    return tuple(found)


def _ranking_items(task: Task) -> int:
    """Training items on which branches are compared: fewer where each has many targets, as sequences have."""
    target = task.data.train[0][1]
    targets = target.numel() if isinstance(target, Tensor) else 1
    return max(_FEWEST_ITEMS, min(_MOST_ITEMS, _TARGETS // max(targets, 1)))


def _nothing(graph: Graph) -> str:
    stopped = "; ".join(f"{entry.name}: {entry.operation} ({entry.reason})" for entry in graph.blocked[:5])
    return (
        f"Nothing in this network can be pruned or quantized safely. What stood in the way: {stopped or 'no layers'}."
    )
