"""Methods that train, on tasks that train by their own fit: refused, unless nothing is to be trained."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.compress import (
    HESSO,
    OTO,
    ActivatingPruner,
    DeepReDuce,
    GlobalSparseMomentum,
    GroupEnvelope,
    LayerMerge,
    SparseRecipe,
    TrainableGate,
)
from netwright.core.data import Data
from netwright.core.errors import TransformError
from netwright.core.score import accuracy
from netwright.core.task import Task

METHODS = [
    OTO(0.5),
    HESSO(0.5),
    GroupEnvelope(0.5),
    TrainableGate(0.5),
    SparseRecipe(0.5),
    GlobalSparseMomentum(0.5),
    ActivatingPruner(0.5),
    LayerMerge(0.8, cost="macs", items=16, span=2),
    DeepReDuce(0.6),
]


def given() -> tuple[nn.Module, Task]:
    conv = [nn.Conv2d(size, 8, 3, padding=1) for size in (1, 8, 8)]
    layers = [layer for each in conv for layer in (each, nn.ReLU())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(288, 2)).eval()
    splits = [TensorDataset(torch.randn(32, 1, 6, 6), torch.randint(2, (32,))) for _ in range(3)]
    return model, Task("plain", model, Data(*splits), functional.cross_entropy, accuracy)


def refuse(model: nn.Module, **_: object) -> None:
    pytest.fail("it was trained")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_without_training_the_result_is_that_of_any_other_task(method) -> None:
    model, task = given()
    own = dataclasses.replace(task, fit=refuse)
    plain, found = (method(copy.deepcopy(model), each, budget=0) for each in (task, own))
    for left, right in zip(plain.state_dict().values(), found.state_dict().values(), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(TransformError, match=f"{type(method).__name__} works within .* trains by its own fit="):
        method(model, own, budget=2)
