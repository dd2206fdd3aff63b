"""Several methods on one task, side by side, measured."""

import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from netwright.compress._comparison import Comparison, Row
from netwright.compress._comparison_baseline import BASELINE, Measuring, bar, make_baseline, zeros
from netwright.core.artifact import save_weights
from netwright.core.check import check_task
from netwright.core.errors import ArtifactError, RunDirectoryError, TransformError
from netwright.core.fit import fit
from netwright.core.machine import machine
from netwright.core.recipe import Recipe
from netwright.core.records import reading
from netwright.core.rundir import RunDirectory
from netwright.core.task import Task
from netwright.core.transform import Chain, Progress, Transform, is_transform
from netwright.core.zeros import is_sparse

__all__ = ["compare", "described"]

_LOG, _RESULT, _PAGE = "compressions.jsonl", "comparison.json", "comparison.html"
_RECOVERY = 0.5  # of the recipe's epochs
_QUANTIZED_RATE = 0.25  # of the learning rate, where low precision is simulated


@dataclasses.dataclass(frozen=True)
class _Work:
    """One comparison in progress."""

    task: Task
    run: RunDirectory
    measuring: Measuring
    model: nn.Module
    epochs: float
    seed: int


def compare(
    task: Task,
    methods: Mapping[str, Transform],
    *,
    out: str | Path | None = None,
    resume: bool = False,
    epochs: float | None = None,
    seed: int = 0,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 1.0,
    console: bool = True,
) -> Comparison:
    """Compress one network by several methods with equal training, and measure what comes of each.

    The network is trained by the task's recipe, unless the task brings it trained. Each method starts from it and may
    spend ``epochs`` of training: a method that trains by itself gets them as its budget, after any other the result
    is trained that long with the network as its teacher, zeros of single weights that it set held (without the
    recipe's parameterization). Then it is exported, scored and timed in turns with the baseline. A method that fails is
    a row with its reason, and the others go on.

    Args:
        task: data, loss, score and network.
        methods: transforms by the name that they have in the table.
        out: folder for ``comparison.json``, ``comparison.html`` and ``NAME.onnx``, ``NAME.pt2`` and
            ``NAME.safetensors`` of the baseline and each method; None keeps nothing.
        resume: go on with the comparison that lies in ``out``; nothing finished is done again.
        epochs: training for each method; None is half of the recipe's.
        seed: source of weights, batches and every method's randomness.
        batch: items in a timed call.
        threads: threads of the runtime.
        seconds: length of one measurement.
        console: show progress on standard error.

    Returns:
        Rows, with a ``table()``, a ``plot()`` and ``save(path)``.

    Raises:
        TransformError: no methods, a name that is no file name, something that is not a transform, or a setting that
            JSON cannot hold.
        RunDirectoryError: ``out`` holds something else, or with ``resume`` another comparison; a file that cannot be
            written there; one of an earlier call that is not as it was written (:class:`CorruptRunError`).
        ArtifactError: a model that cannot be written there, as on a full disk. What is finished stays for ``resume``.
        TaskError: a task that cannot be trained or scored.

    Example:
        >>> from netwright.compress import Prune
        >>> from netwright.core.task import load_task
        >>> task = dataclasses.replace(load_task("breast-cancer"), recipe=Recipe(epochs=2))
        >>> found = compare(task, {"half": Prune(0.5)}, seconds=0.05, console=False)
        >>> [entry.name for entry in found.rows], found.rows[0].error
        (['half'], None)

    Cost: the training of the network once; for each method its own work, ``epochs`` of training, one export and about
    two seconds of timing.
    """
    out = None if out is None else Path(out).absolute()  # data and methods may change the working directory
    _check(methods, epochs, resume, out)
    check_task(task)
    recipe = task.recipe or Recipe()
    spent = _RECOVERY * recipe.epochs if epochs is None else float(epochs)
    settings = {
        "kind": "comparison",
        "task": task.name,
        "items": len(task.data.train),
        "methods": {name: described(method) for name, method in methods.items()},
        "epochs": spent,
        "seed": seed,
        "batch": batch,
        "threads": threads,
        "recipe": json.loads(recipe.to_json()),
    }
    with tempfile.TemporaryDirectory(prefix="netwright-") if out is None else nullcontext(out) as folder:
        run = RunDirectory(Path(folder))
        if resume:
            run.check_old()
            if {"kind": settings["kind"], **run.settings} != json.loads(json.dumps(settings)):
                raise RunDirectoryError(
                    f"{out} holds a comparison with other settings. Repeat its own, or give another folder."
                )
            run.open()
        else:
            run.create(settings)
        with run:
            done = _finished(run)
            measuring = Measuring(task, run, batch, threads, seconds)
            model, baseline = make_baseline(measuring, recipe, seed, console=console)
            work = _Work(task, run, measuring, model, spent, seed)
            for position, (name, method) in enumerate(methods.items(), start=1):
                if name not in done:
                    with bar(f"{name} ({position} of {len(methods)})", console) as progress:
                        done[name] = _row(work, name, method, progress)
                    run.append(_LOG, done[name].to_dict())
            found = Comparison(task.name, baseline, tuple(done[name] for name in methods), seed, machine()["cpu"])
            run.write(_RESULT, json.loads(found.to_json()))
            found.save(run.path / _PAGE)
            return found


def _finished(run: RunDirectory) -> dict[str, Row]:
    """The rows of an earlier call by the name of their method."""
    done = {}
    for number, line in enumerate(run.lines(_LOG), start=1):
        with reading(f"{run.path / _LOG}, entry {number},", "a row of a comparison"):
            done[line["name"]] = Row.from_dict(line)
    return done


def described(method: Transform) -> dict[str, Any]:
    """A transform as plain data: import path and settings; a chain with its steps."""
    path = f"{type(method).__module__}:{type(method).__qualname__}"
    if isinstance(method, Chain):
        return {"method": path, "steps": [described(step) for step in method.steps]}
    settings: dict[str, Any] = {}
    if dataclasses.is_dataclass(method) and not isinstance(method, type):
        settings = dataclasses.asdict(method)
    return {"method": path, "settings": settings}


def _check(methods: Mapping[str, Transform], epochs: float | None, resume: bool, out: object) -> None:
    if not methods:
        raise TransformError("compare() needs at least one method.")
    for name, method in methods.items():
        if not name or name == BASELINE or Path(name).name != name or name.startswith("."):
            raise TransformError(f"compare(): {name!r} cannot be a method's name, for files are named after it.")
        if not is_transform(method):
            raise TransformError(f"compare(): {name!r} must be a transform such as Prune(0.5), got {method!r}.")
        _check_settings(name, method)
    if epochs is not None and not (isinstance(epochs, int | float) and 0 <= epochs < float("inf")):
        raise TransformError(f"compare(): epochs must be a number of at least 0, got {epochs!r}.")
    if resume and out is None:
        raise RunDirectoryError("compare(resume=True) needs the folder of the comparison: give out=.")


def _check_settings(name: str, method: Transform) -> None:
    for step in method.steps if isinstance(method, Chain) else ():
        _check_settings(name, step)
    for field, value in described(method).get("settings", {}).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise TransformError(
                f"compare(): {name!r} cannot be recorded, for {type(method).__name__}.{field} is {value!r}, which JSON "
                "cannot hold. Settings are numbers, words, and lists and dicts of them."
            ) from error


def _row(work: _Work, name: str, method: Transform, progress: Progress) -> Row:
    start = time.perf_counter()
    try:
        model = _compress(work, method, progress)
        took = time.perf_counter() - start
        work.run.save(f"{name}.safetensors", lambda path: save_weights(model, path))
        return dataclasses.replace(work.measuring.row(name, model), seconds=took)
    except RunDirectoryError:  # the folder's fault, not the method's
        raise
    except Exception as error:  # a method of the user's own may raise anything; the others go on
        if isinstance(error, ArtifactError) and isinstance(error.__cause__, OSError):  # a full disk
            raise
        reason = f"{type(error).__name__}: {error}"
    return Row(name, " ".join(reason.split())[:500], seconds=time.perf_counter() - start)


def _compress(work: _Work, method: Transform, progress: Progress) -> nn.Module:
    """Apply the method, and train as long as it has not done so itself."""
    steps: Sequence[Transform] = method.steps if isinstance(method, Chain) else (method,)
    own = any(getattr(step, "trains", False) for step in steps)
    alone = own or work.epochs == 0
    model = method(
        work.model,
        work.task,
        budget=work.epochs if own else 0.0,
        seed=work.seed,
        progress=lambda fraction, what: progress(fraction * (1.0 if alone else 0.3), what),
    )
    if alone:
        return model
    recipe = (work.task.recipe or Recipe()).lasting(work.epochs).replace(keep_zeros=False)
    if is_sparse(model) or zeros(model) > zeros(work.model):  # a parameterization would move zeros
        recipe = recipe.replace(keep_zeros=True, parameterization=None)
    if any(getattr(step, "low_precision", False) for step in steps):
        recipe = recipe.scaled(_QUANTIZED_RATE)
    return fit(
        model,
        work.task,
        recipe,
        seed=work.seed,
        teacher=work.model,
        validate=False,
        progress=lambda fraction, what: progress(0.3 + 0.7 * fraction, what),
    ).model
