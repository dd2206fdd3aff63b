"""The baseline: trained or as the user brought it, exported, scored, measured, kept in the run directory."""

import copy
import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from netwright.core.artifact import load_weights, save_weights
from netwright.core.cost import measure_onnx
from netwright.core.data import Data
from netwright.core.evaluate import evaluate, predict
from netwright.core.fit import Record, fit
from netwright.core.graph.export import export_model
from netwright.core.onnx_export import export_onnx
from netwright.core.onnx_module import OnnxModule
from netwright.core.recipe import Recipe
from netwright.core.records import reading
from netwright.core.rundir import RunDirectory
from netwright.core.task import Task
from netwright.core.transform import Progress
from netwright.workshop.job import Job
from netwright.workshop.point import Point
from netwright.workshop.quiet import QuietRoom

__all__ = ["Baseline", "make_baseline", "make_teacher", "plain"]

_WEIGHTS, _MODEL, _RECORD = "baseline.safetensors", "baseline.onnx", "baseline.json"
_TRAINED = "baseline-training.json"  # there from the end of the training to that of the measurements
_TIMED_ITEMS = 128
_REMEMBERED = 16_000_000  # elements of the teacher's outputs


@dataclass(frozen=True)
class Baseline:
    """What a run starts from.

    Args:
        model: the trained module.
        point: its validation score and cost.
        artifact: it as an ONNX model.
        history: record of its training, empty when it came trained.
        teacher: what recovery imitates: its outputs on the training split where they are always the same,
            the model itself where the data are drawn anew each time, None where imitating costs too much time.
    """

    model: nn.Module
    point: Point
    artifact: bytes
    history: tuple[dict[str, Any], ...]
    teacher: nn.Module | Tensor | None


def make_baseline(
    run: RunDirectory, job: Job, task: Task, recipe: Recipe, progress: Progress, teacher_seconds: float
) -> Baseline:
    """Train (or take), export, score and measure the baseline; or read what an earlier call left in ``run``.

    Training that was interrupted goes on from its checkpoint; once it has ended it is not repeated.

    Raises:
        CorruptRunError: what an earlier call left is damaged, or a part of it is gone.
    """
    seed, measuring = job.seed, job.measuring
    model = copy.deepcopy(task.build(seed))  # a module that came trained stays the user's own
    if not run.has(_RECORD):
        model, history = _train(run, model, task, recipe, seed, progress)
        program = export_model(model, task.example(2))
        run.save(_MODEL, lambda path: export_onnx(program, task.example(2), path))
        val = evaluate(OnnxModule(run.path / _MODEL), task, "val")
        progress(1.0, "measuring the baseline")
        example = task.example(max(measuring.batch, 1))
        with QuietRoom().measure():
            cost = measure_onnx(
                run.path / _MODEL, example, program, batch=measuring.batch, threads=measuring.threads, seconds=1.0
            )
        record = {
            "point": Point((), val, cost).to_dict(),
            "history": history,
        }
        run.write(_RECORD, record)
        (run.path / _TRAINED).unlink(missing_ok=True)
    record = run.read(_RECORD, "point", "history")
    load_weights(model, run.path / _WEIGHTS)
    with reading(run.path / _RECORD, "a baseline"):
        point, history = Point.from_dict(record["point"]), list(record["history"])
    return Baseline(
        model=model.eval(),
        point=point,
        artifact=run.content(_MODEL),
        history=tuple(history),
        teacher=make_teacher(model, task, teacher_seconds),
    )


def _train(
    run: RunDirectory, model: nn.Module, task: Task, recipe: Recipe, seed: int, progress: Progress
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The trained model, its weights on disk before anything else is done with it."""
    if run.has(_TRAINED):
        load_weights(model, run.path / _WEIGHTS)
        with reading(run.path / _TRAINED, "the training of a baseline"):
            return model, list(run.read(_TRAINED, "history")["history"])
    checkpoint = run.path / "baseline.checkpoint"
    history: list[dict[str, Any]] = []
    if not task.trained:
        result = fit(model, task, recipe, seed=seed, checkpoint=checkpoint, progress=progress)
        model, history = result.model, [plain(record) for record in result.history]
    run.save(_WEIGHTS, lambda path: save_weights(model, path))
    run.write(_TRAINED, {"history": history})
    checkpoint.unlink(missing_ok=True)
    return model, history


def plain(record: Record) -> dict[str, Any]:
    """A record as JSON takes it: what is not a number becomes null."""
    values = dataclasses.asdict(record)
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()}


def make_teacher(model: nn.Module, task: Task, seconds: float) -> nn.Module | Tensor | None:
    """What recovery imitates; computing the model's outputs once may take ``seconds``."""
    train = task.data.train
    if task.fit is not None or type(train) is not TensorDataset:
        return model
    count = min(_TIMED_ITEMS, len(train))
    predict(model, _first(task, count), "train")  # warms up
    start = time.perf_counter()
    sample, _ = predict(model, _first(task, count), "train")
    expected = (time.perf_counter() - start) * len(train) / count
    if not isinstance(sample, Tensor) or sample.numel() * len(train) / count > _REMEMBERED:
        return model
    if expected > seconds:
        return None
    outputs, _ = predict(model, task, "train")
    return outputs if isinstance(outputs, Tensor) else model


def _first(task: Task, count: int) -> Task:
    """The task with only the first training items."""
    train = task.data.train
    assert isinstance(train, TensorDataset)
    part = TensorDataset(*(tensor[:count] for tensor in train.tensors))
    return dataclasses.replace(task, data=Data(part, task.data.val, task.data.test))
