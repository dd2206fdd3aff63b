"""Breast cancer, 30 measurements of cell nuclei: scikit-learn's embedded data and an ordinary MLP."""

import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.core.builtin.networks import mlp
from netwright.core.data import Data
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task

__all__ = ["data", "model", "task"]


def task() -> Task:
    """The task ``breast-cancer``: 341 patients to train on, 114 to choose on, 114 to report on.

    Example:
        >>> [len(split) for split in task().data.splits().values()]
        [341, 114, 114]
    """
    return Task(
        name="breast-cancer",
        model=model,
        data=data(),
        loss=functional.cross_entropy,
        score=accuracy,
        recipe=Recipe(
            epochs=20,
            batch_size=32,
            optimizer_settings={"lr": 2e-3, "fused": True, "weight_decay": 0.05},
            schedule_settings={"max_lr": 2e-3},
        ),
        description="Malignant or benign from 30 measurements of cell nuclei; the score is accuracy.",
    )


def model() -> nn.Sequential:
    """The untrained baseline: 30-256-256-2, 74k parameters."""
    return mlp(30, (256, 256), 2)


def data() -> Data:
    """The three splits, stratified by class and the same on every machine.

    Each of the 30 columns has mean 0 and standard deviation 1 over the training patients; the other splits are
    shifted and scaled by the same numbers.
    """
    measured, labels = load_breast_cancer(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=114, random_state=0, stratify=labels)
    train, val = train_test_split(rest, test_size=114, random_state=0, stratify=labels[rest])
    standard = (measured - measured[train].mean(0)) / measured[train].std(0)
    inputs = torch.tensor(standard, dtype=torch.float32)
    classes = torch.tensor(labels, dtype=torch.long)
    return Data(*(TensorDataset(inputs[index], classes[index]) for index in (train, val, test)))
