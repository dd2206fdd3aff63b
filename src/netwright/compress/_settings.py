"""Settings and models that compression methods check in the same words."""

import math
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from netwright.core.errors import TransformError
from netwright.core.task import Task

__all__ = [
    "check_choice",
    "check_count",
    "check_flag",
    "check_number",
    "check_ratio",
    "check_weights",
    "checked_paths",
    "require_loss",
]


def check_ratio(owner: object, name: str, value: Any, *, what: str, zero: bool = False) -> None:
    """A share strictly between 0 and 1, or from 0 on.

    Args:
        owner: the transform whose setting it is.
        name: the setting.
        value: what was given.
        what: what 0.5 would do, for the message.
        zero: whether 0 is allowed.

    Raises:
        TransformError: anything else.
    """
    low = "[0" if zero else "(0"
    if not _number(value) or not 0 <= value < 1 or (value == 0 and not zero):
        raise TransformError(f"{_name(owner)}.{name} must lie in {low}, 1), got {value!r}. 0.5 {what}.")


def check_number(
    owner: object, name: str, value: Any, *, low: float = 0.0, high: float = math.inf, above: bool = False
) -> None:
    """A finite number within ``[low, high]``, or above ``low`` itself.

    Raises:
        TransformError: anything else.
    """
    if not _number(value) or not low <= value <= high or (above and value == low):
        bound = f"greater than {low:g}" if above else f"at least {low:g}"
        most = "" if high == math.inf else f" and at most {high:g}"
        raise TransformError(f"{_name(owner)}.{name} must be a finite number, {bound}{most}, got {value!r}.")


def check_count(owner: object, name: str, value: Any, *, least: int = 1) -> None:
    """A whole number of at least ``least``.

    Raises:
        TransformError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        what = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise TransformError(f"{_name(owner)}.{name} must be {what}, got {value!r}.")


def check_choice(owner: object, name: str, value: Any, known: Collection[str]) -> None:
    """One of some words.

    Raises:
        TransformError: anything else.
    """
    if value not in known:
        raise TransformError(f"{_name(owner)}.{name} must be {' or '.join(map(repr, known))}, got {value!r}.")


def check_flag(owner: object, name: str, value: Any) -> None:
    """True or false, and nothing that merely counts as one of them.

    Raises:
        TransformError: anything else.
    """
    if not isinstance(value, bool):
        raise TransformError(f"{_name(owner)}.{name} must be true or false, got {value!r}.")


def check_weights(owner: object, model: nn.Module) -> None:
    """Weights that can be ranked. Buffers may hold minus infinity, as masks of attention do.

    Raises:
        TransformError: a parameter or buffer with NaN or infinite values.
    """
    buffers = {name for name, _ in model.named_buffers()}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not value.is_floating_point():
            continue
        sound = value.isfinite() | (value.isneginf() if name in buffers else False)
        if not bool(sound.all()):
            count = int((~sound).sum())
            raise TransformError(
                f"{_name(owner)}: {name} has {count} values that are not finite. Train the model again, or restore a "
                "sound checkpoint."
            )


def require_loss(owner: object, task: Task) -> None:
    """A loss to take gradients of.

    Raises:
        TransformError: a task that trains by its own ``fit`` only.
    """
    if task.loss is None:
        raise TransformError(
            f"{_name(owner)} needs the gradients of a loss, but task {task.name!r} trains by its own fit=. Give it a "
            "loss= too."
        )


def _name(owner: object) -> str:
    return owner if isinstance(owner, str) else type(owner).__name__


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def checked_paths(owner: object, name: str, value: Any) -> tuple[str, ...]:
    """A setting that names modules or parameters, as a tuple.

    Args:
        owner: the transform whose setting it is.
        name: the setting.
        value: what was given.

    Raises:
        TransformError: one string, whose letters would be taken for names, or anything else but names.
    """
    setting = f"{type(owner).__name__}.{name}"
    if isinstance(value, str):
        raise TransformError(f"{setting} must be a sequence of names; write ({value!r},).")
    paths = tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(path, str) for path in paths):
        raise TransformError(f"{setting} must be a sequence of names, got {value!r}. () names none.")
    return paths
