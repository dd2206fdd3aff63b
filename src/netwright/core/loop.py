"""The iterations of a fit, and the state that a checkpoint holds."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from netwright.core.checkpoint import load_checkpoint, require_same, save_checkpoint
from netwright.core.errors import RunDirectoryError
from netwright.core.evaluate import evaluate
from netwright.core.objective import Objective
from netwright.core.optimization import (
    Parameterization,
    at_rest,
    kept_bytes,
    make_average,
    make_optimizer,
    make_schedule,
)
from netwright.core.randomness import isolated, restore_states, save_states
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.teacher import Teacher, take
from netwright.core.transform import Progress
from netwright.core.zeros import Zeros

__all__ = ["Callback", "FitResult", "Loop", "Record", "StepHook"]

_RECORDS = 20  # a fit leaves about this many points on its training curve, more where it has more epochs


@dataclass(frozen=True)
class Record:
    """A point on the training curve.

    Args:
        step: iterations done.
        epoch: passes over the data done, with its fraction.
        train_loss: mean loss of the iterations since the record before; NaN where a task trains by its own ``fit``.
        val_score: score on ``val`` at the end of an epoch; None between, and where validation is off.
        lr: learning rate of the last iteration.
        seconds: wall time since the start, that before a resume included.
    """

    step: int
    epoch: float
    train_loss: float
    val_score: float | None
    lr: float
    seconds: float


Callback: TypeAlias = Callable[[Record], None]
"""Called with every record as it is made; what it raises ends the fit."""


class StepHook:
    """What a method does within every iteration of a fit: masks, projections, changed gradients. Itself does nothing.

    Steps count from 0 to ``total - 1``. What a hook remembers is not saved with a checkpoint.
    """

    def before_step(self, step: int, total: int) -> None:
        """Called when gradients are there and before the optimizer moves; may change gradients in place."""

    def after_step(self, step: int, total: int) -> None:
        """Called after the optimizer has moved; may change parameters in place."""


@dataclass(frozen=True)
class FitResult:
    """What came of a fit.

    Args:
        model: the trained module, in eval mode; the one that was given, unless the task's own ``fit`` returned another.
        history: the training curve, about 20 points and one at the end of each epoch.
        steps: iterations done.
        seconds: wall time, that before a resume included.
        optimizer_bytes: what the optimizer keeps between steps; 0 where a task trains by its own ``fit``.
    """

    model: nn.Module
    history: tuple[Record, ...]
    steps: int
    seconds: float
    optimizer_bytes: int = 0


class Loop:
    """The state of one fit, and the iterations over it.

    The model keeps its ``parameterization``, which is the recipe's by default: whoever runs the loop removes it.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recipe: Recipe,
        seed: int,
        teacher: nn.Module | Tensor | None,
        device: torch.device,
        validate: bool,
        callbacks: tuple[Callback, ...],
        progress: list[Progress],
        hook: StepHook | None = None,
        parameterization: Parameterization | None = None,
    ) -> None:
        self.model, self.task, self.recipe, self.device = model, task, recipe, device
        self.seed, self.validate, self.callbacks, self.progress = seed, validate, callbacks, progress
        size = len(task.data.train)
        self.per_epoch = max(1, size // recipe.batch_size)
        self.total = max(1, round(recipe.epochs * self.per_epoch))
        self.record_every = math.ceil(self.total / _RECORDS)
        self.teacher = Teacher(teacher, task, recipe, device)
        self.parameterization = parameterization or Parameterization(recipe, model)
        self.optimizer = make_optimizer(recipe, model, self.parameterization.groups)
        self.schedule = make_schedule(recipe, self.optimizer, self.total)
        self.average = make_average(recipe, model)
        self.hook = hook
        self.step = 0
        before = None if hook is None else lambda: hook.before_step(self.step, self.total)
        self.objective = Objective(model, task, recipe, self.optimizer, before)
        self.zeros = Zeros(model) if recipe.keep_zeros else None
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch_start = self.generator.get_state()
        self.losses: list[float] = []
        self.history: list[Record] = []
        self.score: float | None = None
        self.before = 0.0
        self.start = time.monotonic()
        self.said = -math.inf

    def run(self, checkpoint: Path | None, checkpoint_seconds: float) -> FitResult:
        """Resume where there is something to resume from, and iterate to the end."""
        if checkpoint is not None and not checkpoint.parent.is_dir():
            raise RunDirectoryError(f"There is no folder {checkpoint.parent} for the checkpoint. Make it first.")
        if checkpoint is not None:
            self._identity()  # a recipe that cannot be saved is refused before anything is trained
        if checkpoint is not None and checkpoint.exists():
            self._resume(checkpoint)
        saved, saved_step = time.monotonic(), self.step
        self.model.train()
        order = self._order()
        while self.step < self.total:
            position = self.step % self.per_epoch
            if position == 0:
                self.epoch_start = self.generator.get_state()
                order = self._shuffle()
            size = self.recipe.batch_size
            lr = self._iterate(order[position * size : (position + 1) * size])
            self._tell(lr)
            if checkpoint is not None and time.monotonic() - saved >= checkpoint_seconds:
                save_checkpoint(checkpoint, self._state())
                saved, saved_step = time.monotonic(), self.step
        if checkpoint is not None and (saved_step < self.total or not checkpoint.exists()):
            save_checkpoint(checkpoint, self._state())
        self._settle()
        return FitResult(self.model, tuple(self.history), self.step, self._seconds(), kept_bytes(self.optimizer))

    def _iterate(self, index: Tensor) -> float:
        inputs, targets = take(self.task.data.train, index, self.device)
        goal = self.teacher.outputs(index, inputs)
        lr = float(self.optimizer.param_groups[0].get("lr", math.nan))
        epoch = self.step / self.per_epoch
        where = f"step {self.step + 1} of {self.total} (epoch {epoch:.2f}, learning rate {lr:.3g})"
        closure, seen = self.objective.closure(inputs, targets, goal, where)
        self.optimizer.step(closure)
        if self.hook is not None:
            self.hook.after_step(self.step, self.total)
        self._hold_zeros()
        if self.schedule is not None:
            self.schedule.step()
        self.step += 1
        if self.average is not None:
            self.average.update(self.model)
            if self.step % self.per_epoch == 0 or self.step == self.total:
                self.average.end_epoch(self.model)
        self.losses.append(seen[0])
        return lr

    def _settle(self) -> None:
        """Leave in the model what training was for."""
        with at_rest(self.optimizer):
            kept = [parameter.detach().clone() for parameter in self.model.parameters()]
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), kept, strict=True):
                parameter.copy_(value)
        if self.average is not None:
            self.average.put_into(self.model)
        self._hold_zeros()

    def _tell(self, lr: float) -> None:
        ended = self.step % self.per_epoch == 0 or self.step == self.total
        if ended or self.step % self.record_every == 0:
            if ended and self.validate:
                with (
                    at_rest(self.optimizer),
                    isolated(device=self.device),
                    self.average.applied(self.model) if self.average else nullcontext(),
                ):
                    self._hold_zeros()  # an average of iterates has them filled
                    self.score = evaluate(self.model, self.task, "val")
                self._hold_zeros()
            mean = math.fsum(self.losses) / len(self.losses)
            scored = self.score if ended else None
            record = Record(self.step, self.step / self.per_epoch, mean, scored, lr, self._seconds())
            self.losses.clear()
            self.history.append(record)
            for callback in self.callbacks:
                callback(record)
        now = time.monotonic()
        if self.progress and (now - self.said > 0.1 or self.step == self.total):
            self.said = now
            loss = self.losses[-1] if self.losses else self.history[-1].train_loss
            digits = 1 if self.recipe.epochs > 2 else 2
            text = f"epoch {self.step / self.per_epoch:.{digits}f}/{self.recipe.epochs:g}  loss {loss:.4f}"
            text += "" if self.score is None else f"  score {self.score:.4f}"
            for tell in self.progress:
                tell(self.step / self.total, text)

    def _hold_zeros(self) -> None:
        if self.zeros is not None:
            self.zeros.restore()

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    def _shuffle(self) -> Tensor:
        return torch.randperm(len(self.task.data.train), generator=self.generator)

    def _order(self) -> Tensor:
        self.generator.set_state(self.epoch_start)
        return self._shuffle() if self.step % self.per_epoch else torch.empty(0)

    def _identity(self) -> dict[str, Any]:
        shapes = {name: f"{tuple(value.shape)} {value.dtype}" for name, value in self.model.state_dict().items()}
        return {
            "task": self.task.name,
            "seed": self.seed,
            "training items": len(self.task.data.train),
            "teacher": self.teacher.present,
            "validation": self.validate,
            **{f"recipe's {name}": value for name, value in json.loads(self.recipe.to_json()).items()},
            **{f"model's {name}": value for name, value in shapes.items()},
        }

    def _state(self) -> dict[str, Any]:
        within = self.step % self.per_epoch > 0  # else the next epoch starts where the generator now stands
        return {
            "identity": self._identity(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "clip": _state_of(self.objective.clip),
            "parameterization": self.parameterization.state_dict(),
            "epoch_start": self.epoch_start if within else self.generator.get_state(),
            "random": save_states(self.device),
            "step": self.step,
            "losses": list(self.losses),
            "score": self.score,
            "history": [dataclasses.astuple(record) for record in self.history],
            "seconds": self._seconds(),
        }

    def _resume(self, path: Path) -> None:
        state = load_checkpoint(path)
        require_same(path, state["identity"], self._identity())
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if state["clip"] is not None:
            self.objective.clip.load_state_dict(state["clip"])
        self.parameterization.load_state_dict(state.get("parameterization"))  # older checkpoints have none
        self.epoch_start = state["epoch_start"]
        self.step, self.losses, self.score = state["step"], state["losses"], state["score"]
        self.history = [Record(*values) for values in state["history"]]
        self.before = state["seconds"]
        restore_states(state["random"], self.device)


def _state_of(clip: Any) -> Any:
    return clip.state_dict() if hasattr(clip, "load_state_dict") else None
