"""The main job as one function: what ``netwright optimize`` does, from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from netwright.core.console import ConsoleProgress
from netwright.core.task import Task
from netwright.report import write_report
from netwright.workshop import Job, Measuring, Sampler, parse_budget, parse_keep, parse_steps, parse_targets, run_job

__all__ = ["optimize"]


def optimize(
    task: Task | str,
    target: str | Sequence[str],
    *,
    keep: str = "score>=-0.01",
    budget: str = "120s",
    out: str | Path | None = None,
    resume: bool = False,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    evaluations: int | None = None,
    seed: int = 0,
    batch: int = 1,
    threads: int = 1,
    steps: str | Sequence[str] | None = None,
    sampler: Sampler = "linas",
    command: str = "",
) -> dict[str, Any]:
    """Make a network faster and smaller: a task and a target in, a front, a model and a report out.

    Trains the baseline (or takes a trained one), searches pruning of units and branches, quantization and codebooks,
    with every candidate measured on this machine, recovers the best in full, and writes to ``out``: ``result.json``,
    ``report.html``, ``model.onnx``, ``model.pt2``, ``model.safetensors``, ``recipe.json``. The model files load
    without Netwright.

    Args:
        task: a :class:`netwright.Task`, or a name as on the command line.
        target: upper limits such as ``"latency<=0.4x"`` or ``"size<=200KB"``; see
            :func:`netwright.workshop.parse_targets`.
        keep: least change of the score, in its own points.
        budget: time for everything, such as ``"120s"`` or ``"10m"``.
        out: run directory; by default ``runs/NAME``.
        resume: go on with the run that lies there.
        engine: "local" for worker processes on this machine, "ray" for a Ray cluster.
        workers: evaluations side by side; by default one for each core.
        evaluations: most candidates to evaluate; by default as many as the budget allows.
        seed: source of all randomness.
        batch: items in a measured call.
        threads: threads of a measured call.
        steps: what may be done to the network, such as ``"prune,int8"``; by default everything in
            :data:`netwright.workshop.STEPS`.
        sampler: what proposes candidates: "linas" for evolution on predictors of what was measured, "nsga2" for
            evolution on the measurements themselves.
        command: the command that repeats the run, for the report.

    Returns:
        The content of ``result.json``: ``status`` is "met", "not_met" or "interrupted"; ``chosen`` is the model
        handed back, None where that is the baseline.

    Raises:
        NetwrightError: what the caller can mend; where it can be seen beforehand, nothing was written.
    """
    name = task if isinstance(task, str) else task.name
    job = Job(
        task=task,
        limits=parse_targets([target] if isinstance(target, str) else target),
        keep=parse_keep(keep),
        budget=parse_budget(budget),
        out=Path(out) if out is not None else Path("runs") / name.replace(":", "-").replace("/", "-"),
        seed=seed,
        engine=engine,
        workers=workers,
        evaluations=evaluations,
        measuring=Measuring(batch=batch, threads=threads),
        steps=parse_steps(steps),
        sampler=sampler,
        command=command,
    )
    with ConsoleProgress(f"optimize {name}") as progress:
        result = run_job(job, resume=resume, progress=progress.update)
    if result["status"] != "interrupted":
        write_report(job.out)
    return result
