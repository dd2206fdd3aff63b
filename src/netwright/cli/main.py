"""How the command line starts, and how errors end it."""

import sys

from rich.console import Console

from netwright.cli import compress, doctor, measure, methods, optimize, replay, report, search, train
from netwright.cli.app import app
from netwright.core.errors import NetwrightError

__all__ = ["COMMANDS", "main"]

COMMANDS = (compress, doctor, measure, methods, optimize, replay, report, search, train)
"""The modules whose import registers the commands."""


def main() -> None:
    """Run the command line: 0 done, 2 a user error, 3 a target not met, 130 interrupted."""
    try:
        app()
    except NetwrightError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]Error:[/] {_plain(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
