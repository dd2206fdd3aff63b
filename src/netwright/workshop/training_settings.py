"""A recipe changed by short words, as ``netwright train --set`` and ``--compare`` take them."""

import dataclasses
import difflib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from netwright.core.errors import RecipeError, SettingError
from netwright.core.recipe import Recipe, resolve
from netwright.core.task import Task
from netwright.optim import available, find, schedules

__all__ = ["Entry", "change_recipe", "check_own_fit", "optimizer_path", "training_entries", "with_optimizer"]

_FIELDS = tuple(field.name for field in dataclasses.fields(Recipe))
_NESTED = {"optimizer", "schedule", "clip", "average", "parameterization", "penalty"}


@dataclass(frozen=True)
class Entry:
    """One training to do.

    Args:
        name: what is compared; entries of one name are settings of the same thing, of which the best is shown.
        recipe: how to train.
    """

    name: str
    recipe: Recipe


def training_entries(
    recipe: Recipe,
    optimizers: Sequence[str] | None = None,
    lrs: Sequence[float] | None = None,
    changes: Sequence[str] = (),
) -> list[Entry]:
    """The trainings that ``netwright train`` does: each optimizer at each learning rate.

    Args:
        recipe: what they share.
        optimizers: names or import paths; None is the recipe's own. The recipe's own keeps its settings.
        lrs: learning rates; None is each optimizer's own. Optimizers without a learning rate to choose are trained
            once.
        changes: of the recipe, as :func:`change_recipe` takes them. Where optimizers are named, ``lr`` and
            ``optimizer.…`` change each of those that have such a setting.

    Raises:
        RecipeError: an unknown name, nothing to compare, the same training twice, a change that does not parse or
            that no optimizer takes, or an ``lr`` that is needed and not given.

    Example:
        >>> [entry.name for entry in training_entries(Recipe(), ["lion", "adamw"], [1e-4, 1e-3])]
        ['lion', 'lion', 'adamw', 'adamw']
        >>> entries = training_entries(Recipe(), ["sgd", "adamw"], changes=["lr=0.1", "optimizer.momentum=0.9"])
        >>> [dict(entry.recipe.optimizer_settings) for entry in entries]
        [{'lr': 0.1, 'momentum': 0.9}, {'lr': 0.1}]
    """
    inner = [change for change in changes if optimizers is not None and _setting(change)]
    recipe = change_recipe(recipe, [change for change in changes if change not in inner])
    own = recipe.optimizer.partition(":")[2].lower()
    named = [(name, recipe.optimizer if name == own else optimizer_path(name)) for name in optimizers or [own]]
    if optimizers is not None and (not optimizers or len({resolve(path) for _, path in named}) != len(named)):
        raise RecipeError("--compare needs different optimizers with commas between, for example sgd,adamw,lion.")
    if lrs is not None and (not lrs or len(set(lrs)) != len(lrs)):
        raise RecipeError("--lrs needs at least one learning rate, and different ones.")
    if lrs is not None and any(_setting(change) == "lr" for change in changes):
        raise RecipeError("Learning rates are given by --lrs and by --set. Leave one of them out.")
    for change in inner:
        if not any(_takes(path, _setting(change)) for _, path in named):
            known = ", ".join(name for name, _ in named)
            raise RecipeError(f"--set {change} changes none of {known}: they have no such setting. Leave it out.")
    entries = []
    for name, path in named:
        mine = [change for change in inner if _takes(path, _setting(change))]
        given = [_rate(change.partition("=")[2].strip()) for change in mine if _setting(change) == "lr"]
        rates: Sequence[float | None] = (lrs if _takes(path, "lr") else None) or given[-1:] or [None]
        for lr in rates:
            if path != recipe.optimizer:
                start = with_optimizer(recipe, name, lr)
            else:
                start = recipe if lr is None else _with_lr(recipe, lr)
            entries.append(Entry(name, change_recipe(start, [change for change in mine if _setting(change) != "lr"])))
    return entries


def check_own_fit(task: Task, entries: Sequence[Entry]) -> None:
    """See that a task that trains by its own ``fit`` is trained once, and asked for no more than it can heed.

    Raises:
        RecipeError: several trainings of such a task, or a recipe that differs from the task's in more than its length.
    """
    if task.fit is None:
        return
    own = task.recipe or Recipe()
    for entry in entries:
        wanted = own.lasting(entry.recipe.epochs).replace(keep_zeros=entry.recipe.keep_zeros)
        changed = [name for name in _FIELDS if getattr(entry.recipe, name) != getattr(wanted, name)]
        if changed or len(entries) > 1:
            raise RecipeError(
                f"Task {task.name!r} trains by its own fit=, which takes no optimizer: of a recipe it heeds epochs and "
                f"keep_zeros. {f'Leave {changed[0]} as it is' if changed else 'There is nothing to compare'}."
            )


def change_recipe(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """``recipe`` with ``key=value`` changes applied in their order.

    ======================== ====================================================================================
    ``optimizer=lion``       by name (see ``netwright.optim.available``) or import path, with its own defaults
    ``schedule=cosine``      by name (``netwright.optim.schedules``), import path, or ``none``
    ``lr=3e-4``              of the optimizer, and the peak of the schedule where it has one; ``optimizer.lr`` is the
                             same. Where the parameterization has an ``lr`` (as muP), of that
    ``optimizer.betas=[…]``  a setting of the optimizer; likewise ``schedule.``, ``clip.``,
                             ``average.``, ``parameterization.``, ``penalty.``
    ``epochs=3``             any other setting of the recipe, as JSON
    ======================== ====================================================================================

    Raises:
        RecipeError: a change that does not parse, an unknown key, name or value.

    Example:
        >>> changed = change_recipe(Recipe(), ["optimizer=lion", "lr=3e-4", "schedule=cosine", "epochs=3"])
        >>> changed.optimizer, changed.optimizer_settings, changed.epochs
        ('netwright.optim:Lion', {'lr': 0.0003}, 3)
    """
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"{change!r} is not a setting. Write key=value, for example --set optimizer=lion.")
        recipe = _changed(recipe, key.strip(), text.strip())
    return recipe


def with_optimizer(recipe: Recipe, name: str, lr: float | None = None) -> Recipe:
    """``recipe`` with another optimizer at its own defaults.

    Args:
        recipe: whose optimizer is replaced; its schedule keeps its shape, at the optimizer's learning rate.
        name: short name or import path.
        lr: learning rate; None is the optimizer's own default.

    Raises:
        RecipeError: an unknown name, or an ``lr`` for an optimizer that has none.
    """
    path = optimizer_path(name)
    known = inspect.signature(resolve(path)).parameters
    if "lr" not in known:
        if lr is not None:
            raise RecipeError(f"{name} has no learning rate to set. Leave lr out.")
        return recipe.replace(optimizer=path, optimizer_settings={}, schedule=None, schedule_settings={})
    default = known["lr"].default
    if lr is None and default is inspect.Parameter.empty:
        raise RecipeError(f"{name} needs a learning rate. Add lr=..., for example --set lr=0.1.")
    changed = recipe.replace(optimizer=path, optimizer_settings={})
    if lr is None and default is None:  # that of the optimizer within
        return _with_peaks(changed, None)
    return _with_lr(changed, float(default) if lr is None else lr)


def _setting(change: str) -> str:
    """The optimizer's setting that ``key=value`` speaks of, empty where it speaks of something else."""
    key = change.partition("=")[0].strip()
    return "lr" if key == "lr" else key.partition(".")[2] if key.startswith("optimizer.") else ""


def _takes(path: str, setting: str) -> bool:
    """Whether an optimizer has this setting; of learning rates, one to choose."""
    free = {record.object for record in available().values() if record.lr_free}
    return setting in inspect.signature(resolve(path)).parameters and not (setting == "lr" and path in free)


def _has_lr(path: str) -> bool:
    return "lr" in inspect.signature(resolve(path)).parameters


def _changed(recipe: Recipe, key: str, text: str) -> Recipe:
    if key == "lr" or (key == "optimizer.lr" and _has_lr(recipe.optimizer)):
        return _with_lr(recipe, _rate(text))
    outer, dot, inner = key.partition(".")
    if dot and outer in _NESTED:
        name = f"{outer}_settings"
        return recipe.replace(**{name: {**getattr(recipe, name), inner: _value(text)}})
    if key == "optimizer":
        return with_optimizer(recipe, text)
    if key == "schedule":
        return _with_schedule(recipe, text)
    if key not in _FIELDS:
        near = difflib.get_close_matches(key, ("lr", *_FIELDS), n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known are lr, {', '.join(_FIELDS)}."
        raise RecipeError(f"A recipe has no setting {key!r}. {hint}")
    value = _value(text)
    if key == "epochs" and isinstance(value, int | float) and not isinstance(value, bool):
        return recipe.lasting(value)
    changed = recipe.replace(**{key: value})
    lr = recipe.optimizer_settings.get("lr")
    if key == "parameterization" and lr is not None and _gives_rates(changed):
        return _with_lr(changed, float(lr))
    return changed


def _with_lr(recipe: Recipe, lr: float) -> Recipe:
    if not _has_lr(recipe.optimizer):
        raise RecipeError(f"{recipe.optimizer} has no learning rate to set. Leave lr out.")
    changed = recipe.replace(optimizer_settings={**recipe.optimizer_settings, "lr": lr})
    if _gives_rates(changed):
        changed = changed.replace(parameterization_settings={**changed.parameterization_settings, "lr": lr})
    return _with_peaks(changed, lr)


def _with_peaks(recipe: Recipe, lr: float | None) -> Recipe:
    """The schedule at this peak; where there is none, or one a group, it is filled in when the fit begins."""
    known = inspect.signature(resolve(recipe.schedule)).parameters if recipe.schedule else {}
    if "max_lr" not in known:
        return recipe
    settings = {name: value for name, value in recipe.schedule_settings.items() if name != "max_lr"}
    peak = {} if lr is None or _gives_rates(recipe) else {"max_lr": lr}
    return recipe.replace(schedule_settings={**settings, **peak})


def _gives_rates(recipe: Recipe) -> bool:
    """Whether the parameterization is given the learning rate, to make parameter groups with their own."""
    return recipe.parameterization is not None and _has_lr(recipe.parameterization)


def _with_schedule(recipe: Recipe, name: str) -> Recipe:
    if name == "none":
        return recipe.replace(schedule=None, schedule_settings={})
    known: Mapping[str, tuple[str, Mapping[str, Any]]] = schedules()
    path, settings = known.get(name, (name, {}))
    if ":" not in path:
        raise RecipeError(f"There is no schedule {name!r}. Known are none, {', '.join(known)}, or module:name.")
    changed = recipe.replace(schedule=path, schedule_settings=settings)
    lr = recipe.optimizer_settings.get("lr")
    return _with_peaks(changed, None if lr is None else float(lr))


def optimizer_path(name: str) -> str:
    """The import path of an optimizer given by short name or import path.

    Raises:
        RecipeError: an unknown name.
    """
    if ":" in name:
        return name
    try:
        return find(name).object
    except SettingError as error:
        raise RecipeError(f"{error} An import path, module:name, is taken too.") from error


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RecipeError(f"lr must be a number, got {text!r}.")
    return value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return float(text)  # as .5, which JSON does not know
    except ValueError:
        return text
