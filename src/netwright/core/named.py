"""What a name in a recipe leads to, judged before it is called: a recipe is a file, and may come from anywhere.

A class is judged by its bases, a function by its annotations. One that the user wrote may leave them out; one of a
library may not, or a file could have any program run.
"""

import functools
import inspect
import sys
import sysconfig
from pathlib import Path
from typing import Any

from netwright.core.errors import RecipeError
from netwright.core.recipe import resolve

__all__ = ["giving", "making_callables", "taking"]

_LIBRARIES = {"site-packages", "dist-packages"}


def giving(path: str, kind: type) -> Any:
    """The class or function at ``path``, whose calls give a ``kind``.

    Raises:
        RecipeError: a path that leads nowhere, or to anything else.

    Example:
        >>> from torch.optim import Optimizer
        >>> giving("torch.optim:SGD", Optimizer).__name__
        'SGD'
        >>> giving("os:system", Optimizer)
        Traceback (most recent call last):
        ...
        netwright.core.errors.RecipeError: os:system is not called, for it is neither an Optimizer nor a function that \
says by its annotation that it gives one.
    """
    found = resolve(path)
    function = _within(found)
    if isinstance(function, type):
        fits = issubclass(function, kind)
    else:
        fits = _is_own(function) or _is_below(_annotations(function)[1], kind)
    return _judged(
        found, fits, path, f"neither an {kind.__name__} nor a function that says by its annotation that it gives one"
    )


def taking(path: str, kind: type) -> Any:
    """The class or function at ``path``, whose first argument is a ``kind``.

    Raises:
        RecipeError: a path that leads nowhere, or to anything else.
    """
    found = resolve(path)
    function = _within(found)
    ground = (getattr(function, "__module__", None) or "").startswith("netwright.core.")  # where files are written
    fits = _is_own(function) or (_is_below(_annotations(function)[0], kind) and not ground)
    return _judged(found, fits, path, f"no function that says by its annotation that it takes a {kind.__name__}")


def making_callables(path: str) -> Any:
    """The class at ``path``, whose objects can be called, or a function that the user wrote.

    Raises:
        RecipeError: a path that leads nowhere, or to anything else.
    """
    found = resolve(path)
    if isinstance(found, type):
        fits = any("__call__" in vars(base) for base in found.__mro__)
    else:
        fits = _is_own(_within(found))
    return _judged(found, fits, path, "no class whose objects can be called")


def _judged(found: Any, fits: bool, path: str, what: str) -> Any:
    if not (fits and callable(found)):
        raise RecipeError(f"{path} is not called, for it is {what}.")
    return found


def _within(found: Any) -> Any:
    while isinstance(found, functools.partial):
        found = found.func
    return found


def _annotations(function: Any) -> tuple[Any, Any]:
    """Those of the first argument and of what is returned; None where there is none that can be read."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except (TypeError, ValueError, NameError, AttributeError, SyntaxError):
        return None, None
    first = next(iter(signature.parameters.values()), None)
    return None if first is None else first.annotation, signature.return_annotation


def _is_below(annotation: Any, kind: type) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, kind)


def _is_own(function: Any) -> bool:
    """Whether the user wrote it: it is of no library, installed or Python's own."""
    name = getattr(function, "__module__", None) or ""
    if name == "__main__":
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or name.partition(".")[0] in ("netwright", "torch"):
        return False
    place = Path(file)
    return not _LIBRARIES & set(place.parts) and not place.is_relative_to(sysconfig.get_path("stdlib"))
