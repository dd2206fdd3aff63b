"""``netwright optimize``."""

import shlex
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from netwright.cli.app import app
from netwright.cli.choices import Engine
from netwright.face import optimize
from netwright.report import read_run, summary_table
from netwright.workshop import STEPS, dry_run, make_job, usual_place

__all__ = ["optimize_command"]


class SamplerName(StrEnum):
    """What proposes candidates."""

    linas = "linas"
    nsga2 = "nsga2"


@app.command("optimize")
def optimize_command(
    task: Annotated[str, typer.Argument(help="A built-in task, file.py:name, or module:name.", show_default=False)],
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Upper limit: latency, memory, size, macs or parameters. E.g. latency<=0.4x, size<=200KB. A run that "
            "goes on has one already.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="Least change of the score, in its own points. Default: score>=-0.01.", show_default=False),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Time for everything, e.g. 120s, 10m, 2h. Default: 120s.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/TASK.", show_default=False)] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in the run directory. What is left out stays as it was."),
    ] = False,
    engine: Annotated[
        Engine | None,
        typer.Option(help="Worker processes here, or a Ray cluster. Default: local.", show_default=False),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Evaluations side by side. Default: one a core.")] = None,
    evaluations: Annotated[int | None, typer.Option(min=1, help="Most candidates. Default: what time allows.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Source of all randomness. Default: 0.", show_default=False)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Items in a measured call. Default: 1.", show_default=False)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of a measured call. Default: 1.", show_default=False)
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help=f"What may be done, of {', '.join(STEPS)}. Default: all.", show_default=False)
    ] = None,
    sampler: Annotated[
        SamplerName | None,
        typer.Option(
            help="Proposes candidates: evolution on predictors, or on what was measured. Default: linas.",
            show_default=False,
        ),
    ] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its time, and end.")] = False,
) -> None:
    """Make a network faster and smaller, and hand back a front, a model and a report.

    Ends with 0 when the target was met, 3 when it was not (the best found is there), 2 for a mistake in
    what was asked, 130 when interrupted.
    """
    if not target and not resume:
        raise typer.BadParameter("say what is wanted, such as latency<=0.4x", param_hint="--target")
    place = (usual_place(task) if out is None else out).absolute()  # loading a task may change the working directory
    console = Console()
    asked: dict[str, Any] = {
        "keep": keep,
        "budget": budget,
        "out": place,
        "resume": resume,
        "engine": engine and engine.value,
        "workers": workers,
        "evaluations": evaluations,
        "seed": seed,
        "batch": batch,
        "threads": threads,
        "steps": steps,
        "sampler": sampler and sampler.value,
    }
    if dry:
        for line in dry_run(make_job(task, target, **asked), resume=resume):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended politely, it leaves a valid result too
    words = [word for word in sys.argv[1:] if word != "--resume"]
    result = optimize(task, target, **asked, command=shlex.join(["netwright", *words]))
    if result["status"] == "interrupted":
        console.print(result["explanation"], markup=False, soft_wrap=True)
        raise typer.Exit(130)
    console.print(summary_table(result, read_run(place).settings.score))
    console.print(result["explanation"], markup=False, soft_wrap=True)
    console.print(f"Report: {place / 'report.html'}", markup=False, soft_wrap=True)
    raise typer.Exit(0 if result["status"] == "met" else 3)
