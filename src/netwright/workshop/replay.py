"""Make a chosen model again from its ``recipe.json``: training, steps and recovery, without the search."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from netwright.core.artifact import save_program, save_weights
from netwright.core.errors import CorruptRunError, NetwrightError, TaskError
from netwright.core.fit import fit
from netwright.core.onnx_export import export_onnx
from netwright.core.recipe import Recipe
from netwright.core.records import read_json, reading
from netwright.core.rundir import RunDirectory
from netwright.core.task import Task, load_task
from netwright.core.transform import Progress
from netwright.workshop.baseline import make_teacher
from netwright.workshop.evaluation import Evaluator, Measuring, Request, Subject, rebuild
from netwright.workshop.point import Step

__all__ = ["replay"]

_FIELDS = ("task", "seed", "training", "steps", "recovery", "imitates")


def replay(
    recipe: Path, out: Path, *, task: Task | str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Train, compress and recover as ``recipe`` says, and write the model files to ``out``.

    On the machine, the library versions and the number of threads of the run, the model is the same to rounding;
    elsewhere it is another sample of the same procedure. For example::

        point = replay(Path("runs/demo"), Path("runs/again"))
        print(point["score"]["val"], point["latency_ms"]["median"])

    Args:
        recipe: the ``recipe.json`` of a finished run, or its run directory.
        out: a new or empty folder.
        task: the task of the run, or its name; by default the name in the recipe. A run of a ``Task`` that was given
            from Python needs it.
        progress: told the finished fraction and what is going on.

    Returns:
        The model's point: steps, validation score and cost on this machine.

    Raises:
        CorruptRunError: a file that is not such a recipe.
        RunDirectoryError: a folder that cannot be used.
        TaskError: a recipe of a task that has to be given, or is no longer where it was.
        NetwrightError: a recipe whose candidate fails here, with its reason.
    """
    recipe, out = recipe.absolute(), out.absolute()  # loading a task may change the working directory
    if recipe.is_dir():
        recipe = recipe / "recipe.json"
        if not recipe.exists():
            raise CorruptRunError(
                f"{recipe.parent} holds no recipe.json: it is written when a run of 'netwright optimize' ends. Go on "
                "with such a run by --resume, or give the folder of one that has ended."
            )
    settings = read_json(recipe)
    missing = [name for name in _FIELDS if not isinstance(settings, dict) or name not in settings]
    if missing:
        raise CorruptRunError(f"{recipe} is no recipe of a run of 'netwright optimize': it lacks {', '.join(missing)}.")
    with reading(recipe, "a recipe of a run"):
        seed, request = int(settings["seed"]), _request(settings)
    if task is None and settings.get("given", False):
        raise TaskError(
            f"The run of {recipe} was of the Task {settings['task']!r}, given from Python. Give it again: task=... of "
            "replay, or --task file.py:name."
        )
    tell = progress or (lambda fraction, what: None)
    run = RunDirectory(out)
    run.check_new()
    wanted = _place_of_task(recipe, settings) if task is None else task
    task = load_task(wanted) if isinstance(wanted, str) else wanted
    training = Recipe.from_json(json.dumps(settings["training"]))
    model = task.build(seed)
    with run.create({"schema": 1, "kind": "replay", "replay_of": settings}):
        if not task.trained:
            model = fit(model, task, training, seed=seed, progress=lambda share, text: tell(share / 2, text)).model
        example = task.example(2)
        if request is not None:
            tell(0.5, "compressing and recovering")
            subject = Subject(
                task=task,
                model=model.eval(),
                teacher=make_teacher(model, task, float("inf")) if settings["imitates"] else None,
                artifact=_onnx(model, example),
                recipe=training,
                measuring=Measuring(),
            )
            torch.set_num_threads(1)  # as in a worker: sums of floats depend on it
            outcome = Evaluator(subject)(request, lambda share, text: tell(0.5 + share / 2, text))
            if outcome.point is None:
                raise NetwrightError(f"The steps of {recipe} failed here: {outcome.error}")
            run.write("point.json", outcome.point.to_dict())
            model = rebuild(model, task, outcome, out)
        run.save("model.onnx", lambda path: export_onnx(model, example, path))
        run.save("model.pt2", lambda path: save_program(model, example, path))
        run.save("model.safetensors", lambda path: save_weights(model, path))
        found: dict[str, Any] = run.read("point.json") if run.has("point.json") else {"steps": []}
        return found


def _request(settings: Mapping[str, Any]) -> Request | None:
    """What was done to the baseline; None where it was handed back itself."""
    recovery = settings["recovery"]
    steps = tuple(map(Step.from_dict, settings["steps"]))
    if recovery is None:
        return None
    return Request(0, steps, 0.0, int(recovery["seed"]), epochs=float(recovery["epochs"]), deliver=True)


def _place_of_task(recipe: Path, settings: Mapping[str, Any]) -> str:
    """The name of the recipe's task; where its file is not to be seen from here, by the place that the run found it at.

    Raises:
        TaskError: the file is at neither place.
    """
    name: str = settings["task"]
    place, _, inner = name.rpartition(":")
    file = settings.get("task_file") or ""
    if not place.endswith(".py") or Path(place).is_file():
        return name
    if Path(file).is_file():
        return f"{file}:{inner}"
    known = f", nor is {file}" if file else ""
    raise TaskError(
        f"{recipe} names the task {name!r}, which is not to be found from here{known}. Give it: task=... of replay, or "
        "--task file.py:name."
    )


def _onnx(model: torch.nn.Module, example: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "baseline.onnx"
        export_onnx(model, example, path)
        return path.read_bytes()
