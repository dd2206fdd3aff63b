"""The command line: thin, without logic of its own."""

from netwright.cli.main import main

__all__ = ["main"]
