"""Netwright makes networks better: faster, smaller, measured on your own machine."""

from typing import TYPE_CHECKING

from netwright.core.cost import Cost, Ratio, compare, measure
from netwright.core.data import Data
from netwright.core.errors import NetwrightError
from netwright.core.evaluate import evaluate, predict
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.task import Task, load_task
from netwright.core.transform import Chain, Transform
from netwright.version import __version__

if TYPE_CHECKING:
    from netwright.face import optimize

__all__ = [
    "Chain",
    "Cost",
    "Data",
    "NetwrightError",
    "Ratio",
    "Recipe",
    "Task",
    "Transform",
    "__version__",
    "compare",
    "evaluate",
    "fit",
    "load_task",
    "measure",
    "optimize",
    "predict",
]


def __getattr__(name: str) -> object:
    """``optimize`` when it is first asked for: reports and searches take longer to import than torch does."""
    if name != "optimize":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from netwright.face import optimize

    return optimize


def __dir__() -> list[str]:
    return [*globals(), "optimize"]
