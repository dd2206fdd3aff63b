"""A recipe's optimizer and schedule, built for a model."""

import inspect
from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from netwright.core.errors import RecipeError
from netwright.core.recipe import Recipe, resolve

__all__ = ["make_optimizer", "make_schedule"]

_LENGTHS = ("total_steps", "T_max", "total_iters")
_OTHER_LENGTHS = {"epochs", "steps_per_epoch"}


def make_optimizer(recipe: Recipe, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The recipe's optimizer over those parameters that require a gradient.

    Raises:
        RecipeError: nothing to train, a path that leads to no optimizer, or settings that it refuses.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if not trainable:
        raise RecipeError("The model has no parameter that requires a gradient, so there is nothing to train.")
    factory = resolve(recipe.optimizer)
    try:
        optimizer = factory(trainable, **recipe.optimizer_settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"{recipe.optimizer} refuses the settings {dict(recipe.optimizer_settings)}: {error}"
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise RecipeError(f"{recipe.optimizer} is not a torch.optim.Optimizer.")
    return optimizer


def make_schedule(recipe: Recipe, optimizer: Optimizer, steps: int) -> LRScheduler | None:
    """The recipe's schedule, told the number of iterations where its signature asks for it; or None.

    Args:
        recipe: names the schedule and its settings.
        optimizer: whose learning rate is moved.
        steps: iterations of the whole fit; fills ``total_steps``, ``T_max`` or ``total_iters`` where not given.

    Raises:
        RecipeError: a path that leads to no schedule, settings that it refuses, or a schedule that is stepped by a
            metric and not by iterations.
    """
    if recipe.schedule is None:
        return None
    factory = resolve(recipe.schedule)
    settings = dict(recipe.schedule_settings)
    if not _OTHER_LENGTHS & settings.keys():
        known = inspect.signature(factory).parameters
        settings = {name: steps for name in _LENGTHS if name in known} | settings
    try:
        schedule = factory(optimizer, **settings)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise RecipeError(f"{recipe.schedule} refuses the settings {settings}: {error}") from error
    if isinstance(schedule, ReduceLROnPlateau) or not isinstance(schedule, LRScheduler):
        raise RecipeError(
            f"{recipe.schedule} is not a schedule that is stepped once per iteration. "
            "Take one of torch.optim.lr_scheduler, such as OneCycleLR or CosineAnnealingLR."
        )
    return schedule
