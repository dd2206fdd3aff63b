"""One compression or surgery step, and chains of them."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from torch import nn

from netwright.core.errors import TransformError
from netwright.core.task import Task

__all__ = ["Chain", "Progress", "Transform", "is_transform"]

Progress: TypeAlias = Callable[[float, str], None]
"""Called with the finished fraction in [0, 1] and a word on what is going on."""


@runtime_checkable
class Transform(Protocol):
    """One compression or surgery step: a frozen dataclass of settings that is called with a model."""

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """A new model; the given one is left untouched.

        Args:
            model: the model to work on.
            task: its data, loss and score; only ``train`` and ``val`` may be read.
            budget: epochs of training that the step may spend; None for its own default.
            seed: source of all its randomness.
            progress: told how far it is.

        Raises:
            TransformError: settings that this model cannot meet, or nothing to work on.
        """
        ...


def is_transform(value: object) -> bool:
    """Whether ``value`` can be called as a :class:`Transform` is.

    Example:
        >>> is_transform(nn.ReLU())
        False
    """
    if isinstance(value, type) or not callable(value):
        return False
    try:
        inspect.signature(value).bind(None, None, budget=None, seed=0, progress=None)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, nn.Module)


@dataclass(frozen=True)
class Chain:
    """Several transforms, one after the other; itself a transform.

    The budget is shared out equally among the steps that say ``trains = True``, and the others train nothing; among all
    where none says so. Step ``k`` draws its randomness from ``seed + k``.

    Args:
        steps: the transforms in order.

    Raises:
        TransformError: an empty chain, or a step that is not callable.

    Example:
        >>> from netwright.compress import Int8, Prune
        >>> from netwright.core.task import load_task
        >>> task = load_task("breast-cancer")
        >>> smaller = Chain([Prune(ratios=0.5), Int8()])(task.build(), task)
        >>> smaller(task.example()).shape
        torch.Size([2, 2])
    """

    steps: Sequence[Transform]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        if not self.steps:
            raise TransformError("A Chain needs at least one step.")
        for step in self.steps:
            if not is_transform(step):
                raise TransformError(f"A Chain's steps must be transforms, got {type(step).__name__}.")

    @property
    def trains(self) -> bool:
        """Whether a step trains by itself."""
        return any(_trains(step) for step in self.steps)

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """Apply every step in turn."""
        count = len(self.steps)
        training = [_trains(step) or not self.trains for step in self.steps]
        for position, step in enumerate(self.steps):
            share = None if budget is None else training[position] * budget / sum(training)
            model = step(model, task, budget=share, seed=seed + position, progress=_scaled(progress, position, count))
        return model


def _trains(step: Transform) -> bool:
    return bool(getattr(step, "trains", False))


def _scaled(progress: Progress | None, position: int, count: int) -> Progress | None:
    if progress is None:
        return None
    return lambda fraction, what: progress((position + fraction) / count, what)
