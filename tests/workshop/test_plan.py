"""What a run settles before it searches."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.graph import trace
from netwright.core.task import Task
from netwright.workshop import plan


class Residual(nn.Module):
    """Two branches, the second of which does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(2))
        nn.init.zeros_(self.second[2].weight)
        nn.init.zeros_(self.second[2].bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x)
        return x + self.second(x)


def task_with(targets: torch.Tensor, model: nn.Module | None = None) -> Task:
    """A task of as many items as there are targets."""
    inputs = torch.randn(len(targets), 4, generator=torch.Generator().manual_seed(0))
    splits = Data(*(TensorDataset(inputs, targets) for _ in range(3)))
    return Task("toy", model or Residual(), splits, nn.functional.mse_loss, lambda output, target: 0.0)


@pytest.mark.parametrize(("shape", "items"), [((), 256), ((4,), 256), ((64,), 64), ((128,), 32), ((9000,), 32)])
def test_branches_are_ranked_on_fewer_items_where_each_has_many_targets(shape: tuple[int, ...], items: int) -> None:
    assert plan._ranking_items(task_with(torch.zeros(40, *shape))) == items


def test_the_branch_that_does_nothing_goes_first_with_the_groups_within() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        wanted = model(task_with(torch.zeros(300, 4)).data.train[:][0])  # what the whole network does is right
    task = task_with(wanted, model)
    baseline: Any = SimpleNamespace(model=model)
    found = plan._branches(task, baseline, trace(model, task.example()))
    assert [branch.name.split(".")[0] for branch in found] == ["second", "first"]
    assert [[name.split(".")[0] for name in branch.groups] for branch in found] == [["second"], ["first"]]
