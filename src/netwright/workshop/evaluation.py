"""Evaluate one candidate: apply its steps, recover, export, score, measure.

This is what a worker does, whichever engine runs it; it knows neither the study nor the run
directory.
"""

import copy
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from netwright.core.artifact import load_weights, save_weights
from netwright.core.cost import Cost, Ratio, compare_onnx, measure_onnx
from netwright.core.errors import NetwrightError
from netwright.core.evaluate import evaluate
from netwright.core.files import atomic_write
from netwright.core.fit import Record, fit
from netwright.core.graph.export import export_model
from netwright.core.onnx_export import export_onnx
from netwright.core.onnx_module import OnnxModule
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.zeros import is_sparse
from netwright.workshop.pace import epoch_seconds
from netwright.workshop.point import Point, Step
from netwright.workshop.quiet import QuietRoom

__all__ = [
    "Evaluator",
    "Measuring",
    "Outcome",
    "Request",
    "Subject",
    "is_low_precision",
    "most_epochs",
    "rebuild",
    "structure",
]

_QUANTIZED_SHARE = 0.3  # of the recovery is spent after a step that simulates low precision
_QUANTIZED_COST = 2.5  # an epoch there takes this many times as long
_QUANTIZED_RATE = 0.25  # and at this share of the learning rate
_OWN_SHARE = 0.25  # of the recipe's epochs, where the task trains by its own fit
_MOST_EPOCHS, _LEAST_EPOCHS = 4.0, 0.02  # of recovery, in lengths of the task's own recipe


@dataclass(frozen=True)
class Measuring:
    """How latency is measured.

    Args:
        batch: items in a call.
        threads: threads of the runtime.
        seconds: length of one measurement.
    """

    batch: int = 1
    threads: int = 1
    seconds: float = 0.3


@dataclass(frozen=True)
class Request:
    """A candidate to evaluate.

    Args:
        number: the evaluation's number within the run.
        steps: what is done to the baseline.
        seconds: training time aimed at; becomes a number of epochs once the candidate's cost is known.
        seed: source of its randomness.
        params: the proposal in the sampler's own terms.
        epochs: epochs of recovery; None to have them follow from ``seconds``.
        deliver: whether the trained weights come back.
    """

    number: int
    steps: tuple[Step, ...]
    seconds: float
    seed: int
    params: dict[str, Any] = field(default_factory=dict)
    epochs: float | None = None
    deliver: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Args:
        request: the request.
        point: the candidate's scores and costs, or None when it failed.
        error: why it failed, in one line.
        seconds: time it took.
        epochs: epochs of recovery that it had.
        artifact: the exported ONNX model.
        history: record of the recovery.
        weights: the candidate's weights as bytes of safetensors; only when the request says so.
    """

    request: Request
    point: Point | None
    error: str | None
    seconds: float
    epochs: float = 0.0
    artifact: bytes = b""
    history: tuple[Record, ...] = ()
    weights: bytes = b""


@dataclass(frozen=True)
class Subject:
    """What every evaluation of a run starts from.

    Args:
        task: the task.
        model: the baseline, trained.
        teacher: what recovery imitates: the baseline, or its outputs on the training split, or nothing.
        artifact: the baseline as an ONNX model.
        recipe: how candidates are trained.
        measuring: how latency is measured.
    """

    task: Task
    model: nn.Module
    teacher: nn.Module | Tensor | None
    artifact: bytes
    recipe: Recipe
    measuring: Measuring


class Evaluator:
    """Evaluates requests against one subject, one after the other.

    Args:
        subject: what they start from.
        room: where it works and measures.
        folder: for the files it makes on the way; by default one of its own, which goes with it.
    """

    def __init__(self, subject: Subject, room: QuietRoom | None = None, folder: Path | None = None) -> None:
        self._subject = subject
        self._room = room or QuietRoom()
        self._own = tempfile.TemporaryDirectory(prefix="netwright-") if folder is None else None
        self._folder = Path(self._own.name) if self._own is not None else Path(tempfile.mkdtemp(dir=folder))
        self._baseline = self._folder / "baseline.onnx"
        self._baseline.write_bytes(subject.artifact)

    def __call__(self, request: Request, report: Callable[[float, str], None] | None = None) -> Outcome:
        """Evaluate ``request``. A candidate that fails is an outcome with its reason, not an exception."""
        start = time.perf_counter()
        try:
            return self._evaluate(request, start, report)
        except NetwrightError as error:
            reason = f"{type(error).__name__}: {error}"
        except Exception as error:  # whatever a candidate does must not end the run; the cause is recorded
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        return Outcome(request, None, " ".join(reason.split())[:500], time.perf_counter() - start)

    def _evaluate(self, request: Request, start: float, report: Callable[[float, str], None] | None) -> Outcome:
        task = self._subject.task
        path = self._folder / f"{request.number}.onnx"

        def progress(fraction: float, what: str) -> None:
            self._room.give_way()
            if report is not None:
                report(fraction, what)

        with self._room.work():
            model, epochs, history = self._train(request, progress)
            self._room.give_way()
            example = task.example(2)
            program = export_model(model, example)
            export_onnx(program, example, path)
            self._room.give_way()
            val = evaluate(OnnxModule(path), task, "val")
            if not math.isfinite(val):
                raise NetwrightError(f"The candidate's score is {val}.")
            self._room.give_way()
        cost, ratio = self._measure(path, program)
        artifact = path.read_bytes()
        path.unlink()
        weights = b""
        if request.deliver:
            kept = path.with_suffix(".safetensors")
            save_weights(model, kept)
            weights = kept.read_bytes()
        point, seconds = Point(request.steps, val, cost, ratio), time.perf_counter() - start
        return Outcome(request, point, None, seconds, epochs, artifact, history, weights)

    def _train(
        self, request: Request, progress: Callable[[float, str], None]
    ) -> tuple[nn.Module, float, tuple[Record, ...]]:
        """Apply the steps, with recovery after the structural ones and again after those of low precision."""
        subject = self._subject
        quantizing = [step for step in map(Step.build, request.steps) if is_low_precision(step)]
        model = structure(subject.model, subject.task, request.steps, request.seed)
        progress(0.0, "pruned")
        share = _QUANTIZED_SHARE if quantizing else 0.0
        slower = 1 - share + share * _QUANTIZED_COST
        epochs = request.epochs if request.epochs is not None else self._epochs(model, request.seconds / slower)
        records: tuple[Record, ...] = ()
        if len(quantizing) < len(request.steps):
            model, records = self._recover(model, epochs * (1 - share), 1.0, request.seed, progress)
        for step in quantizing:
            model = step(model, subject.task, budget=0.0, seed=request.seed)
            progress(1 - share, "quantized")
        if quantizing and any(parameter.requires_grad for parameter in model.parameters()):
            model, more = self._recover(model, epochs * share, _QUANTIZED_RATE, request.seed + 1, progress)
            records = (*records, *(_after(records[-1], record) if records else record for record in more))
        return model.eval(), epochs, records

    def _recover(
        self, model: nn.Module, epochs: float, rate: float, seed: int, progress: Callable[[float, str], None]
    ) -> tuple[nn.Module, tuple[Record, ...]]:
        subject = self._subject
        if model is subject.model:
            model = copy.deepcopy(model)
        recipe = subject.recipe.scaled(rate).lasting(epochs)
        if is_sparse(model):  # a parameterization would have no zeros to keep
            recipe = recipe.replace(keep_zeros=True, parameterization=None)
        result = fit(model, subject.task, recipe, seed=seed, teacher=subject.teacher, progress=progress, validate=False)
        return result.model, result.history

    def _epochs(self, model: nn.Module, seconds: float) -> float:
        """Epochs that fit into ``seconds`` of training this candidate here; a fixed share under a task's own fit."""
        subject = self._subject
        most, least = most_epochs(subject.task, subject.recipe), _LEAST_EPOCHS * subject.recipe.epochs
        if subject.task.fit is not None:
            return most
        epochs = seconds / epoch_seconds(model, subject.task, subject.recipe, subject.teacher)
        return round(min(most, max(least, epochs)), 3)

    def _measure(self, path: Path, program: ExportedProgram) -> tuple[Cost, Ratio]:
        how = self._subject.measuring
        example = self._subject.task.example(max(how.batch, 1))
        with self._room.measure():
            cost = measure_onnx(path, example, program, batch=how.batch, threads=how.threads, seconds=how.seconds / 3)
            ratio = compare_onnx(
                path, self._baseline, example, batch=how.batch, threads=how.threads, seconds=how.seconds
            )
        return cost, ratio


def _after(last: Record, record: Record) -> Record:
    """A record of a recovery as it stands behind the last one of the recovery before."""
    step, epoch, seconds = last.step + record.step, last.epoch + record.epoch, last.seconds + record.seconds
    return replace(record, step=step, epoch=epoch, seconds=seconds)


def most_epochs(task: Task, recipe: Recipe) -> float:
    """The longest recovery of a candidate; the only one, where the task trains by its own fit."""
    return (_MOST_EPOCHS if task.fit is None else _OWN_SHARE) * recipe.epochs


def structure(model: nn.Module, task: Task, steps: Sequence[Step], seed: int) -> nn.Module:
    """``model`` after those of the steps that change which units there are, before any recovery."""
    for transform in [step.build() for step in steps]:
        if not is_low_precision(transform):
            model = transform(model, task, budget=0.0, seed=seed)
    return model


def rebuild(model: nn.Module, task: Task, outcome: Outcome, folder: Path) -> nn.Module:
    """The candidate of a delivered outcome: its steps applied to the baseline anew, then its weights read.

    Nothing but tensors and plain data has to travel between processes, or machines, for that.

    Raises:
        RunDirectoryError: the weights cannot be written into ``folder``, for example on a full disk.
    """
    request = outcome.request
    found = structure(model, task, request.steps, request.seed)
    for transform in [step.build() for step in request.steps]:
        if is_low_precision(transform):
            found = transform(found, task, budget=0.0, seed=request.seed)
    if found is model:
        found = copy.deepcopy(model)
    place = folder / ".delivered.safetensors"
    with atomic_write(place) as temporary:
        temporary.write_bytes(outcome.weights)
    load_weights(found, place)
    place.unlink()
    return found.eval()


def is_low_precision(step: object) -> bool:
    """Whether a transform changes how numbers are written rather than which units there are."""
    return bool(getattr(step, "low_precision", False))
