"""How long training takes here, asked by a few steps of it."""

import copy
import time

from torch import Tensor, nn

from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.task import Task

__all__ = ["epoch_seconds"]

_WARM_STEPS, _TIMED_STEPS = 2, 6


def epoch_seconds(model: nn.Module, task: Task, recipe: Recipe, teacher: nn.Module | Tensor | None) -> float:
    """Time of an epoch of training in this process, on its threads; ``model`` is left as it is.

    Args:
        model: what would be trained.
        task: on what.
        recipe: how.
        teacher: what it would imitate.

    Cost: eight iterations, or one epoch where that is shorter.
    """
    per_epoch = max(1, len(task.data.train) // recipe.batch_size)
    trial = copy.deepcopy(model)
    seconds = 0.0
    for steps in (_WARM_STEPS, _TIMED_STEPS):
        count = min(steps, per_epoch)
        start = time.perf_counter()
        fit(trial, task, recipe.replace(epochs=count / per_epoch), teacher=teacher, validate=False)
        seconds = (time.perf_counter() - start) * per_epoch / count
    return seconds
