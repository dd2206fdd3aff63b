"""Full recoveries on disk: what a run that is interrupted among them need not do again."""

import math
from typing import Any

from netwright.core.loop import Record
from netwright.core.records import reading
from netwright.core.rundir import RunDirectory
from netwright.workshop.baseline import plain
from netwright.workshop.evaluation import Outcome, Request
from netwright.workshop.point import Point, Step

__all__ = ["forget_outcomes", "keep_outcome", "kept_outcomes", "told"]

_PREFIX = "final-"


def told(outcome: Outcome) -> dict[str, Any]:
    """An outcome as ``finals.json`` has it."""
    return {
        "trial": outcome.request.number,
        "point": None if outcome.point is None else outcome.point.to_dict(),
        "error": outcome.error,
        "seconds": outcome.seconds,
        "epochs": outcome.epochs,
    }


def keep_outcome(run: RunDirectory, outcome: Outcome) -> None:
    """Write a delivered outcome. It counts once its JSON file is there, which comes last."""
    request = outcome.request
    name = f"{_PREFIX}{request.number:05d}"
    if outcome.point is not None:
        run.save(f"{name}.onnx", lambda path: path.write_bytes(outcome.artifact))
        run.save(f"{name}.safetensors", lambda path: path.write_bytes(outcome.weights))
    run.write(
        f"{name}.json",
        {
            **told(outcome),
            "training_s": request.seconds,
            "seed": request.seed,
            "steps": [step.to_dict() for step in request.steps],
            "history": [plain(record) for record in outcome.history],
        },
    )


def kept_outcomes(run: RunDirectory) -> list[Outcome]:
    """The outcomes that :func:`keep_outcome` wrote into ``run``.

    Raises:
        CorruptRunError: a file that was edited or damaged, or is gone.
    """
    return [_read(run, path.stem) for path in sorted(run.path.glob(f"{_PREFIX}*.json"))]


def forget_outcomes(run: RunDirectory) -> None:
    """Take the files away, once the result of the run is written."""
    for path in run.path.glob(f"{_PREFIX}*"):
        path.unlink(missing_ok=True)


def _read(run: RunDirectory, name: str) -> Outcome:
    fields = ("trial", "training_s", "seed", "steps", "point", "error", "seconds", "epochs", "history")
    content: dict[str, Any] = run.read(f"{name}.json", *fields)
    whole = content["point"] is not None
    with reading(run.path / f"{name}.json", "a full recovery"):
        steps = tuple(map(Step.from_dict, content["steps"]))
        return Outcome(
            request=Request(
                int(content["trial"]), steps, float(content["training_s"]), int(content["seed"]), deliver=True
            ),
            point=Point.from_dict(content["point"]) if whole else None,
            error=content["error"],
            seconds=float(content["seconds"]),
            epochs=float(content["epochs"]),
            artifact=run.content(f"{name}.onnx") if whole else b"",
            history=tuple(map(_record, content["history"])),
            weights=run.content(f"{name}.safetensors") if whole else b"",
        )


def _record(values: dict[str, Any]) -> Record:
    """A point on the curve; the loss of a task that trains by its own fit is not a number, which JSON cannot say."""
    known = {name: math.nan if values[name] is None else values[name] for name in ("train_loss", "lr")}
    return Record(**{**values, **known})
