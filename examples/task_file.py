"""A task in a file: ``netwright optimize examples/task_file.py:task --target 'size<=0.3x' --keep 'score>=-0.05'``.

A regression: how far diabetes has progressed after a year, from ten measurements. The model is a builder, so
Netwright trains the baseline by the recipe.
"""

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

from netwright import Data, Recipe, Task
from netwright.core.score import r2


def model() -> nn.Module:
    """An MLP with one output."""
    return nn.Sequential(nn.Linear(10, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))


def task() -> Task:
    """Inputs come scaled; targets are scaled by the training patients' mean and spread."""
    measured, progression = load_diabetes(return_X_y=True)
    order = torch.randperm(len(measured), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(measured, dtype=torch.float32)[order] * 20
    y = torch.tensor(progression, dtype=torch.float32)[order, None]
    y = (y - y[:242].mean()) / y[:242].std()
    parts = (slice(242), slice(242, 342), slice(342, None))
    return Task(
        name="diabetes",
        model=model,
        data=Data(*(TensorDataset(x[part], y[part]) for part in parts)),
        loss=mse_loss,
        score=r2,
        recipe=Recipe(epochs=15, batch_size=32, optimizer_settings={"lr": 1e-3, "weight_decay": 0.1}),
        description="Progression of diabetes after a year; the score is R2.",
    )
