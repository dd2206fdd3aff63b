"""The main job as one function: what ``netwright optimize`` does, from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from netwright.core.console import ConsoleProgress
from netwright.core.task import Task
from netwright.report import write_report
from netwright.workshop import Sampler, make_job, run_job

__all__ = ["optimize"]


def optimize(
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
) -> dict[str, Any]:
    """Make a network faster and smaller: a task and a target in, a front, a model and a report out.

    Trains the baseline (or takes a trained one), searches pruning of units and branches, quantization and codebooks,
    with every candidate measured on this machine, recovers the best in full, and writes to ``out``: ``result.json``,
    ``report.html``, ``model.onnx``, ``model.pt2``, ``model.safetensors``, ``recipe.json``. The model files load
    without Netwright. For example::

        result = netwright.optimize("digits", "latency<=0.4x", keep="score>=-0.01", budget="2m", out="runs/demo")
        print(result["status"], result["ratios"]["latency"])

    Args:
        task: a :class:`netwright.Task`, or a name as on the command line.
        target: upper limits such as ``"latency<=0.4x"`` or ``"size<=200KB"``; see
            :func:`netwright.workshop.parse_targets`. Only a run that is resumed has one already.
        keep: least change of the score, in its own points; by default ``"score>=-0.01"``.
        budget: time for everything, such as ``"10m"``; by default ``"120s"``.
        out: run directory; by default ``runs/NAME``.
        resume: go on with the run that lies there; what is left out stays as it was.
        engine: "local" (the default) for worker processes on this machine, "ray" for a Ray cluster.
        workers: evaluations side by side; by default one for each core.
        evaluations: most candidates to evaluate; by default as many as the budget allows.
        seed: source of all randomness; by default 0.
        batch: items in a measured call; by default 1.
        threads: threads of a measured call; by default 1.
        steps: what may be done to the network, such as ``"prune,int8"``; by default everything in
            :data:`netwright.workshop.STEPS`.
        sampler: what proposes candidates: "linas" (the default) for evolution on predictors of what was measured,
            "nsga2" for evolution on the measurements themselves.
        command: the command that repeats the run, for the report.

    Returns:
        The content of ``result.json``: ``status`` is "met", "not_met" or "interrupted"; ``chosen`` is the model
        handed back, None where that is the baseline.

    Raises:
        NetwrightError: what the caller can mend; where it can be seen beforehand, nothing was written.
    """
    job = make_job(
        task,
        target,
        keep=keep,
        budget=budget,
        out=out,
        resume=resume,
        engine=engine,
        workers=workers,
        evaluations=evaluations,
        seed=seed,
        batch=batch,
        threads=threads,
        steps=steps,
        sampler=sampler,
        command=command,
    )
    with ConsoleProgress(f"optimize {job.name}") as progress:
        result = run_job(job, resume=resume, progress=progress.update)
    if result["status"] != "interrupted":
        write_report(job.out)
    return result
