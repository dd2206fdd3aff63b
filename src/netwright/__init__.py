"""Netwright makes networks better: faster, smaller, measured on your own machine."""

from netwright.core.cost import Cost, Ratio, compare, measure
from netwright.core.data import Data
from netwright.core.errors import NetwrightError
from netwright.core.evaluate import evaluate, predict
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.task import Task, load_task
from netwright.core.transform import Chain, Transform
from netwright.face import optimize
from netwright.version import __version__

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
