"""What a recipe names, built for a model: parameterization, optimizer, schedule, clipping, average, penalty."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from netwright.core.average import MovingAverage
from netwright.core.errors import NetwrightError, RecipeError
from netwright.core.named import giving, making_callables, taking
from netwright.core.parametrized import fold_parametrizations, parametrized_names
from netwright.core.recipe import SCHEDULE_LENGTHS, Recipe, resolve

__all__ = [
    "Parameterization",
    "at_rest",
    "closure_kind",
    "kept_bytes",
    "make_average",
    "make_clip",
    "make_optimizer",
    "make_penalty",
    "make_schedule",
]

Groups: TypeAlias = list[dict[str, Any]]

_OTHER_LENGTHS = {"epochs", "steps_per_epoch"}


class Parameterization:
    """A model as the recipe rewrites it for training, and the way back.

    Args:
        recipe: names the function that rewrites the model in place. It may return parameter groups for the optimizer,
            or an object whose ``remove()`` undoes it; one with ``state_dict`` and ``load_state_dict`` is saved with a
            checkpoint.
        model: what is rewritten.

    Raises:
        RecipeError: a function that cannot be called so, or that refuses the model or the settings.
    """

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        self._model = model
        self._before = parametrized_names(model)
        self._found: Any = None
        path = recipe.parameterization
        if path is not None:
            self._found = _call(taking(path, nn.Module), path, recipe.parameterization_settings, model)

    @property
    def groups(self) -> Groups | None:
        """Parameter groups that the parameterization asks for."""
        groups = isinstance(self._found, list) and all(isinstance(entry, dict) for entry in self._found)
        return self._found if groups and self._found else None

    def state_dict(self) -> Any:
        """What the parameterization keeps beside the model, where it can be loaded again; else None."""
        return self._found.state_dict() if hasattr(self._found, "load_state_dict") else None

    def load_state_dict(self, state: Any) -> None:
        """Go on with what :meth:`state_dict` returned."""
        if state is not None:
            self._found.load_state_dict(state)

    def remove(self) -> None:
        """Fold everything into plain weights that compute the same."""
        if not isinstance(self._found, list) and hasattr(self._found, "remove"):
            self._found.remove()
        fold_parametrizations(self._model, self._before)


def make_optimizer(recipe: Recipe, model: nn.Module, groups: Groups | None = None) -> Optimizer:
    """The recipe's optimizer over those parameters of ``model`` that require a gradient.

    Args:
        recipe: names the optimizer and its settings.
        model: what is trained.
        groups: parameter groups with settings of their own; None is one group of all parameters.

    Raises:
        RecipeError: nothing to train, a path that leads to no optimizer, or settings that it refuses.
    """
    if groups is None:
        trainable: Any = [parameter for parameter in model.parameters() if parameter.requires_grad]
    else:
        kept = [[param for param in group["params"] if param.requires_grad] for group in groups]
        trainable = [{**group, "params": params} for group, params in zip(groups, kept, strict=True) if params]
    if not trainable:
        raise RecipeError("The model has no parameter that requires a gradient, so there is nothing to train.")
    factory = giving(recipe.optimizer, Optimizer)
    settings = dict(recipe.optimizer_settings)
    if "model" in inspect.signature(factory).parameters:
        settings = {"model": model, **settings}
    try:
        optimizer = factory(trainable, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"{recipe.optimizer} refuses the settings {dict(recipe.optimizer_settings)}: {error}"
        ) from error
    if not isinstance(optimizer, Optimizer):
        raise RecipeError(f"{recipe.optimizer} is not a torch.optim.Optimizer.")
    return optimizer


def closure_kind(optimizer: Optimizer) -> str:
    """What closure ``optimizer.step`` asks for by its attribute ``closure_kind``.

    ``"optional"`` and ``"loss"``: the closure clears the gradients, runs backward and returns the loss. ``"graph"``: it
    returns the loss and does not run backward. ``"outputs"``: it returns the loss and the outputs, without backward.

    Example:
        >>> import torch
        >>> closure_kind(torch.optim.SGD([torch.zeros(1)]))
        'optional'
    """
    return str(getattr(optimizer, "closure_kind", "optional"))


@contextmanager
def at_rest(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the parameters are where they are to be evaluated, afterwards where the optimizer goes on.

    Optimizers whose two places differ say so by a context manager ``averaged``, or by ``eval`` and ``train``. One that
    wraps another, under the name ``optimizer``, need not repeat it.
    """
    inner = getattr(optimizer, "optimizer", None)
    if hasattr(optimizer, "averaged"):
        with optimizer.averaged():
            yield
    elif hasattr(optimizer, "eval") and hasattr(optimizer, "train"):
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
    elif isinstance(inner, Optimizer):
        with at_rest(inner):
            yield
    else:
        yield


def kept_bytes(optimizer: Optimizer) -> int:
    """What the optimizer keeps between steps: all tensors with dimensions in its ``state_dict``, however deep.

    Example:
        >>> import torch
        >>> kept_bytes(torch.optim.Adam([torch.zeros(3)]))  # before the first step
        0
    """
    return sum(value.nbytes for value in _tensors(optimizer.state_dict()) if value.ndim > 0)


def _tensors(kept: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    if isinstance(kept, Tensor):
        yield kept
    elif isinstance(kept, Mapping | list | tuple):
        for part in kept.values() if isinstance(kept, Mapping) else kept:
            yield from _tensors(part)


def make_clip(recipe: Recipe) -> Any:
    """What clips the gradients: a function of the parameters; or None.

    An object that has ``state_dict`` and ``load_state_dict`` is saved with a checkpoint.

    Raises:
        RecipeError: as for :class:`Parameterization`.
    """
    if recipe.clip is None:
        limit = recipe.clip_norm
        return None if limit is None else lambda params: nn.utils.clip_grad_norm_(params, limit)
    return _callable(recipe.clip, _call(making_callables(recipe.clip), recipe.clip, recipe.clip_settings))


def make_average(recipe: Recipe, model: nn.Module) -> MovingAverage | None:
    """What averages the weights, or None.

    Raises:
        RecipeError: as for :class:`Parameterization`.
    """
    if recipe.average is None:
        return None
    kind = resolve(recipe.average_method)
    missing = [name for name in dir(MovingAverage) if not name.startswith("_") and not hasattr(kind, name)]
    if missing:
        raise RecipeError(f"{recipe.average_method} cannot average weights: it has no {', '.join(missing)}.")
    found: MovingAverage = _call(kind, recipe.average_method, recipe.average_settings, model, recipe.average)
    return found


def make_penalty(recipe: Recipe, model: nn.Module) -> Callable[[], Tensor] | None:
    """What is added to the loss, or None.

    Raises:
        RecipeError: as for :class:`Parameterization`.
    """
    if recipe.penalty is None:
        return None
    made = _call(taking(recipe.penalty, nn.Module), recipe.penalty, recipe.penalty_settings, model)
    found: Callable[[], Tensor] = _callable(recipe.penalty, made)
    return found


def _call(function: Any, path: str, settings: Mapping[str, Any], *arguments: Any) -> Any:
    try:
        return function(*arguments, **settings)
    except (TypeError, ValueError, RuntimeError, NetwrightError) as error:
        raise RecipeError(f"{path} refuses the settings {dict(settings)}: {error}") from error


def _callable(path: str, found: Any) -> Any:
    if not callable(found):
        raise RecipeError(f"{path} must give something to call, got {type(found).__name__}.")
    return found


def make_schedule(recipe: Recipe, optimizer: Optimizer, steps: int) -> LRScheduler | None:
    """The recipe's schedule, told the number of iterations where its signature asks for it; or None.

    A schedule that also moves the momentum does so only where the optimizer has one that the recipe leaves to its
    default, and that default is not 0.

    Args:
        recipe: names the schedule and its settings.
        optimizer: whose learning rate is moved.
        steps: iterations of the whole fit; fills ``total_steps``, ``T_max`` or ``total_iters`` where not given, as
            the optimizer's own rate fills ``max_lr``.

    Raises:
        RecipeError: an optimizer without a learning rate, a path that leads to no schedule, settings that it refuses, a
            schedule that is stepped by a metric and not by iterations, or one that ends before the fit does.
    """
    if recipe.schedule is None:
        return None
    if any("lr" not in group for group in optimizer.param_groups):
        raise RecipeError(
            f"{recipe.optimizer} has no learning rate for {recipe.schedule} to move. Set schedule=None (on the command "
            "line, schedule=none)."
        )
    factory = giving(recipe.schedule, LRScheduler)
    settings = dict(recipe.schedule_settings)
    known = inspect.signature(factory).parameters
    if "max_lr" in known and "max_lr" not in settings:
        settings["max_lr"] = [float(group["lr"]) for group in optimizer.param_groups]
    if "cycle_momentum" in known and "cycle_momentum" not in settings and not _leaves_momentum(recipe, optimizer):
        settings["cycle_momentum"] = False
    if not _OTHER_LENGTHS & settings.keys():
        settings = {name: steps for name in SCHEDULE_LENGTHS if name in known} | settings
    try:
        schedule = factory(optimizer, **settings)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise RecipeError(f"{recipe.schedule} refuses the settings {settings}: {error}") from error
    if isinstance(schedule, ReduceLROnPlateau) or not isinstance(schedule, LRScheduler):
        raise RecipeError(
            f"{recipe.schedule} is not a schedule that is stepped once per iteration. "
            "Take one of torch.optim.lr_scheduler, such as OneCycleLR or CosineAnnealingLR."
        )
    length = getattr(schedule, "total_steps", steps)  # what OneCycleLR refuses to go beyond
    if length < steps:
        raise RecipeError(
            f"{recipe.schedule} is given {length} iterations, but the fit has {steps}. Leave its length out: it is "
            "filled in."
        )
    return schedule


def _leaves_momentum(recipe: Recipe, optimizer: Optimizer) -> bool:
    """Whether the optimizer has a momentum that a schedule may move: one that nobody has set, and that is not 0."""
    names = {"momentum", "betas"}
    if not names & optimizer.defaults.keys() or names & set(_named(recipe.optimizer_settings)):
        return False
    return all(group.get("momentum", 1.0) != 0 for group in optimizer.param_groups)


def _named(settings: Mapping[str, Any]) -> Iterator[str]:
    """Names of settings, those of an optimizer within the optimizer among them."""
    for name, value in settings.items():
        yield name
        if isinstance(value, Mapping):
            yield from _named(value)
