"""Batches by index, the forward pass of training, and the teacher's outputs for a batch."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from netwright.core.data import Batch, Dataset, Inputs, batches, call
from netwright.core.errors import TaskError
from netwright.core.evaluate import device_of, predict, settled
from netwright.core.recipe import Recipe
from netwright.core.task import Task

__all__ = ["Teacher", "forward", "take"]

_REMEMBERED = 16_000_000  # elements of a teacher's outputs on the training set that are kept in memory


def take(dataset: Dataset, index: Tensor, device: torch.device | str = "cpu") -> Batch:
    """The items at ``index`` as one batch.

    Args:
        dataset: where the items come from; a ``TensorDataset`` is indexed as a whole.
        index: positions, ``(n,)``.
        device: where the tensors are put.

    Example:
        >>> inputs, targets = take(TensorDataset(torch.arange(4.0), torch.arange(4)), torch.tensor([2, 0]))
        >>> targets.tolist()
        [2, 0]
    """
    part: Dataset
    if type(dataset) is TensorDataset:  # a subclass may well change its items
        part = TensorDataset(*(tensor[index] for tensor in dataset.tensors))
    else:
        part = Subset(dataset, index.tolist())  # type: ignore[arg-type]  # torch's Dataset is a class, ours a protocol
    return next(batches(part, len(index), device=device))


def forward(model: nn.Module, task: Task, inputs: Inputs, recipe: Recipe) -> Any:
    """What the loss sees of a batch: the output under the recipe's precision, in float32."""
    device = device_of(model).type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        result = call(model, inputs)
    return _float(task.read(result))


class Teacher:
    """The outputs that a student is to match: none, given, computed once, or computed batch by batch.

    Args:
        teacher: a module, its outputs on all training items in their order, or None.
        task: data, and how the output is read.
        recipe: its epochs and precision.
        device: where the student trains.

    Raises:
        TaskError: given outputs whose number is not that of the training items.
    """

    def __init__(self, teacher: nn.Module | Tensor | None, task: Task, recipe: Recipe, device: torch.device) -> None:
        self.present = teacher is not None and recipe.distill_weight > 0
        self._task, self._recipe, self._device = task, recipe, device
        self._known: Any = None
        self._module: nn.Module | None = None
        size = len(task.data.train)
        if not self.present:
            return
        if isinstance(teacher, Tensor):
            if len(teacher) != size:
                raise TaskError(
                    f"Task {task.name!r}: the teacher's outputs are for {len(teacher)} items, but there are {size} to "
                    "train on. Take predict(teacher, task, 'train')[0]."
                )
            self._known = teacher.detach()
        else:
            assert teacher is not None
            self._module = teacher if device_of(teacher) == device else copy.deepcopy(teacher).to(device)
            if type(task.data.train) is TensorDataset and recipe.epochs > 1:
                self._remember(size)

    def outputs(self, index: Tensor, inputs: Inputs) -> Any:
        """The teacher's outputs for the training items at ``index``, whose inputs are given; None without a teacher."""
        if not self.present:
            return None
        if self._known is not None:
            return self._known[index].to(self._device)
        assert self._module is not None
        with settled(self._module):
            return forward(self._module, self._task, inputs, self._recipe)

    def _remember(self, size: int) -> None:
        assert self._module is not None
        index = torch.arange(1)
        one = self.outputs(index, take(self._task.data.train, index, self._device)[0])
        if isinstance(one, Tensor) and one.numel() * size <= _REMEMBERED:
            self._known = predict(self._module, self._task, "train", device=device_of(self._module))[0]


def _float(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    if isinstance(output, dict):
        return {key: _float(value) for key, value in output.items()}
    return tuple(map(_float, output)) if isinstance(output, tuple | list) else output
