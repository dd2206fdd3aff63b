"""The command line: thin, without logic of its own."""

from netwright.cli.app import main

__all__ = ["main"]
