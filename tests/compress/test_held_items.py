"""Batch norms whose statistics lag behind the weights."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.compress import OTO, GlobalSparseMomentum
from netwright.compress._held_items import held_items
from netwright.core.data import Data
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task


def task() -> Task:
    """Two classes told apart by one feature; a batch norm after every layer."""

    def split(seed: int) -> TensorDataset:
        x = torch.randn(512, 8, generator=torch.Generator().manual_seed(seed))
        return TensorDataset(x, (x[:, 0] > 0).long())

    def network() -> nn.Module:
        layers: list[nn.Module] = []
        for inputs in (8, 32, 32):
            layers += [nn.Linear(inputs, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(32, 2))

    recipe = Recipe(epochs=2, batch_size=64, optimizer_settings={"lr": 1e-3}, schedule_settings={"max_lr": 1e-3})
    return Task(
        "halves", network, Data(split(0), split(1), split(2)), nn.functional.cross_entropy, accuracy, recipe=recipe
    )


@pytest.mark.parametrize("method", [OTO(0.5), GlobalSparseMomentum(0.9)], ids=lambda method: type(method).__name__)
def test_statistics_are_those_of_the_weights_that_are_left(method) -> None:
    """In training mode norms normalize exactly; after a re-estimate on the same items evaluation mode does too."""
    given = task()
    torch.manual_seed(0)
    small = method(given.build(0), given, budget=1, seed=0)
    items = torch.cat([inputs for inputs, _ in held_items(given, 512, 0)])
    norm = next(part for part in small.modules() if isinstance(part, nn.BatchNorm1d))
    first = next(part for part in small.modules() if isinstance(part, nn.Linear))
    batches = items.split(128)
    with torch.no_grad():
        mean = torch.stack([first(batch).mean(0) for batch in batches]).mean(0)
        variance = torch.stack([first(batch).var(0) for batch in batches]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-3, atol=1e-4)


def test_items_are_drawn_by_seed_in_equal_batches() -> None:
    given = task()
    once, again, other = held_items(given, 300, 0), held_items(given, 300, 0), held_items(given, 300, 1)
    assert [len(targets) for _, targets in once] == [100, 100, 100]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0][0], other[0][0])
    assert [len(targets) for _, targets in held_items(given, 5, 0)] == [5]
