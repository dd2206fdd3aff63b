"""Three small trained networks with their tasks, on which transforms are tried."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task

__all__ = ["small_tasks"]

_CLASSES = 3
_SIZES = (64, 32, 32)
_RECIPE = Recipe(batch_size=16, epochs=2, optimizer_settings={"lr": 5e-3}, schedule=None, schedule_settings={})


class ResidualBlock(nn.Module):
    """Two convolutions with batch norms around a skip connection."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(hidden)
        self.second = nn.Conv2d(hidden, channels, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(b, c, h, w)`` to images of the same shape."""
        inner = self.first_norm(self.first(x)).relu()
        return torch.relu(x + self.second_norm(self.second(inner)))


class AttentionBlock(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm and around a skip connection."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.size = width // heads
        self.norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Sequences ``(b, t, width)`` to sequences of the same shape."""
        inner = self.norm(x)
        query, key, value = (
            part(inner).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        changed: Tensor = self.down(functional.gelu(self.up(self.second_norm(x))))
        return x + changed


class Transformer(nn.Module):
    """Tokens ``(b, t)`` to logits ``(b, 3)``, by one attention block and the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(12, 16), nn.Parameter(torch.randn(6, 16) / 4)
        self.block = AttentionBlock(16, 4, 24)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, _CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of each sequence."""
        logits: Tensor = self.head(self.norm(self.block(self.tokens(tokens) + self.places)).mean(1))
        return logits


def small_tasks(seed: int = 0) -> tuple[Task, ...]:
    """A residual convolutional net, a multilayer perceptron and a transformer, each trained for two epochs.

    The data are synthetic: noisy copies of one pattern per class, and sequences whose first token tells the class.

    Args:
        seed: source of data, initialization and training.

    Example:
        >>> [task.name for task in small_tasks()]
        ['small-cnn', 'small-mlp', 'small-transformer']

    Cost: about half a second.
    """
    images = _patterns(seed, (1, 8, 8))
    return (
        _trained("small-cnn", _convolutional, images, seed),
        _trained("small-mlp", _perceptron, _patterns(seed, (20,)), seed),
        _trained("small-transformer", Transformer, _sequences(seed), seed),
    )


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        ResidualBlock(12, 16),
        nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, _CLASSES),
    )


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, _CLASSES))


def _patterns(seed: int, shape: tuple[int, ...]) -> Data:
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(_CLASSES, *shape, generator=generator)

    def split(size: int) -> TensorDataset:
        labels = torch.randint(_CLASSES, (size,), generator=generator)
        return TensorDataset(patterns[labels] + 0.5 * torch.randn(size, *shape, generator=generator), labels)

    return Data(*map(split, _SIZES))


def _sequences(seed: int) -> Data:
    generator = torch.Generator().manual_seed(seed)

    def split(size: int) -> TensorDataset:
        tokens = torch.randint(12, (size, 6), generator=generator)
        return TensorDataset(tokens, tokens[:, 0] % _CLASSES)

    return Data(*map(split, _SIZES))


def _trained(name: str, build: Callable[[], nn.Module], data: Data, seed: int) -> Task:
    task = Task(name, build, data, loss=functional.cross_entropy, score=accuracy, recipe=_RECIPE)
    return dataclasses.replace(task, model=fit(task.build(seed), task, seed=seed, device="cpu", validate=False).model)
