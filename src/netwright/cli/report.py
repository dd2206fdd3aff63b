"""``netwright report``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from netwright.cli.app import app
from netwright.report import read_run, write_report
from netwright.report.training_run import is_training, training_state

__all__ = ["report_command"]


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the run's state instead, finished or not.")] = False,
) -> None:
    """Write the report of a run anew, finished or not, and print where it lies."""
    if as_json:
        typer.echo(json.dumps(training_state(run) if is_training(run) else read_run(run).state()))
        return
    typer.echo(str(write_report(run)))
