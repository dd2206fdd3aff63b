"""Tasks with one mistake each, as a user would write them; and a sound one."""

import os

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from netwright.core.data import Data
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task

LOSS = nn.functional.cross_entropy
RECIPE = Recipe(epochs=1)


def items(start: int, count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(start)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % 2)


def sound_data() -> Data:
    return Data(items(1, 32), items(2, 16), items(3, 16))


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def good() -> Task:
    return Task("good", network, sound_data(), LOSS, accuracy, recipe=RECIPE)


def raising() -> Task:
    raise RuntimeError("the disk of the data is not mounted")


def wrong_type() -> dict:
    return {"model": network}


not_callable = 7


def empty_split() -> Task:
    return Task("empty", network, Data(items(1, 32), items(2, 0), items(3, 16)), LOSS, accuracy)


def same_split() -> Task:
    split = items(1, 32)
    return Task("same", network, Data(split, split, items(3, 16)), LOSS, accuracy)


def overlapping() -> Task:
    x, y = items(1, 64).tensors
    parts = [TensorDataset(x[part], y[part]) for part in (slice(40), slice(30, 50), slice(50, 64))]
    return Task("overlapping", network, Data(*parts), LOSS, accuracy)


class Ragged(Dataset):
    """Item 5 is longer than the others."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((5 if index == 5 else 4,), float(index)), index % 2


def wrong_shape() -> Task:
    return Task("ragged", network, Data(Ragged(), items(2, 16), items(3, 16)), LOSS, accuracy)


def not_a_number() -> Task:
    train = items(1, 32)
    train.tensors[0][7, 2] = float("nan")
    return Task("holes", network, Data(train, items(2, 16), items(3, 16)), LOSS, accuracy)


class Branching(nn.Module):
    """Its control flow depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() > 0 else self.body(-x)


def untraceable() -> Task:
    return Task("branching", Branching, sound_data(), LOSS, accuracy)


def vector_loss() -> Task:
    loss = nn.CrossEntropyLoss(reduction="none")
    return Task("vector", network, sound_data(), loss, accuracy)


class Scaled(nn.Module):
    """Two numbers: nothing to remove and no matrix to quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] * self.scale


def nothing_to_do() -> Task:
    return Task("scaled", Scaled, sound_data(), LOSS, accuracy, recipe=RECIPE)


def wrong_inputs() -> Task:
    return Task("narrow", lambda: nn.Linear(3, 2), sound_data(), LOSS, accuracy)


def broken_builder() -> Task:
    return Task("builder", lambda: nn.Linear(os.path, 2), sound_data(), LOSS, accuracy)


def no_score() -> Task:
    return Task("no score", network, sound_data(), LOSS)
