"""Gradients of single items or of small batches, as the rows of one matrix."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree

from netwright.compress._weights import FlatWeights, Told, loss_gradients, training_batches
from netwright.core.data import Batch, batches
from netwright.core.errors import NetwrightError, TransformError
from netwright.core.losses import task_loss
from netwright.core.task import Task

__all__ = ["gradient_rows"]

_CHUNK = 1 << 24  # entries of gradients that are held twice at a time


def gradient_rows(
    model: nn.Module,
    weights: FlatWeights,
    task: Task,
    *,
    count: int,
    items: int = 1,
    seed: int = 0,
    told: Told | None = None,
) -> Tensor:
    """Gradients of the mean loss of ``items`` training items each, ``(n, weights.size)`` with n at most ``count``.

    Single items are differentiated together by ``torch.func`` where the model permits, else one after the other, as
    small batches are.

    Args:
        model: the model that ``weights`` belongs to, in eval mode.
        weights: with respect to what.
        task: loss and training split.
        count: rows, fewer where the split is smaller.
        items: for each row.
        seed: draws the items.
        told: called with the finished fraction.

    Raises:
        TransformError: a training split of fewer than ``items`` items, or gradients that are not finite.

    Cost: a forward and a backward pass for each item, and the matrix that is returned.
    """
    device = next(iter(weights.parameters.values())).device
    if items == 1:
        rows = _together(model, weights, task, count, seed, device)
        if rows is not None:
            if not bool(rows.isfinite().all()):
                raise TransformError(
                    f"Task {task.name!r}: gradients are not finite on an item of its training data. Train the model "
                    "to a finite loss first."
                )
            return rows
    return loss_gradients(model, weights, task, training_batches(task, items, count, seed, device), told)


def _together(
    model: nn.Module, weights: FlatWeights, task: Task, count: int, seed: int, device: torch.device
) -> Tensor | None:
    """Rows by ``torch.func``, or None where the model or the loss cannot be mapped over."""
    fixed = {name: value.detach() for name, value in (*model.named_parameters(), *model.named_buffers())}
    free = {name: fixed.pop(name) for name in weights.parameters}

    def loss_of(values: dict[str, Tensor], inputs: object, target: Tensor) -> Tensor:
        single = _pytree.tree_map(lambda leaf: leaf.unsqueeze(0), inputs)
        kwargs = single if isinstance(single, dict) else {}
        args = () if isinstance(single, dict) else single if isinstance(single, tuple) else (single,)
        output = functional_call(model, {**fixed, **values}, args, kwargs)
        return task_loss(task, task.read(output), target.unsqueeze(0))

    each = vmap(grad(loss_of), in_dims=(None, 0, 0))
    width = max(1, min(count, _CHUNK // weights.size))
    rows = weights.read().new_empty(weights.size, min(count, len(task.data.train))).mT
    done = 0
    try:
        for inputs, targets in _some(task, width, len(rows), seed, device):
            found = each(free, inputs, targets)
            for name, place, _ in weights:
                rows[done : done + len(targets), place] = found[name].flatten(1)
            done += len(targets)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, NetwrightError):
        return None  # the loop over items answers, or says what is wrong
    return rows


def _some(task: Task, width: int, count: int, seed: int, device: torch.device) -> Sequence[Batch]:
    """The first ``count`` items of the shuffled training split, in batches of ``width``."""
    found: list[Batch] = []
    left = count
    generator = torch.Generator().manual_seed(seed)
    for inputs, targets in batches(task.data.train, width, generator=generator, device=device):
        cut = min(left, len(targets))
        found.append((_pytree.tree_map(lambda leaf, cut=cut: leaf[:cut], inputs), targets[:cut]))
        left -= cut
        if left == 0:
            break
    return found
