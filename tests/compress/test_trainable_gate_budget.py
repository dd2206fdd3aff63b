"""Trainable gates where modules do not tell what operations cost: budgets are counted on the smaller models."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.compress._trainable_gate_macs import MacModel, opened
from netwright.compress.layer_merge import LayerMerge
from netwright.compress.trainable_gate import TrainableGate
from netwright.core.data import Data
from netwright.core.errors import TransformError
from netwright.core.graph import export_model, trace
from netwright.core.graph.macs import count_macs, total_macs
from netwright.core.task import Task
from netwright.testing import small_tasks
from netwright.testing._tasks import AttentionBlock
from tests.graph.zoo import build


class Attention(nn.Module):
    """Attention over 64 positions, most of whose operations are products without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = AttentionBlock(32, 4, 128), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x).mean(1))


class Tied(nn.Module):
    """One matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 32), nn.Linear(32, 8, bias=False), nn.Linear(8, 32)
        self.head = nn.Linear(32, 3)
        self.c.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(functional.relu(self.c(self.b(functional.relu(self.a(x))))))


class Functional(nn.Module):
    """Convolutions whose weights the network holds itself, at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        shapes = (16, 3, 3, 3), (16, 16, 3, 3), (16, 16, 3, 3)
        self.first, self.second, self.third = (nn.Parameter(torch.randn(shape) / 10) for shape in shapes)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.conv2d(x, self.first, padding=1).relu()
        x = functional.max_pool2d(functional.conv2d(x, self.second, padding=1).relu(), 4)
        return self.head(functional.conv2d(x, self.third, padding=1).relu().mean((2, 3)))


def merged() -> tuple[nn.Module, Task]:
    task = small_tasks()[0]
    return LayerMerge(0.8, cost="macs", items=32, span=3)(task.model, task, budget=0), task


def alone(model: nn.Module, *shape: int) -> tuple[nn.Module, Task]:
    splits = [TensorDataset(torch.rand(8, *shape), torch.zeros(8).long()) for _ in range(3)]
    return model, Task("net", model, Data(*splits), functional.cross_entropy, lambda output, _: 0.0)


BUILD = {
    "attention": lambda: alone(Attention(), 64, 32),
    "merged": merged,
    "tied": lambda: alone(Tied(), 8),
    "functional": lambda: alone(Functional(), 3, 12, 12),
}


@pytest.mark.parametrize("name", BUILD)
def test_the_budget_is_used_where_modules_do_not_tell_what_operations_cost(name) -> None:
    model, task = BUILD[name]()
    whole = total_macs(export_model(model, task.example()))
    for share in (0.7, 0.5):
        smaller = TrainableGate(share)(model, task, budget=0)
        assert share - 0.1 < total_macs(export_model(smaller, task.example())) / whole <= share


def test_each_merged_convolution_counts_for_its_own_weight() -> None:
    model, task = merged()
    owners = set(count_macs(export_model(model, task.example())))
    assert "" not in owners
    assert {name.rpartition(".")[0] for name, value in model.named_parameters() if value.ndim > 1} == owners


def test_the_least_is_counted_before_anything_is_trained(monkeypatch) -> None:
    model, task = BUILD["functional"]()
    graph = trace(model, task.example())
    least = graph.shrink(model, {group.name: range(1, group.size) for group in graph.groups})
    left = total_macs(export_model(least, task.example())) / total_macs(graph.program)
    monkeypatch.setattr("netwright.compress.trainable_gate.train", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(TransformError, match=rf"macs=0\.001 is out of reach: with one unit .* {left:.4f} of"):
        TrainableGate(0.001)(model, task, budget=2)


def test_what_operations_without_a_weight_save_is_spread_over_the_others() -> None:
    model, inputs = build("cross-attention")
    graph = trace(model, inputs)
    groups = [group for group in graph.groups if group.exact]
    macs = MacModel(graph, groups)
    values = {group.name: torch.ones(group.size) for group in groups}
    units = {group.name: range(1, group.size) for group in groups}
    macs.calibrate(opened(values, units), 0.25)
    assert macs.share(opened(values, units)).item() == pytest.approx(0.25, rel=1e-9)
    assert macs.share(opened(values, {})).item() == 1.0
