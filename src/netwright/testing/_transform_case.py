"""What the properties of a transform are checked on: one transform on one task, and what is seen of an application."""

import copy
import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import nn

from netwright.core.data import Batch, Dataset, Inputs, batches, first_inputs
from netwright.core.randomness import isolated, save_states
from netwright.core.task import Task
from netwright.core.transform import Transform
from netwright.testing._compare import equal
from netwright.testing._property import expect

__all__ = ["Case", "Observed"]


class Case:
    """One transform on one task."""

    def __init__(self, make: Callable[[], Transform], task: Task, seed: int, onnx_tolerance: float) -> None:
        expect(
            isinstance(task.model, nn.Module) and task.loss is not None,
            f"Task {task.name!r} needs a trained module as its model, and a loss.",
        )
        self.make, self.task, self.seed, self.onnx_tolerance = make, task, seed, onnx_tolerance
        self._model = copy.deepcopy(task.build()).eval()

    def model(self) -> nn.Module:
        """A fresh copy of the task's model, in eval mode."""
        return copy.deepcopy(self._model)

    def apply(self, model: nn.Module, **arguments: Any) -> nn.Module:
        """What the transform makes of ``model``."""
        task = arguments.pop("task", self.task)
        return self.make()(model, task, **{"seed": self.seed, **arguments})

    @cached_property
    def observed(self) -> "Observed":
        """One application, with all that can be seen of it at once: methods may take a while."""
        model, calls, test = self.model().train(), list[tuple[float, str]](), _Watched(self.task.data.test)
        task = dataclasses.replace(self.task, data=dataclasses.replace(self.task.data, test=test))
        with isolated(1):  # not the state in which ``determinism`` applies it again
            before = save_states()
            result = self.apply(model, task=task, progress=lambda fraction, what: calls.append((fraction, what)))
            after = save_states()
        drawn = [name for name in before if not equal(before[name], after[name])]
        return Observed(model, result, drawn, test.read, calls)

    @property
    def result(self) -> nn.Module:
        """The transformed model; not to be changed."""
        return self.observed.result

    def inputs(self, size: int) -> Inputs:
        """The first inputs of the validation set."""
        return first_inputs(self.task.data.val, size)

    def batch(self) -> Batch:
        """The first eight training items."""
        return next(batches(self.task.data.train, 8))


@dataclasses.dataclass(frozen=True)
class Observed:
    """One application of a transform.

    Args:
        model: what it was given, in training mode.
        result: what it returned.
        drawn: the global generators whose state moved.
        read: whether the test split was read.
        calls: of ``progress``.
    """

    model: nn.Module
    result: nn.Module
    drawn: list[str]
    read: bool
    calls: list[tuple[float, str]]


class _Watched:
    """A dataset that knows whether it was read."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.read = dataset, False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        self.read = True
        return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        """Whatever else the dataset has, such as its tensors, is read as well."""
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        self.read = True
        return getattr(self.dataset, name)
