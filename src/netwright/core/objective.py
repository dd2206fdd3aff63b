"""What one iteration minimizes, and the closure through which an optimizer asks for it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from netwright.core.data import Inputs
from netwright.core.errors import NonFiniteLossError, RecipeError, TaskError
from netwright.core.losses import task_loss, teacher_loss
from netwright.core.optimization import closure_kind, make_clip, make_penalty
from netwright.core.outputs import take_items
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.teacher import forward

__all__ = ["Objective"]


class Objective:
    """The loss of a batch: the task's, the teacher's and the recipe's penalty.

    Args:
        model: what is trained.
        task: whose loss is taken.
        recipe: weight of the teacher, penalty, clipping.
        optimizer: decides what kind of closure is made.
        before: called after every backward pass, and after clipping.

    Raises:
        RecipeError: clipping, a penalty or ``before`` with an optimizer that takes its own derivatives.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recipe: Recipe,
        optimizer: Optimizer,
        before: Callable[[], None] | None = None,
    ) -> None:
        self._model, self._task, self._recipe, self._optimizer = model, task, recipe, optimizer
        self._kind = closure_kind(optimizer)
        self._before = before
        self._observe: Callable[[], None] | None = getattr(optimizer, "observe", None)
        self.clip: Any = make_clip(recipe)
        self._penalty = make_penalty(recipe, model)
        if self.clip is not None and self._kind in ("graph", "outputs"):
            raise RecipeError(f"{recipe.optimizer} takes derivatives on its own, so nothing can be clipped. Drop clip.")
        if before is not None and self._kind in ("graph", "outputs"):
            raise RecipeError(f"{recipe.optimizer} takes derivatives on its own, so no hook can see its gradients.")
        if self._penalty is not None and self._kind == "outputs":
            raise RecipeError(f"{recipe.optimizer} works on the outputs alone and takes no penalty. Drop it.")

    def closure(self, inputs: Inputs, targets: Tensor, goal: Any, where: str) -> tuple[Callable[[], Any], list[float]]:
        """The closure of one batch, and the list to which it adds each loss that it computes.

        Args:
            inputs: of the batch.
            targets: of the batch.
            goal: the teacher's outputs, or None.
            where: step, epoch and learning rate in words, for an error.
        """
        seen: list[float] = []

        def closure() -> Any:
            if self._kind not in ("graph", "outputs"):
                self._optimizer.zero_grad()
            if self._observe is not None and len(targets) > 1:
                loss = self._in_halves(inputs, targets, goal, where)
                seen.append(float(loss))
            else:
                output = forward(self._model, self._task, inputs, self._recipe)
                loss = self._loss(output, targets, goal)
                seen.append(self._checked(loss, where))
                if self._kind == "graph":
                    return loss
                if self._kind == "outputs":
                    return loss, self._single(output)
                torch.autograd.backward(loss)
            if self.clip is not None:
                self.clip(self._model.parameters())
            if self._before is not None:
                self._before()
            return loss

        return closure, seen

    def _in_halves(self, inputs: Inputs, targets: Tensor, goal: Any, where: str) -> Tensor:
        """Backward passes of both halves of a batch, of which the optimizer sees the first by itself."""
        assert self._observe is not None
        total = torch.zeros((), device=targets.device)
        for index in torch.arange(len(targets), device=targets.device).tensor_split(2):
            output = forward(self._model, self._task, take_items(inputs, index), self._recipe)
            part = None if goal is None else take_items(goal, index)
            loss = self._loss(output, targets[index], part) * (len(index) / len(targets))
            self._checked(loss, where)
            torch.autograd.backward(loss)
            self._observe()
            total += loss.detach()
        return total

    def _loss(self, output: Any, targets: Tensor, goal: Any) -> Tensor:
        loss = task_loss(self._task, output, targets)
        if goal is not None:
            weight = self._recipe.distill_weight
            distance = teacher_loss(output, goal, targets, self._recipe.distill_temperature)
            loss = (1 - weight) * loss + weight * distance
        return loss if self._penalty is None else loss + self._penalty()

    def _single(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise RecipeError(
                f"{self._recipe.optimizer} needs a model with one output tensor, got {type(output).__name__}. "
                "Pick it with Task(output=...)."
            )
        return output

    def _checked(self, loss: Tensor, where: str) -> float:
        name = self._task.name
        if not loss.requires_grad:
            raise TaskError(
                f"Task {name!r}: the loss does not depend on the model's parameters, so it cannot be trained."
            )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"Task {name!r}: the loss is {value} at {where}. Lower the learning rate, set Recipe(clip_norm=1.0), "
                "or look for values in the data that the loss cannot take, such as log(0)."
            )
        return value
