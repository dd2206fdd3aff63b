"""How long training takes here, asked by a few steps of it."""

import copy
import time

from torch import Tensor, nn

from netwright.core.errors import TargetError
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.task import Task

__all__ = ["check_pace", "epoch_seconds"]

_WARM_STEPS, _TIMED_STEPS = 2, 6


def check_pace(task: Task, budget: float, seed: int) -> float | None:
    """Seconds that training the baseline takes about; None where it comes trained or trains by its own fit.

    Raises:
        TargetError: more than the whole budget.
    """
    if task.trained or task.fit is not None:
        return None
    recipe = task.recipe or Recipe()
    seconds = recipe.epochs * epoch_seconds(task.build(seed), task, recipe, None)
    if seconds > budget:
        raise TargetError(
            f"Training the baseline takes about {seconds:.0f} s here ({recipe.epochs:g} epochs), more than the whole "
            f"budget of {budget:.0f} s. Give a larger --budget, or a task whose model comes trained."
        )
    return seconds


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
        fit(trial, task, recipe.lasting(count / per_epoch), teacher=teacher, validate=False)
        seconds = (time.perf_counter() - start) * per_epoch / count
    return seconds
