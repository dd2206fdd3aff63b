"""What a comparison starts from and is measured against: a trained network, its files and its row."""

import copy
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from netwright.compress._comparison import Row
from netwright.core.artifact import load_weights, save_program, save_weights
from netwright.core.console import ConsoleProgress
from netwright.core.cost import compare_onnx, measure_onnx
from netwright.core.errors import ArtifactError
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.graph.export import export_model
from netwright.core.onnx_export import export_onnx
from netwright.core.onnx_module import OnnxModule, open_session
from netwright.core.recipe import Recipe
from netwright.core.records import reading
from netwright.core.rundir import RunDirectory
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["BASELINE", "Measuring", "bar", "make_baseline", "zeros"]

BASELINE = "baseline"
"""The name of the network as it came, in the table and of its files."""
_ARTIFACT, _WEIGHTS, _RECORD = f"{BASELINE}.onnx", f"{BASELINE}.safetensors", f"{BASELINE}.json"
_TRAINED = f"{BASELINE}-training.json"  # there from the end of the training to that of the measurements


@dataclasses.dataclass(frozen=True)
class Measuring:
    """Where the files of networks go, and how these are timed."""

    task: Task
    run: RunDirectory
    batch: int
    threads: int
    seconds: float

    def row(self, name: str, model: nn.Module) -> Row:
        """Write ``NAME.onnx`` and ``NAME.pt2``, and say what the network is worth and costs."""
        artifact, program = self.export(name, model)
        self.run.save(f"{name}.pt2", lambda path: save_program(model, self.task.example(2), path))
        judged = model if self.task.evaluate is not None else OnnxModule(artifact)  # the file that is handed over
        scores = evaluate(judged, self.task, "val"), evaluate(judged, self.task, "test")
        example, batch, threads, seconds = self.task.example(self.batch), self.batch, self.threads, self.seconds
        cost = measure_onnx(artifact, example, program, batch=batch, threads=threads, seconds=seconds / 2)
        ratio = None
        if name != BASELINE:
            baseline = self.run.path / _ARTIFACT
            ratio = compare_onnx(artifact, baseline, example, batch=batch, threads=threads, seconds=seconds)
        return Row(name, None, *scores, cost, ratio, zeros(model))

    def export(self, name: str, model: nn.Module) -> tuple[Path, ExportedProgram]:
        """Write ``NAME.onnx``; its path, and the trace that it is made of."""
        example = self.task.example(2)
        program = export_model(model, example)
        return self.run.save(f"{name}.onnx", lambda path: export_onnx(program, example, path)), program


def make_baseline(measuring: Measuring, recipe: Recipe, seed: int, *, console: bool) -> tuple[nn.Module, Row]:
    """Train (or take), export, score and measure the baseline; or read what an earlier call left.

    Training that was interrupted goes on from its checkpoint; once it has ended it is not repeated. An ONNX file that
    is missing or damaged is made anew from the weights.

    Raises:
        CorruptRunError: a record of an earlier call that is not as it was written.
        ArtifactError: weights of an earlier call that are missing or damaged.
    """
    run = measuring.run
    model = copy.deepcopy(measuring.task.build(seed))  # a module that came trained stays the user's own
    if not run.has(_RECORD):
        model, spent = _trained(measuring, model, recipe, seed, console=console)
        start = time.perf_counter()
        row = measuring.row(BASELINE, model)
        spent += time.perf_counter() - start
        run.write(_RECORD, dataclasses.replace(row, seconds=spent).to_dict())
        (run.path / _TRAINED).unlink(missing_ok=True)
    load_weights(model, run.path / _WEIGHTS)
    with reading(run.path / _RECORD, "the baseline of a comparison"):
        row = Row.from_dict(run.read(_RECORD, "val", "cost"))
    try:
        open_session(run.path / _ARTIFACT)
    except ArtifactError:
        measuring.export(BASELINE, model)
    return model.eval(), row


def _trained(
    measuring: Measuring, model: nn.Module, recipe: Recipe, seed: int, *, console: bool
) -> tuple[nn.Module, float]:
    """The trained model, its weights on disk before anything else is done with it, and the seconds that it took."""
    run, task = measuring.run, measuring.task
    if run.has(_TRAINED):
        load_weights(model, run.path / _WEIGHTS)
        with reading(run.path / _TRAINED, "the seconds of a training"):
            return model, float(run.read(_TRAINED, "seconds")["seconds"])
    start = time.perf_counter()
    checkpoint = run.path / f"{BASELINE}.checkpoint"
    if not task.trained:
        with bar("training the baseline", console) as progress:
            model = fit(model, task, recipe, seed=seed, progress=progress, validate=False, checkpoint=checkpoint).model
    spent = time.perf_counter() - start
    run.save(_WEIGHTS, lambda path: save_weights(model, path))
    run.write(_TRAINED, {"seconds": spent})
    checkpoint.unlink(missing_ok=True)
    return model, spent


@contextmanager
def bar(label: str, console: bool) -> Iterator[Progress]:
    """Progress on standard error, or none."""
    if not console:
        yield lambda fraction, what: None
        return
    with ConsoleProgress(label) as progress:
        yield progress.update


def zeros(model: nn.Module) -> float:
    """Share of the entries of matrices and kernels that are zero."""
    weights = [value.detach() for value in model.parameters() if value.ndim > 1]
    count = sum(value.numel() for value in weights)
    return float(sum(torch.count_nonzero(value == 0) for value in weights)) / max(count, 1)
