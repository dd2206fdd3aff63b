"""The commands, and how errors end them."""

import sys

import typer
from rich.console import Console

from netwright.core.errors import NetwrightError
from netwright.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="netwright",
    help="Makes PyTorch networks faster and smaller, measured on your own hardware.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and end.")) -> None:
    if version:
        typer.echo(f"netwright {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line: 0 done, 2 a user error, 3 a target not met, 130 interrupted."""
    from netwright.cli import commands  # importing it registers the commands

    assert commands.app is app
    try:
        app()
    except NetwrightError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]Error:[/] {_plain(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
