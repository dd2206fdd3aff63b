"""What relaxed searches have in common: their settings, and how they are called."""

import copy
import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path

from torch import nn
from torch.optim import SGD, Adam, Optimizer

from netwright.core.console import ConsoleProgress
from netwright.core.errors import SettingError
from netwright.core.evaluate import device_of
from netwright.core.randomness import isolated
from netwright.core.task import Task
from netwright.core.transform import Progress
from netwright.search._relaxed_loop import Loop, RelaxedResult, Stepper
from netwright.search.relaxed import alphas, mixed, weights

__all__ = ["GradientSearch", "RelaxedSearch"]

_POSITIVE = {"epochs", "batch_size", "lr", "alpha_lr", "clip_norm"}
_WHOLE = {"epochs", "batch_size", "order", "warmup", "window"}


@dataclass(frozen=True, kw_only=True)
class RelaxedSearch(ABC):
    """Settings of the weights' training, and the call."""

    epochs: int = 50
    batch_size: int = 64
    lr: float = 0.025
    momentum: float = 0.9
    weight_decay: float = 3e-4
    clip_norm: float | None = 5.0

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or isinstance(value, bool | str):
                continue
            wanted = "a positive" if field.name in _POSITIVE else "a non-negative"
            number = "whole number" if field.name in _WHOLE else "number"
            good = isinstance(value, int) if field.name in _WHOLE else isinstance(value, int | float)
            if not good or not math.isfinite(value) or value < 0 or (field.name in _POSITIVE and value == 0):
                raise SettingError(f"{kind}: {field.name} must be {wanted}, finite {number}, got {value!r}.")
        if self.momentum >= 1:
            raise SettingError(f"{kind}: momentum must be below 1, got {self.momentum!r}.")

    def search(
        self,
        model: nn.Module,
        task: Task,
        *,
        seed: int = 0,
        progress: Progress | None = None,
        console: bool = False,
        checkpoint: Path | None = None,
    ) -> RelaxedResult:
        """Search among the operations of ``model``'s :class:`~netwright.search.relaxed.Mixed` parts.

        The training data are halved by ``seed``. ``val`` is read for the scores of the report alone, ``test`` never.

        Args:
            model: any module with ``Mixed`` parts; left as it is. The search runs on its device.
            task: data, loss and score.
            seed: source of the halves, the shuffles and every other draw.
            progress: told the finished fraction, and loss and score in words.
            console: show progress and the time left on standard error.
            checkpoint: file to resume from where it exists, and to write after every epoch. A search that was
                interrupted ends in the same weights as one that was not, to the last bit.

        Raises:
            SettingError: a model without ``Mixed`` parts, or without weights to train beside what chooses among them.
            NonFiniteLossError: a loss that is NaN or infinite; it names the step.
            TaskError: fewer than two training items, or a task without a loss of its own.
            RunDirectoryError: a checkpoint of another search, or one that cannot be written.
            CorruptRunError: a checkpoint that is truncated or damaged.
        """
        if not weights(model):
            raise SettingError(
                f"{type(model).__name__} has no trainable weights beside the alphas of its Mixed parts, and a search "
                "trains both. Unfreeze a layer, or put one into the network."
            )
        device = device_of(model)
        shown = ConsoleProgress(f"searching {task.name}") if console else nullcontext()
        with isolated(seed, device), shown as bar:
            told = [entry for entry in (progress, bar.update if bar is not None else None) if entry is not None]
            network = copy.deepcopy(model)
            for part in mixed(network).values():
                part.path = None
            return Loop(self._stepper(network, seed), task, self, seed, told, device).run(checkpoint)

    @abstractmethod
    def _stepper(self, network: nn.Module, seed: int) -> Stepper:
        """What one iteration does to ``network``, which is the search's own."""

    def _mover(self, network: nn.Module) -> Optimizer:
        """Stochastic gradient descent on the weights."""
        return SGD(weights(network), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class GradientSearch(RelaxedSearch):
    """A search that moves alphas by gradients."""

    alpha_lr: float = 3e-4
    alpha_decay: float = 1e-3

    def _alpha_mover(self, network: nn.Module) -> Optimizer:
        """Adam on the alphas, with little memory, as in DARTS."""
        found = list(alphas(network).values())
        return Adam(found, lr=self.alpha_lr, betas=(0.5, 0.999), weight_decay=self.alpha_decay)
