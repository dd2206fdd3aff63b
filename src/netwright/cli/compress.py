"""``netwright compress``."""

import difflib
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import netwright.compress as wing
from netwright.cli.app import app
from netwright.compress import compare, described
from netwright.core.errors import TransformError
from netwright.core.recipe import resolve
from netwright.core.task import load_task
from netwright.core.transform import Transform, is_transform

__all__ = ["compress_command"]


@app.command("compress")
def compress_command(
    task: Annotated[str, typer.Argument(help="A built-in task, file.py:name, or module:name.", show_default=False)],
    method: Annotated[
        list[str],
        typer.Option(help="A class of netwright.compress, or module:name; several are compared.", show_default=False),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value, e.g. ratios=0.5; with several methods NAME.key=value."),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(min=0, help="Training for each method. Default: half of the recipe's.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for what comes of it. Default: runs/compress-TASK.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what lies in the folder.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Source of weights, batches and the methods' randomness.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Items in a measured call.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a measured call.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Print the methods with their settings, and end.")] = False,
) -> None:
    """Compress a network by one method, or by several side by side, and measure what comes of it.

    The network is trained by the task's recipe unless it comes trained. Every method starts from it and has the same
    epochs of training. Models, a table and a figure lie in the folder.
    """
    place = out or Path("runs") / f"compress-{task.replace(':', '-').replace('/', '-')}"
    place = place.absolute()  # loading a task may change the working directory
    found = load_task(task)
    methods = _methods(method, settings or [])
    if dry:
        typer.echo(json.dumps({name: described(made) for name, made in methods.items()}, indent=2))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = compare(
            found, methods, out=place, resume=resume, epochs=epochs, seed=seed, batch=batch, threads=threads
        )
    except KeyboardInterrupt:
        if place.exists():
            typer.echo(f"Interrupted. Repeat the command with --resume --out {place} to go on.", err=True)
        raise
    typer.echo(result.to_json() if as_json else result.table())
    if not as_json:
        typer.echo(f"Models: {place}. Figure: {place / 'comparison.html'}")
    if all(row.error for row in result.rows):
        raise TransformError(result.rows[0].error or "")


def _methods(names: Sequence[str], changes: Sequence[str]) -> dict[str, Transform]:
    """Every named method with its settings."""
    chosen: dict[str, dict[str, Any]] = {name: {} for name in names}
    if len(chosen) < len(names):
        raise TransformError("--method names one method twice. Compare its settings with netwright.compress.compare.")
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key.strip():
            raise TransformError(f"{change!r} is not a setting. Write key=value, for example --set ratios=0.5.")
        owner, dot, setting = key.strip().rpartition(".")
        if not dot and len(chosen) > 1:
            raise TransformError(f"--set {change}: whose? Write {names[0]}.{change}")
        owner = owner if dot else names[0]
        if owner not in chosen:
            raise TransformError(f"--set {change}: {owner!r} is not among the methods {', '.join(names)}.")
        chosen[owner][setting] = _value(text.strip())
    short = [name.rpartition(":")[2] for name in chosen]
    labels = [
        label if short.count(label) == 1 else name.replace(":", ".") for label, name in zip(short, chosen, strict=True)
    ]
    return {label: _made(name, settings) for label, (name, settings) in zip(labels, chosen.items(), strict=True)}


def _made(name: str, settings: dict[str, Any]) -> Transform:
    if ":" in name:
        kind = resolve(name)
    else:
        known = [word for word in wing.__all__ if isinstance(getattr(wing, word), type) and word[0].isupper()]
        known = [word for word in known if issubclass(getattr(wing, word), Transform)]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {close[0]}?" if close else f"Known are {', '.join(known)}."
            raise TransformError(f"netwright.compress has no method {name!r}. {hint}")
        kind = getattr(wing, name)
    try:
        made = kind(**settings)
    except TypeError as error:
        raise TransformError(f"{name} refuses the settings {settings}: {error}.") from error
    if not is_transform(made):
        raise TransformError(f"{name} is not a transform: it cannot be called with a model and a task.")
    transform: Transform = made
    return transform


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"none": None, "true": True, "false": False}.get(text.lower(), text)
