"""A small task of pictures for what runs on a CUDA device."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task


class StopError(Exception):
    """Where a training or a search is cut off."""


def images(size: int, seed: int) -> TensorDataset:
    """Noise ``(size, 1, 8, 8)`` around the class, of three."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (size,), generator=generator)
    return TensorDataset(torch.randn(size, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1), labels)


def make_task(model: Callable[[], nn.Module], **recipe: Any) -> Task:
    """96 images to train ``model`` on, four epochs of batches of 16 where the recipe does not say otherwise."""
    data = Data(images(96, 0), images(48, 1), images(48, 2))
    settings = Recipe(**{"epochs": 4, "batch_size": 16, **recipe})
    return Task("images", model, data, functional.cross_entropy, accuracy, recipe=settings)
