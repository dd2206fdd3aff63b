"""What claims about compression share: small networks on Fashion-MNIST and digits, trained once for each seed."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.core.builtin.networks import ResNet, mlp
from netwright.core.data import Data
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.task import Task, load_task

Network = Callable[[], nn.Module]


def small_mlp() -> nn.Module:
    """784-40-20-10, 32,170 weights and biases."""
    return nn.Sequential(nn.Flatten(), *mlp(784, (40, 20), 10))


def lenet_300_100() -> nn.Module:
    """784-300-100-10, 266,610 weights and biases."""
    return nn.Sequential(nn.Flatten(), *mlp(784, (300, 100), 10))


def small_cnn() -> nn.Module:
    """Three convolutions with batch norm, two linear layers; for 28 x 28 and for 8 x 8 images."""
    layers: list[nn.Module] = []
    channels = 1
    for width in (16, 32, 32):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if width < 32 or channels == 32 else []
        channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def small_resnet() -> nn.Module:
    """Three basic blocks of 16, 32 and 64 channels; 78k parameters."""
    return ResNet(1, 16, 10)


def task_of(
    network: Network,
    *,
    data: str = "fashion-mnist",
    items: int | None = 10_000,
    epochs: float = 8.0,
    lr: float = 3e-3,
    batch_size: int = 64,
    smoke: bool = False,
) -> Task:
    """A task with a built-in task's data, of which ``items`` are trained on, and a network of one's own.

    With ``smoke`` 600 items, and at most half an epoch.
    """
    base = load_task(data)
    splits = Data(
        _part(base.data.train, 600 if smoke else items),
        _part(base.data.val, 300 if smoke else 5000),
        _part(base.data.test, 300 if smoke else None),
    )
    recipe = Recipe(
        epochs=min(epochs, 0.5) if smoke else epochs,
        optimizer_settings={"lr": lr},
        schedule_settings={"max_lr": lr},
        batch_size=batch_size,
    )
    return Task(f"{data}-{network.__name__}", network, splits, base.loss, base.score, recipe=recipe)


def trained(task: Task, seed: int) -> nn.Module:
    """The task's network after training by its recipe."""
    return fit(task.build(seed), task, seed=seed, device="cpu", validate=False).model


def _part(dataset: object, count: int | None) -> TensorDataset:
    """The first ``count`` of the items in an order that never changes."""
    assert isinstance(dataset, TensorDataset)
    if count is None or count >= len(dataset):
        return dataset
    index = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count]
    return TensorDataset(*(tensor[index] for tensor in dataset.tensors))
