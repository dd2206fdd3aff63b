"""Methods that choose units while they train, on every architecture of the graph's zoo, by magnitude alone."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from netwright.compress import HESSO, OTO, GroupEnvelope, TrainableGate
from netwright.core.errors import NothingToPruneError
from netwright.core.graph import trace
from netwright.core.task import Task
from tests.compress.zoo_tasks import zoo_task
from tests.graph.zoo import ZOO

METHODS = [OTO(0.4), HESSO(0.4), GroupEnvelope(0.4), TrainableGate(0.99)]


def shapes(task: Task, model: nn.Module) -> list[tuple[int, ...]]:
    """Of what the loss sees, which the heads' keys and values are no part of."""
    with torch.no_grad():
        return [tuple(value.shape) for value in tree_leaves(task.outputs(model, task.example()))]


def parameters(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize("name", ZOO)
def test_units_go_and_outputs_keep_their_shapes(name, monkeypatch) -> None:
    model, task = zoo_task(name)
    given, graph = copy.deepcopy(model), trace(model, task.example())
    for module in ("_unit_plan", "group_envelope", "trainable_gate"):  # one trace serves them all
        monkeypatch.setattr(f"netwright.compress.{module}.trace", lambda *_: graph)
    for method in METHODS:
        smaller = method(model, task, budget=0)
        assert shapes(task, smaller) == shapes(task, given), method
        assert parameters(smaller) < parameters(given), method
    for before, after in zip(given.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_model_without_units_is_refused(method) -> None:
    _, task = zoo_task("gated-mlp")
    with pytest.raises(NothingToPruneError, match="can be proved safe to remove"):
        method(nn.Linear(6, 5), task, budget=0)
