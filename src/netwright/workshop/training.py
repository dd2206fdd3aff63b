"""Trains a task by several recipes and tells which is best: what ``netwright train`` does."""

import copy
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netwright.core.artifact import load_weights, save_weights
from netwright.core.check import check_task
from netwright.core.console import ConsoleProgress
from netwright.core.errors import NonFiniteLossError, RecipeError, RunDirectoryError
from netwright.core.fit import fit
from netwright.core.loop import FitResult, Loop
from netwright.core.machine import machine
from netwright.core.randomness import isolated
from netwright.core.recipe import Recipe
from netwright.core.records import reading
from netwright.core.rundir import RunDirectory
from netwright.core.task import Task
from netwright.version import __version__
from netwright.workshop.final_score import final_score
from netwright.workshop.training_settings import Entry, check_own_fit

__all__ = ["train"]

_LOG = "trainings.jsonl"
_RESULT = "training.json"
_UNCOMPARED = {"command": "", "created": "", "netwright": ""}  # settings that may differ between a run and its resume


def train(
    task: Task,
    name: str,
    entries: Sequence[Entry],
    out: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    console: bool = True,
    command: str = "",
) -> dict[str, Any]:
    """Train ``task`` once for each entry, and hand back the model of the best.

    Every training starts from the same weights and sees the same batches. The best setting of each name is chosen by
    its score on ``val`` at the end; only those are scored on ``test``, once. A training whose loss stops being finite
    is recorded with its cause and the others go on. After an interruption ``resume`` goes on within the training that
    was cut.

    Writes into ``out``: ``training.json`` (the returned content), ``trainings.jsonl`` (one line for each training),
    ``recipe.json`` and ``model.safetensors`` of the best.

    Args:
        task: what to train on.
        name: how the task was named on the command line.
        entries: the trainings.
        out: run directory.
        seed: source of weights and batches.
        resume: go on with the run that lies in ``out``.
        console: show progress on standard error.
        command: the command that repeats the run, for the report.

    Raises:
        RecipeError: no entries, settings that an optimizer refuses, or any for a task that trains by its own ``fit``.
        RunDirectoryError: ``out`` holds something else, or with ``resume`` a run with other entries, or a damaged one.
        NonFiniteLossError: all trainings diverged.

    Example:
        >>> import tempfile
        >>> from netwright.core.task import load_task
        >>> from netwright.workshop import training_entries
        >>> entries = training_entries(Recipe(epochs=0.5), ["sgd", "adamw"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     place = Path(folder) / "run"
        ...     result = train(load_task("breast-cancer"), "breast-cancer", entries, place, console=False)
        >>> [row["name"] for row in result["trainings"]]
        ['sgd', 'adamw']
    """
    if not entries:
        raise RecipeError("There is nothing to train. Give at least one recipe.")
    check_task(task)
    check_own_fit(task, entries)
    for entry in entries:
        _check_recipe(task, entry.recipe)
    run = RunDirectory(out)
    settings = _settings(task, name, entries, seed, command)
    if resume:
        run.check_old()
        if {**run.settings, **_UNCOMPARED} != {**settings, **_UNCOMPARED}:
            raise RunDirectoryError(f"{out} holds a run with other settings. Repeat its own, or give another --out.")
        run.open()
    else:
        run.create(settings)
    with run:
        if run.has(_RESULT):
            _clear(run, len(entries))
            finished: dict[str, Any] = run.read(_RESULT, "trainings", "best")
            return finished
        with reading(run.path / _LOG, "trainings"):
            done = {int(record["entry"]): _checked(record) for record in run.lines(_LOG)}
        for number, entry in enumerate(entries):
            if number not in done:
                label = f"{entry.name} ({number + 1} of {len(entries)})" if len(entries) > 1 else entry.name
                record = _one(task, entry, number, run, seed, label if console else None)
                run.append(_LOG, record)
                (run.path / _checkpoint(number)).unlink(missing_ok=True)  # not before the training is on disk
                done[number] = record
        return _finish(task, run, entries, [done[number] for number in range(len(entries))], seed)


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """A line of the log, which has what is asked of it later."""
    val, name, recipe = record["val"], record["name"], record["recipe"]
    if not (isinstance(name, str) and isinstance(recipe, dict) and (val is None or math.isfinite(val))):
        raise ValueError(f"name, recipe and val cannot be {name!r}, {recipe!r} and {val!r}")
    return {**record, "error": record["error"]}


def _check_recipe(task: Task, recipe: Recipe) -> None:
    """Construct everything that the recipe names, on a model that is thrown away."""
    if task.fit is None:
        with isolated(0):
            Loop(copy.deepcopy(task.build(0)), task, recipe, 0, None, torch.device("cpu"), False, (), [])


def _one(task: Task, entry: Entry, number: int, run: RunDirectory, seed: int, label: str | None) -> dict[str, Any]:
    model = copy.deepcopy(task.build(seed))  # a module that the task was given stays the user's own
    head = {"entry": number, "name": entry.name, "recipe": json.loads(entry.recipe.to_json())}
    checkpoint = run.path / _checkpoint(number)

    def trained(progress: Callable[[float, str], None] | None) -> FitResult:
        return fit(model, task, entry.recipe, seed=seed, checkpoint=checkpoint, progress=progress)

    try:
        if label is None:
            result = trained(None)
        else:
            with ConsoleProgress(label) as bar:
                result = trained(bar.update)
    except NonFiniteLossError as error:
        return {**head, "error": str(error), "val": None, "history": []}
    run.save(_weights(number), lambda path: save_weights(result.model, path))
    history = [{key: _finite(value) for key, value in dataclasses.asdict(record).items()} for record in result.history]
    return {
        **head,
        "error": None,
        "val": result.history[-1].val_score,
        "history": history,
        "steps": result.steps,
        "seconds": result.seconds,
        "optimizer_bytes": result.optimizer_bytes,
    }


def _finish(
    task: Task, run: RunDirectory, entries: Sequence[Entry], records: list[dict[str, Any]], seed: int
) -> dict[str, Any]:
    sound = [record for record in records if record["val"] is not None]
    if not sound:
        raise NonFiniteLossError(f"Every training diverged. The first: {records[0]['error']}")
    names = list(dict.fromkeys(entry.name for entry in entries))
    leaders = {}
    for name in names:
        mine = [record for record in sound if record["name"] == name]
        if mine:
            leaders[name] = max(mine, key=lambda record: record["val"])
    best = max(leaders.values(), key=lambda record: record["val"])
    chosen = {record["entry"] for record in leaders.values()}
    rows = []
    for record in records:
        tested = _test(task, run, record["entry"], seed) if record["entry"] in chosen else None
        rows.append({**record, "leader": record["entry"] in chosen, "test": tested})
    model = _trained(task, run, best["entry"], seed)
    run.save("model.safetensors", lambda path: save_weights(model, path))
    run.write("recipe.json", best["recipe"])
    result = {
        "schema": 1,
        "netwright": __version__,
        "task": task.name,
        "seed": seed,
        "machine": machine(),
        "best": best["entry"],
        "trainings": rows,
    }
    run.write(_RESULT, result)
    _clear(run, len(records))
    return result


def _clear(run: RunDirectory, count: int) -> None:
    for number in range(count):
        for name in (_weights(number), _checkpoint(number)):
            (run.path / name).unlink(missing_ok=True)


def _test(task: Task, run: RunDirectory, number: int, seed: int) -> dict[str, Any]:
    found = final_score(task, _trained(task, run, number, seed))
    return {"score": found.score, "ci95": None if found.interval is None else list(found.interval)}


def _trained(task: Task, run: RunDirectory, number: int, seed: int) -> nn.Module:
    model = copy.deepcopy(task.build(seed))
    load_weights(model, run.path / _weights(number))
    return model.eval()


def _weights(number: int) -> str:
    return f"weights-{number}.safetensors"


def _checkpoint(number: int) -> str:
    return f"checkpoint-{number}.pt"


def _settings(task: Task, name: str, entries: Sequence[Entry], seed: int, command: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "kind": "training",
        "netwright": __version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "task": name,
        "description": task.description,
        "seed": seed,
        "entries": [{"name": entry.name, "recipe": json.loads(entry.recipe.to_json())} for entry in entries],
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
