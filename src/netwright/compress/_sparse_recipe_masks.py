"""Which single weights stay, by magnitude; and training steps shared out over rounds."""

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from netwright.compress._weights import FlatWeights
from netwright.core.fit import StepHook
from netwright.core.recipe import Recipe
from netwright.core.task import Task

__all__ = [
    "SCOPES",
    "HeldMask",
    "Scope",
    "largest",
    "magnitude_mask",
    "shared_epochs",
    "steps_per_epoch",
]

Scope: TypeAlias = Literal["global", "layer"]
SCOPES: tuple[str, ...] = get_args(Scope)


def largest(values: Tensor, count: int) -> Tensor:
    """``(n,)`` whether an entry is one of the ``count`` largest; of equal ones exactly as many as fit.

    Example:
        >>> largest(torch.tensor([1.0, 3.0, 2.0]), 2).tolist()
        [False, True, True]
    """
    mask = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    if count >= len(values):
        return ~mask
    mask[torch.topk(values, count, sorted=False).indices] = True
    return mask


def magnitude_mask(weights: FlatWeights, sparsity: float, scope: str) -> Tensor:
    """``(weights.size,)`` which weights stay: the largest of all, or of each parameter, at least one of it.

    Args:
        weights: whose magnitudes decide.
        sparsity: the share to go, in [0, 1).
        scope: "global" or "layer".
    """
    size = weights.read().abs()
    if scope == "global":
        return largest(size, weights.dense(1.0 - sparsity))
    places = [place for _, place, _ in weights]
    return torch.cat([largest(size[p], max(1, round((1.0 - sparsity) * (p.stop - p.start)))) for p in places])


class HeldMask(StepHook):
    """Keeps weights outside a mask at zero while a network is trained, and their gradients out of the optimizer.

    Args:
        weights: of the model that is trained.
        mask: ``(weights.size,)`` which stay; None for all. May be replaced between steps.
    """

    def __init__(self, weights: FlatWeights, mask: Tensor | None = None) -> None:
        self.weights, self.mask = weights, mask

    @torch.no_grad()
    def before_step(self, step: int, total: int) -> None:
        """Gradients outside the mask become zero."""
        for _, place, value in self.weights:
            if value.grad is not None and (mask := self._mask_beside(value)) is not None:
                value.grad.mul_(mask[place].view_as(value))

    def after_step(self, step: int, total: int) -> None:
        """Weights outside the mask become zero."""
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set what is outside the mask to zero."""
        for _, place, value in self.weights:
            if (mask := self._mask_beside(value)) is not None:
                value.mul_(mask[place].view_as(value))

    def _mask_beside(self, value: Tensor) -> Tensor | None:
        """The mask, which follows the weights to the device on which they are trained."""
        if self.mask is not None and self.mask.device != value.device:
            self.mask = self.mask.to(value.device)
        return self.mask


def steps_per_epoch(task: Task) -> int:
    """Iterations of one epoch by the task's recipe, at least one."""
    return max(1, len(task.data.train) // (task.recipe or Recipe()).batch_size)


def shared_epochs(task: Task, epochs: float, shares: list[float]) -> list[float]:
    """``epochs`` shared out in proportion to ``shares``, each a whole number of iterations, together never more.

    Args:
        task: whose recipe says how many iterations an epoch has.
        epochs: to share out.
        shares: non-negative; the last part takes what rounding leaves over.
    """
    steps = steps_per_epoch(task)
    total = int(epochs * steps + 1e-9)
    whole = sum(shares)
    parts = [int(total * share / whole) for share in shares]
    parts[-1] += total - sum(parts)
    return [part / steps for part in parts]
