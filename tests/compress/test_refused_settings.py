"""Settings of the wrong type, and students that are none, are refused in plain words."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.compress import (
    OMPQ,
    Codebooks,
    EasyQuant,
    Int8,
    LowRank,
    MetaAug,
    StableCP,
    StableKD,
    TrilateralKD,
)
from netwright.core.data import Data
from netwright.core.errors import TransformError
from netwright.core.task import Task


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        (EasyQuant, {"bits": 7.0}, r"EasyQuant\.bits must be 8, 7 or 6, got 7\.0"),
        (MetaAug, {"bits": 4.0}, r"MetaAug\.bits must be an integer from 2 to 8, got 4\.0"),
        (MetaAug, {"activation_bits": "8"}, r"MetaAug\.activation_bits must be an integer from 2 to 8, got '8'"),
        (Int8, {"skip": None}, r"Int8\.skip must be a sequence of names, got None"),
        (Int8, {"skip": (None,)}, r"Int8\.skip must be a sequence of names, got \(None,\)"),
        (Int8, {"per_channel": "no"}, r"Int8\.per_channel must be true or false, got 'no'"),
        (Int8, {"reduce_range": 1}, r"Int8\.reduce_range must be true or false, got 1"),
        (OMPQ, {"bits": 8}, r"OMPQ\.bits must be integers from 2 to 8, as \(4, 8\), got 8"),
        (OMPQ, {"bits": "48"}, r"OMPQ\.bits must be integers"),
        (LowRank, {"exclude": None}, r"LowRank\.exclude must be a sequence of names, got None"),
        (StableCP, {"exclude": 3}, r"StableCP\.exclude must be a sequence of names, got 3"),
        (
            Codebooks,
            {"exclude": [3]},
            r"Codebooks\.exclude must be a sequence of names, got \[3\]",
        ),
        (StableKD, {"student": "a:b", "at": 3}, r"StableKD\.at must be pairs of module names"),
        (StableKD, {"student": {"method": 3}}, r"StableKD\.student must be an import path"),
        (StableKD, {"student": {"method": "a:b", "settings": [1]}}, r"StableKD\.student must be an import path"),
    ],
)
def test_settings_of_another_type_are_refused_at_construction(method: Any, settings: Any, said: str) -> None:
    with pytest.raises(TransformError, match=said):
        method(**settings)


def test_sequences_of_paths_are_kept_as_tuples() -> None:
    assert Int8(skip=["a", "b"]).skip == ("a", "b")
    assert LowRank(exclude=["a"]).exclude == ("a",)


def broken() -> nn.Module:
    model = nn.Linear(6, 3)
    nn.init.constant_(model.weight, torch.nan)
    return model


def failing() -> nn.Module:
    raise KeyError("width")


class Other(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


@pytest.fixture
def students() -> Iterator[None]:
    module: Any = ModuleType("made_students")
    module.broken, module.failing, module.other, module.number = broken, failing, Other, 3.0
    sys.modules["made_students"] = module
    yield
    del sys.modules["made_students"]


@pytest.mark.usefixtures("students")
@pytest.mark.parametrize("method", [StableKD, TrilateralKD])
@pytest.mark.parametrize(
    ("student", "said"),
    [
        ("torch.nn:Linear", "torch.nn:Linear fails when it is called without arguments: TypeError"),
        ("made_students:number", "made_students:number is a float, not a function"),
        ("made_students:failing", "made_students:failing fails .*: KeyError: 'width'"),
        ("nosuch:thing", "'nosuch:thing' cannot be imported"),
        ({"method": "torch:nothing"}, "'torch:nothing' cannot be imported"),
        ("made_students:broken", "weight has 18 values that are not finite"),
        ("made_students:other", "the student cannot be run on the task's inputs: .*missing 1 required"),
    ],
)
def test_students_that_are_none_are_refused_in_plain_words(method: Any, student: Any, said: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    data = Data(*(TensorDataset(torch.randn(8, 6), torch.arange(8) % 3) for _ in range(3)))
    task = Task("made", model, data, nn.functional.cross_entropy, lambda outputs, targets: 0.0)
    with pytest.raises(TransformError, match=f"^{method.__name__}(\\.student)?: {said}"):
        method(student)(model, task, budget=0)
