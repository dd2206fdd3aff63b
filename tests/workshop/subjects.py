"""What evaluations of a small real task start from, made without a run directory."""

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
import torch

from netwright.core.cost import Cost, Latency, Ratio
from netwright.core.fit import fit
from netwright.core.graph import trace
from netwright.core.onnx_export import export_onnx
from netwright.core.recipe import Recipe
from netwright.workshop.evaluation import Measuring, Request, Subject
from netwright.workshop.point import Point, Step

RECIPE = Recipe(epochs=4, optimizer_settings={"lr": 1e-2}, schedule_settings={"max_lr": 1e-2})
_MADE: list[Subject] = []


def subject(**changes: Any) -> Subject:
    """A trained tiny network as the baseline; the same at every call but for ``changes``."""
    if not _MADE:
        task = tiny.task()
        model = fit(task.build(0), task, RECIPE, seed=0, validate=False).model.eval()
        graph = trace(model, task.example(2))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "baseline.onnx"
            export_onnx(graph.program, task.example(2), path)
            artifact = path.read_bytes()
        _MADE.append(Subject(task, model, None, artifact, RECIPE, Measuring(seconds=0.03)))
    made = _MADE[0]
    return replace(made, model=copy.deepcopy(made.model), **changes)


def prune(**ratios: float) -> Step:
    """Pruning of the two convolutions of the tiny network; ``first`` and ``second`` name them."""
    names = {"first": "0", "second": "3"}
    settings = {"ratios": {names[name]: share for name, share in ratios.items()}, "saliency": "magnitude"}
    return Step("netwright.compress:Prune", settings)


INT8 = Step("netwright.compress:Int8", {"activation": "uint8", "weight": "int8"})


def request(number: int = 0, *steps: Step, epochs: float | None = 0.1, **more: Any) -> Request:
    return Request(number, steps or (prune(first=0.5),), 1.0, more.pop("seed", 7), epochs=epochs, **more)


def point(val: float, latency: float = 1.0, size: float = 1.0, *steps: Step) -> Point:
    """A point whose latency and size are these shares of 2 ms and 1 MB."""
    times = Latency(2 * latency, 1.9 * latency, 2.2 * latency, 1, 1, "onnxruntime", 10)
    cost = Cost(times, 4_000_000, round(1e6 * size), 8_000_000, 250_000)
    return Point(steps, val, cost, Ratio(latency, 0.97 * latency, 1.03 * latency, False, 1.0, 20))


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
