"""Handwritten digits, 8x8: scikit-learn's embedded data and a ResNet of 1.2M parameters."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.core.builtin.networks import ResNet
from netwright.core.data import Data
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task

__all__ = ["data", "model", "task"]


def task() -> Task:
    """The task ``digits``: 1100 images to train on, 300 to choose on, 397 to report on.

    Example:
        >>> [len(split) for split in task().data.splits().values()]
        [1100, 300, 397]
    """
    return Task(
        name="digits",
        model=model,
        data=data(),
        loss=functional.cross_entropy,
        score=accuracy,
        recipe=Recipe(
            epochs=8, batch_size=64, optimizer_settings={"lr": 2e-3, "fused": True}, schedule_settings={"max_lr": 2e-3}
        ),
        description="Handwritten digits of 8x8 pixels in ten classes; the score is accuracy.",
    )


def model() -> ResNet:
    """The untrained baseline."""
    return ResNet(channels_in=1, width=64, classes=10)


def data() -> Data:
    """The three splits, stratified by class and the same on every machine; images are ``(1, 8, 8)`` in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=397, random_state=0, stratify=labels)
    train, val = train_test_split(rest, test_size=300, random_state=0, stratify=labels[rest])
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    classes = torch.tensor(labels, dtype=torch.long)
    return Data(*(TensorDataset(images[index], classes[index]) for index in (train, val, test)))
