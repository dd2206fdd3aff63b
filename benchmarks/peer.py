"""The scripted peer: Torch-Pruning's magnitude pruner, fine-tuning with distillation, ONNX Runtime's int8.

What an engineer would put together by hand for the same task, with the same baseline, time, score floor and
measurement. Run as ``python benchmarks/peer.py RUN SECONDS``: RUN is a finished run directory of Netwright, whose
baseline is compressed; prints one JSON object. Needs the package torch-pruning, which Netwright itself does not.
"""

import copy
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from torch import nn

from netwright.core.artifact import load_weights
from netwright.core.cost import compare_onnx
from netwright.core.data import batches
from netwright.core.evaluate import evaluate, predict
from netwright.core.fit import fit
from netwright.core.onnx_export import export_onnx
from netwright.core.onnx_module import OnnxModule
from netwright.core.recipe import Recipe
from netwright.core.task import Task, load_task

RATIOS = (0.5, 0.7, 0.8, 0.9)


class Calibration:
    """Eight batches of 32 training items."""

    def __init__(self, task: Task, name: str) -> None:
        found = itertools.islice(batches(task.data.train, 32), 8)
        self._items: Iterator[dict[str, Any]] = iter([{name: np.asarray(inputs)} for inputs, _ in found])

    def get_next(self) -> dict[str, Any] | None:
        """The next batch."""
        return next(self._items, None)


def pruned(model: nn.Module, task: Task, ratio: float) -> nn.Module:
    found = copy.deepcopy(model)
    last = [module for module in found.modules() if isinstance(module, nn.Linear)][-1]
    torch_pruning.pruner.MagnitudePruner(
        found,
        task.example(1),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[last],
    ).step()
    return found


def quantized(path: Path, task: Task) -> Path:
    place = path.with_suffix(".int8.onnx")
    session = OnnxModule(path)
    quantize_static(
        path,
        place,
        Calibration(task, session.session.get_inputs()[0].name),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return place


def main(run: Path, seconds: float) -> None:
    torch.set_num_threads(2)
    settings = json.loads((run / "run.json").read_text())
    floor = float(settings["keep"]["score"].removeprefix(">="))
    task = load_task(settings["task"])
    model = task.build(settings["seed"])
    load_weights(model, run / "baseline.safetensors")
    model.eval()
    recipe = task.recipe or Recipe()
    base = evaluate(OnnxModule(run / "baseline.onnx"), task, "val")
    base_test = evaluate(OnnxModule(run / "baseline.onnx"), task, "test")
    teacher, _ = predict(model, task, "train")
    start, found = time.perf_counter(), []
    folder = Path(tempfile.mkdtemp())
    for ratio in RATIOS:
        share = seconds / len(RATIOS)
        candidate = pruned(model, task, ratio)
        trial = time.perf_counter()
        fit(copy.deepcopy(candidate), task, recipe.replace(epochs=recipe.epochs / 8), teacher=teacher, validate=False)
        epochs = recipe.epochs / 8 * share / (time.perf_counter() - trial)
        fit(candidate, task, recipe.replace(epochs=epochs), teacher=teacher, validate=False)
        path = folder / f"{ratio}.onnx"
        export_onnx(candidate, task.example(2), path)
        for place in (path, quantized(path, task)):
            val = evaluate(OnnxModule(place), task, "val")
            latency = compare_onnx(place, run / "baseline.onnx", task.example(2), seconds=2.0).median
            found.append((latency, place, ratio, val))
    kept = [entry for entry in found if entry[3] >= base + floor] or [max(found, key=lambda entry: entry[3])]
    latency, place, ratio, val = min(kept)
    print(
        json.dumps(
            {
                "latency": latency,
                "size": place.stat().st_size / (run / "baseline.onnx").stat().st_size,
                "prune": ratio,
                "int8": place.name.endswith(".int8.onnx"),
                "val_drop": val - base,
                "test_drop": evaluate(OnnxModule(place), task, "test") - base_test,
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
