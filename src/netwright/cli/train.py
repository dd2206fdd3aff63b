"""``netwright train``."""

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from netwright.cli.app import app
from netwright.core.errors import RecipeError
from netwright.core.recipe import Recipe
from netwright.core.task import load_task
from netwright.report import write_report
from netwright.report.training_run import OWN_FIT
from netwright.workshop import check_own_fit, train, training_entries

__all__ = ["train_command"]


@app.command("train")
def train_command(
    task: Annotated[str, typer.Argument(help="A built-in task, file.py:name, or module:name.", show_default=False)],
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe (JSON). Default: the task's own.", show_default=False)
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value, e.g. optimizer=lion, lr=3e-4, epochs=3, optimizer.betas=[0.9,0.99]."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="Optimizers to compare, e.g. sgd,adamw,lion.", show_default=False)
    ] = None,
    lrs: Annotated[
        str | None,
        typer.Option(
            help="Learning rates to try for each, e.g. 1e-3,3e-3; the best on val is shown.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory. Default: runs/train-TASK.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run directory.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Source of weights and batches.")] = 0,
    dry: Annotated[bool, typer.Option("--dry-run", help="Print the recipes, and end.")] = False,
) -> None:
    """Train a network by a recipe, or by several optimizers side by side, and draw the curves.

    Every training starts from the same weights and sees the same batches. Settings are chosen on the validation set;
    the test set is read once for each optimizer.
    """
    place = out or Path("runs") / f"train-{task.replace(':', '-').replace('/', '-')}"
    place = place.absolute()  # loading a task may change the working directory
    given = None if recipe is None else _recipe(recipe)
    found = load_task(task)
    base = given or found.recipe or Recipe()
    names = None if compare is None else [name.strip() for name in compare.split(",") if name.strip()]
    entries = training_entries(base, names, _numbers(lrs), changes or [])
    check_own_fit(found, entries)
    if dry:
        shown = [{"name": entry.name, **json.loads(entry.recipe.to_json())} for entry in entries]
        typer.echo(json.dumps(shown, indent=2))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    command = shlex.join(["netwright", *(word for word in sys.argv[1:] if word != "--resume")])
    try:
        result = train(found, task, entries, place, seed=seed, resume=resume, command=command)
    except KeyboardInterrupt:
        if place.exists():
            typer.echo(f"Interrupted. Go on with: {command} --resume", err=True)
        raise
    report = write_report(place)
    console = Console()
    console.print(_table(result))
    console.print(f"Model: {place / 'model.safetensors'}. Report: {report}", markup=False, soft_wrap=True)


def _recipe(path: Path) -> Recipe:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}.") from error
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None  # which from_json words
    if isinstance(found, dict) and isinstance(found.get("training"), dict):  # the recipe.json of netwright optimize
        text = json.dumps(found["training"])
    return Recipe.from_json(text)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(f"--lrs must be numbers with commas between, for example 1e-3,3e-3; got {text!r}.") from error


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['task']}, seed {result['seed']}", title_justify="left")
    for title in ("Optimizer", "lr", "Last loss", "Val", "Test", "Time", "State"):
        table.add_column(title, justify="left" if title == "Optimizer" else "right")
    for row in result["trainings"]:
        if row["error"] is not None:
            table.add_row(row["name"], _lr(row), "diverged")
            continue
        test, own = row["test"], row["steps"] == 0
        table.add_row(
            OWN_FIT if own else row["name"],
            "" if own else _lr(row),
            _shown(row["history"][-1]["train_loss"]),
            _shown(row["val"]),
            "" if not test else _shown(test["score"]),
            f"{row['seconds']:.1f} s",
            "" if own else f"{row['optimizer_bytes'] / 1e6:.3g} MB",
            style="bold" if row["entry"] == result["best"] else "",
        )
    return table


def _lr(row: dict[str, Any]) -> str:
    return _shown(row["recipe"]["optimizer_settings"].get("lr"))


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
