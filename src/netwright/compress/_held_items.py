"""Some training items, on which changed networks are judged."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from netwright.core.batch_statistics import reestimate
from netwright.core.data import Batch, batches, to_device
from netwright.core.evaluate import device_of
from netwright.core.losses import task_loss
from netwright.core.outputs import take_items
from netwright.core.randomness import isolated
from netwright.core.task import Task

__all__ = ["held_items", "loss_of", "refresh_norms"]

_BATCH = 128


def held_items(task: Task, items: int, seed: int) -> list[Batch]:
    """``items`` training items drawn by ``seed``, in as few batches of at most 128 as they fit in, about equally large.

    Of fewer training items whole batches of 128 are taken, or all where they make none.
    """
    size = len(task.data.train)
    left = items if items <= size else (size - size % _BATCH) or size
    batch = math.ceil(left / math.ceil(left / _BATCH))
    found: list[Batch] = []
    with isolated(seed):
        for inputs, targets in batches(task.data.train, batch, generator=torch.Generator().manual_seed(seed)):
            if left < len(targets):
                inputs, targets = take_items(inputs, torch.arange(left)), targets[:left]
            found.append((inputs, targets))
            left -= len(targets)
            if left == 0:
                break
    return found


def refresh_norms(model: nn.Module, task: Task, seed: int, items: int = 1024) -> None:
    """Let batch norms take their statistics anew, of weights that the last steps of a method have moved by much.

    Running means lag behind: where a penalty or a strong decay shrinks weights within a few steps, they describe a
    network that is gone.
    """
    reestimate(model, (inputs for inputs, _ in held_items(task, items, seed)))


def loss_of(model: nn.Module, task: Task, held: Sequence[Batch]) -> float:
    """The mean loss over some batches, after the batch norms have taken their statistics from them."""
    reestimate(model, [inputs for inputs, _ in held])
    device, total, count = device_of(model), 0.0, 0
    model.eval()
    with torch.no_grad():
        for inputs, targets in held:
            output = task.outputs(model, to_device(inputs, device))
            total += float(task_loss(task, output, targets.to(device))) * len(targets)
            count += len(targets)
    return total / count
