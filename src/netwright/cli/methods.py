"""``netwright methods``."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from netwright import catalog
from netwright.cli.app import app

__all__ = ["methods_command"]


@app.command("methods")
def methods_command(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List every method: the steps that optimize may take, and the papers whose claims hold."""
    steps, rows = catalog.steps(), catalog.load()
    if as_json:
        typer.echo(json.dumps({"steps": [asdict(step) for step in steps], "methods": [asdict(row) for row in rows]}))
        return
    console = Console()
    table = Table(title="Steps of netwright optimize", title_justify="left")
    table.add_column("object")
    table.add_column("what it does")
    for step in steps:
        table.add_row(step.object, step.summary)
    console.print(table)
    if rows:
        papers = Table(title="Methods of papers, each with a claim that holds", title_justify="left")
        for name in ("paper", "wing", "object", "title"):
            papers.add_column(name)
        for row in rows:
            papers.add_row(str(row.paper), row.wing, row.object, row.title)
        console.print(papers)
