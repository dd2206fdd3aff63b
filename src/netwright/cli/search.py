"""``netwright search``."""

import json
import shlex
import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import optuna
import typer
from rich.console import Console
from rich.table import Table

from netwright.cli.app import app
from netwright.cli.choices import Engine
from netwright.core.check import check_task
from netwright.core.console import ConsoleProgress
from netwright.core.errors import NetwrightError, SettingError
from netwright.core.task import Task, load_object, load_task
from netwright.report import write_search_report
from netwright.search import METRICS, Elastic, Explored, LINASSampler, SearchSpace, SuperNet, explore
from netwright.workshop import parse_budget

__all__ = ["search_command"]

_SHOWN = 20  # of the front


class SamplerName(StrEnum):
    """What proposes candidates."""

    linas = "linas"
    nsga2 = "nsga2"
    tpe = "tpe"
    random = "random"


@app.command("search")
def search_command(
    task: Annotated[str, typer.Argument(help="A built-in task, file.py:name, or module:name.", show_default=False)],
    space: Annotated[
        str | None,
        typer.Option(
            help="A super-network, file.py:name or module:name: an object with a space and extract(params), or a "
            "function of the task that makes one. Default: the task's network, made elastic and trained.",
            show_default=False,
        ),
    ] = None,
    objective: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(METRICS)}. Default: score and latency_ms.")
    ] = None,
    constraint: Annotated[
        list[str] | None, typer.Option(help="Hard constraint, e.g. latency_ms<=0.2.", show_default=False)
    ] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Candidates to measure in all.")] = 100,
    budget: Annotated[
        str | None,
        typer.Option(help="Time of the search, training aside, e.g. 10m.", show_default=False),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(min=0, help="Training of the super-network. Default: the recipe's.")
    ] = None,
    sampler: Annotated[SamplerName, typer.Option(help="Proposes candidates.")] = SamplerName.linas,
    out: Annotated[Path | None, typer.Option(help="Folder. Default: runs/search-TASK.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what lies in the folder.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Evaluations side by side; they disturb each other.")] = 1,
    engine: Annotated[Engine, typer.Option(help="Processes here, or a Ray cluster.")] = Engine.local,
    seed: Annotated[int, typer.Option(min=0, help="Source of all randomness.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Items in a measured call.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a measured call.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the front as JSON.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Print the space, and end.")] = False,
) -> None:
    """Search sub-networks of one super-network for the front of score against cost, measured here.

    The folder holds the super-network's weights, the log of all evaluations, the front as ONNX files, and a report.
    """
    place = out or Path("runs") / f"search-{task.replace(':', '-').replace('/', '-')}"
    place = place.absolute()  # loading a task may change the working directory
    found = load_task(task)
    net = None if space is None else _given(space, found)
    if dry:
        check_task(found)
        shown = net or SuperNet(found.build(seed), found)
        typer.echo(f"{shown.space.size:.3g} candidates.")
        for name, decision in shown.space.decisions.items():
            typer.echo(f"  {name}: {decision}")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ConsoleProgress(f"search {task}") as progress:
        try:
            result = explore(
                found,
                net,
                objectives=tuple(objective or ("score", "latency_ms")),
                constraints=tuple(constraint or ()),
                evaluations=evaluations,
                budget_s=None if budget is None else parse_budget(budget),
                sampler=_sampler(sampler, None if net is None else net.space, seed),
                epochs=epochs,
                out=place,
                resume=resume,
                seed=seed,
                workers=workers,
                engine=engine.value,
                batch=batch,
                threads=threads,
                progress=progress.update,
            )
        except KeyboardInterrupt:
            if place.exists():
                typer.echo(f"Interrupted. Repeat the command with --resume --out {place} to go on.", err=True)
            raise
    failed = result.result.failed
    if failed and len(failed) == len(result.result.evaluations):
        raise NetwrightError(f"All {len(failed)} candidates failed. The first one: {failed[0].error}")
    if not result.result.front:
        raise NetwrightError(_nothing(result, constraint or ()))
    command = shlex.join(["netwright", *(word for word in sys.argv[1:] if word != "--resume")])
    report = write_search_report(result.result, result.space, place, task=task, files=result.front, command=command)
    if as_json:
        typer.echo(json.dumps(_front(result), indent=2))
        return
    console = Console()
    console.print(_table(result))
    console.print(f"Report: {report}", markup=False, soft_wrap=True)


def _nothing(found: Explored, constraints: Sequence[str]) -> str:
    """Why there is no front, and what helps."""
    measured = len(found.result.evaluations) - len(found.result.failed)
    if not measured:
        return "No candidate was measured within the budget. Give more --budget, and --resume."
    nearest = min((max(entry.violations) for entry in found.result.evaluations if entry.violations), default=0.0)
    return (
        f"None of {measured} measured candidates meets {', '.join(constraints)}; the nearest misses by {nearest:.3g}. "
        "Loosen the constraint in another folder, or give more --evaluations with --resume."
    )


def _given(name: str, task: Task) -> Elastic:
    """The super-network of a user's own."""
    made = load_object(name)
    makes = isinstance(made, type) or (callable(made) and not isinstance(made, Elastic))
    net = made(task) if makes else made
    if not isinstance(net, Elastic) or not isinstance(net.space, SearchSpace):
        raise SettingError(
            f"--space {name} gives a {type(net).__name__}, which is no super-network: it needs an attribute space, a "
            "netwright.search.SearchSpace, and a method extract(params) that returns a module."
        )
    return net


def _sampler(name: SamplerName, space: SearchSpace | None, seed: int) -> optuna.samplers.BaseSampler | None:
    """None is LINAS on whatever space there will be."""
    if name is SamplerName.nsga2:
        return optuna.samplers.NSGAIISampler(seed=seed)
    if name is SamplerName.tpe:
        return optuna.samplers.TPESampler(seed=seed)
    if name is SamplerName.random:
        return optuna.samplers.RandomSampler(seed=seed)
    return None if space is None else LINASSampler(space, seed=seed)


def _front(found: Explored) -> list[dict[str, object]]:
    return [
        {
            "number": entry.number,
            "params": dict(entry.params),
            "metrics": dict(entry.metrics or {}),
            "onnx": str(found.front[entry.number]),
        }
        for entry in found.result.front
    ]


def _table(found: Explored) -> Table:
    objectives = list(found.result.objectives)
    first = objectives[-1]
    table = Table(title=f"{len(found.result.front)} on the front of {len(found.result.evaluations)} measured")
    for name in ("Number", *objectives, "File"):
        table.add_column(name, justify="left" if name == "File" else "right")
    for entry in sorted(found.result.front, key=lambda each: (each.metrics or {})[first])[:_SHOWN]:
        metrics = entry.metrics or {}
        row = [f"{metrics[name]:.4g}" for name in objectives]
        table.add_row(str(entry.number), *row, found.front[entry.number].name)
    return table
