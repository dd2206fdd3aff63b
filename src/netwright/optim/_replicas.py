"""Gradients of one loss at several points at a time, in threads over copies of a model."""

import copy
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from netwright.core.errors import SettingError

__all__ = ["Evaluate", "Replicas", "Result"]

Result: TypeAlias = tuple[Tensor, Sequence[Tensor | None]]
"""The loss at a point, and its gradient in every parameter."""

Evaluate: TypeAlias = Callable[[Sequence[Tensor], Sequence[Sequence[Tensor]], Any], Sequence[Result]]
"""``evaluate(parameters, points, closure)``: a :data:`Result` for each point, which is tensors like the parameters."""


class Replicas:
    """Evaluates gradients at several points in parallel: threads, each with a copy of the model.

    Give it to :class:`~netwright.optim.OptEx` as ``evaluate``; the closure of ``step`` then takes a model and returns
    the loss: ``optimizer.step(lambda model: loss(model(inputs), targets))``. It must use nothing but that model's
    parameters. Everything else is taken from the model before: buffers (statistics of batch normalization), other
    parameters, what is trained, and which parts are in training mode. The first copy's buffers are put back after.
    Random numbers (dropout) come in no fixed order when ``threads`` is above one.

    Cost: one copy of the model per point.

    Args:
        model: whose parameters the optimizer moves.
        threads: points evaluated at a time.

    Raises:
        SettingError: not a module, no thread, or, on a call, a parameter that is not the model's.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> weights = list(model.parameters())
        >>> point = [torch.ones(1, 2), torch.zeros(1)]
        >>> [(loss, grads)] = Replicas(model)(weights, [point], lambda copied: copied(torch.ones(3, 2)).mean())
        >>> loss.item(), grads[0].tolist()
        (2.0, [[1.0, 1.0]])
    """

    def __init__(self, model: nn.Module, threads: int = 4) -> None:
        if not isinstance(model, nn.Module):
            raise SettingError(f"Replicas: model must be an nn.Module, got {type(model).__name__}.")
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise SettingError(f"Replicas: threads must be a positive integer, got {threads!r}.")
        self.model, self.threads = model, threads
        self._copies: list[nn.Module] = []

    def __call__(self, parameters: Sequence[Tensor], points: Sequence[Sequence[Tensor]], closure: Any) -> list[Result]:
        """Loss and gradients at every point."""
        if not callable(closure):
            raise SettingError("Replicas: step needs a closure that takes a model and returns the loss.")
        places: dict[Tensor, int] = {param: place for place, param in enumerate(self.model.parameters())}
        if any(param not in places for param in parameters):
            raise SettingError("Replicas: the optimizer moves parameters that are not the model's. Give both the same.")
        where = [places[param] for param in parameters]
        while len(self._copies) < len(points):
            self._copies.append(copy.deepcopy(self.model))

        def gradients(task: tuple[nn.Module, Sequence[Tensor]]) -> Result:
            copied, point = task
            _follow(copied, self.model, set(where))
            moved = list(copied.parameters())
            chosen = [moved[place] for place in where]
            with torch.no_grad():
                for target, value in zip(chosen, point, strict=True):
                    target.copy_(value)
            with torch.enable_grad():
                loss = closure(copied)
                return loss.detach(), torch.autograd.grad(loss, chosen, allow_unused=True)

        tasks = list(zip(self._copies, points, strict=False))
        if self.threads == 1:
            results = [gradients(task) for task in tasks]
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                results = list(pool.map(gradients, tasks))
        with torch.no_grad():
            for target, value in zip(self.model.buffers(), self._copies[0].buffers(), strict=True):
                target.copy_(value)
        return results


@torch.no_grad()
def _follow(copied: nn.Module, model: nn.Module, without: Collection[int]) -> None:
    """Make a copy like the model again, apart from the values of the parameters in the places of ``without``."""
    for part, whole in zip(copied.modules(), model.modules(), strict=True):
        part.training = whole.training
    for place, (target, value) in enumerate(zip(copied.parameters(), model.parameters(), strict=True)):
        target.requires_grad_(value.requires_grad)
        if place not in without:
            target.copy_(value)
    for buffer, held in zip(copied.buffers(), model.buffers(), strict=True):
        buffer.copy_(held)
