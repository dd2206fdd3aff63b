"""``netwright replay``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from netwright.cli.app import app
from netwright.core.console import ConsoleProgress
from netwright.workshop import replay

__all__ = ["replay_command"]


@app.command("replay")
def replay_command(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run, or its recipe.json.", show_default=False)],
    out: Annotated[Path, typer.Option(help="A new folder for the model files.", show_default=False)],
    task: Annotated[
        str | None,
        typer.Option(help="The task, as for optimize. Default: the recipe's own.", show_default=False),
    ] = None,
) -> None:
    """Make the chosen model of a run again: train, compress and recover, without the search."""
    with ConsoleProgress("replay") as progress:
        point = replay(run, out, task=task, progress=progress.update)
    score = f", validation score {point['score']['val']:.4f}" if "score" in point else ""
    Console().print(f"{out / 'model.onnx'}{score}", markup=False, soft_wrap=True)
