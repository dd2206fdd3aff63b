"""Training inside a transform."""

from typing import Any

from torch import nn

from netwright.compress._settings import require_loss
from netwright.core.errors import TransformError
from netwright.core.fit import StepHook, fit
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["train"]


def train(
    owner: object,
    model: nn.Module,
    task: Task,
    *,
    epochs: float,
    seed: int,
    hook: StepHook | None = None,
    teacher: nn.Module | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> nn.Module:
    """Train ``model`` in place by the task's recipe; returns it in eval mode. Zero epochs train nothing.

    Args:
        owner: the transform, for messages.
        model: a copy of the user's.
        task: data, loss and recipe.
        epochs: how long.
        seed: source of the shuffle.
        hook: what the method does within an iteration. It works on the weights as they are: the recipe's
            parameterization, which rewrites them, is left out unless ``changes`` name one.
        teacher: a module whose outputs are to be matched too.
        progress: told the finished fraction.
        changes: settings of the recipe to replace.

    Raises:
        TransformError: where anything is to be trained, a task without a loss, or one that trains by its own ``fit``,
            of whose iterations we see nothing.
    """
    if epochs <= 0:
        return model.eval()
    require_loss(owner, task)
    if task.fit is not None:
        raise TransformError(
            f"{type(owner).__name__} works within every iteration of training, but task {task.name!r} trains by its "
            "own fit=. Use a method without training, budget=0, or let the task be trained by netwright."
        )
    if hook is not None:
        changes = {"parameterization": None, **changes}
    recipe = (task.recipe or Recipe()).lasting(epochs).replace(**changes)
    result = fit(model, task, recipe, seed=seed, teacher=teacher, progress=progress, validate=False, hook=hook)
    return result.model
