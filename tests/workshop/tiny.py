"""Small tasks on real data, quick enough for a whole run of optimize in a test."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def data() -> Data:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16
    y = torch.tensor(labels)[order]
    return Data(*(TensorDataset(x[a:b], y[a:b]) for a, b in ((0, 800), (800, 1200), (1200, None))))


def task() -> Task:
    return Task("tiny", network, data(), nn.functional.cross_entropy, accuracy, recipe=Recipe(epochs=4))


def stubborn() -> Task:
    """Trains by a loop of its own, which refuses a network that was made smaller."""

    def fit(model: nn.Module, *, budget: float | None, seed: int, teacher: nn.Module | None = None) -> None:
        if next(model.parameters()).shape[0] != 16:
            raise ValueError("not my network")

    return Task("stubborn", network, data(), None, accuracy, fit=fit)


class Exploding(nn.Module):
    """A loss that is not finite once the network has been made smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def impossible() -> Task:
    """Learns nothing: no candidate can be kept, however it is made."""
    return Task("impossible", network, data(), nn.functional.cross_entropy, accuracy, recipe=Recipe(epochs=0.1))
