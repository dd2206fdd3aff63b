"""The command line's root."""

import typer

from netwright.version import __version__

__all__ = ["app"]

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
