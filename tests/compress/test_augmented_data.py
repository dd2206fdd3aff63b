"""Datasets that draw from the global generators, as augmentation does: no trace of it, and the same result again."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.compress import (
    CHITA,
    HESSO,
    OTO,
    SWAP,
    ActivatingPruner,
    DeepReDuce,
    GlobalSparseMomentum,
    GroupEnvelope,
    LayerMerge,
    Prune,
    SparseRecipe,
    TrainableGate,
)
from netwright.compress._held_items import held_items
from netwright.compress._weights import training_batches
from netwright.core.data import Data
from netwright.core.randomness import save_states
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task
from netwright.testing import check_transform, transform_properties
from netwright.testing._compare import equal


class Noisy:
    """Images with noise that is new each time they are read."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(40, 1, 6, 6, generator=generator)
        self.labels = torch.randint(2, (40,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        flip = random.random() + np.random.rand()  # noqa: NPY002 - the legacy generator is the point
        return self.images[index] * flip + 0.5 * torch.randn(1, 6, 6), self.labels[index]


def noisy_task(seed: int = 0) -> Task:
    torch.manual_seed(0)
    conv = [nn.Conv2d(size, 8, 3, padding=1, bias=False) for size in (1, 8, 8)]
    layers = [layer for each in conv for layer in (each, nn.BatchNorm2d(8), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(288, 2)).eval()
    recipe = Recipe(epochs=1, batch_size=16)
    plain = [TensorDataset(each.images, each.labels) for each in (Noisy(1), Noisy(2))]  # the suite compares outputs
    return Task("noisy", model, Data(Noisy(seed), *plain), functional.cross_entropy, accuracy, recipe=recipe)


METHODS = [
    CHITA(0.9, stages=2, gradients=8, batch_size=4),
    SWAP(0.9, stages=2, gradients=8, batch_size=4),
    SparseRecipe(0.9),
    GlobalSparseMomentum(0.9),
    ActivatingPruner(0.9, rounds=1),
    Prune(0.5, saliency="taylor", batches=2, batch_size=8),
    OTO(0.5),
    HESSO(0.5),
    GroupEnvelope(0.5),
    TrainableGate(0.5),
    LayerMerge(0.8, cost="macs", items=32, span=2),
    LayerMerge(0.8, cost="macs", items=32, span=2, probe=0.5),
    DeepReDuce(0.5),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_methods_leave_no_trace_and_repeat_themselves(method) -> None:
    others = set(transform_properties()) - {"random_state", "determinism"}
    check_transform(lambda: method, models=[noisy_task()], skip=others)


DRAW = {
    "held": lambda task: held_items(task, 20, 3),
    "training": lambda task: training_batches(task, 8, 2, 3, torch.device("cpu")),
}


@pytest.mark.parametrize("name", DRAW)
def test_items_are_drawn_apart_from_the_callers_generators(name) -> None:
    task, draw = noisy_task(), DRAW[name]
    before = save_states()
    first = draw(task)
    assert equal(before, save_states())
    torch.rand(5)
    random.random()
    for (left, _), (right, _) in zip(first, draw(task), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(first[0][0], draw(noisy_task(1))[0][0])
