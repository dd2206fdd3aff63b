"""Why a run leaves integers out is written down with its plan."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.errors import TransformError
from netwright.core.graph import trace
from netwright.core.rundir import RunDirectory
from netwright.core.task import Task
from netwright.workshop import plan
from netwright.workshop.job import Job
from netwright.workshop.target import parse_keep, parse_targets


class Baseline:
    def __init__(self, model: nn.Module) -> None:
        self.model = model


def recorded(folder: Path, steps: tuple[str, ...]) -> Any:
    """What the plan of a small network says."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    data = Data(*(TensorDataset(torch.randn(16, 4), torch.zeros(16).long()) for _ in range(3)))
    task = Task("made", model, data, nn.functional.cross_entropy, lambda outputs, targets: 0.0)
    job = Job(task, parse_targets(["latency<=0.5x"]), parse_keep("score>=-1"), 60.0, folder / "run", steps=steps)
    baseline: Any = Baseline(model)
    with RunDirectory(job.out).create({}) as run:
        plan.make_plan(run, job, task, baseline, trace(model, task.example()), lambda: 1.0)
        return run.read("plan.json")


def test_the_reason_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise TransformError("Int8: no pair of types is right here.")

    monkeypatch.setattr(plan, "fastest_int8", refuse)
    found = recorded(tmp_path, ("prune", "int8"))
    assert found["int8"] is None
    assert found["int8_left_out"] == "Int8: no pair of types is right here."


def test_without_a_failure_there_is_no_reason(tmp_path: Path) -> None:
    found = recorded(tmp_path / "with", ("prune", "int8"))
    assert found["int8"]["activation"] in ("uint8", "int8")
    assert found["int8_left_out"] is None
    assert recorded(tmp_path / "without", ("prune",))["int8_left_out"] is None
