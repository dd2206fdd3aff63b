"""What a network is for: a model, its data, a loss and a score."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

from netwright.core.data import Data, Inputs, call, first_inputs
from netwright.core.errors import NetwrightError, TaskError
from netwright.core.neighbours import neighbourhood
from netwright.core.outputs import Named
from netwright.core.randomness import seeded
from netwright.core.recipe import Recipe

__all__ = [
    "FILE_MODULE",
    "EvaluateFunction",
    "FitFunction",
    "Loss",
    "Score",
    "Task",
    "builtin_tasks",
    "load_object",
    "load_task",
]

Loss: TypeAlias = Callable[[Any, Tensor], Tensor]
"""``loss(output, target)``: a scalar tensor to be made small."""
Score: TypeAlias = Callable[[Any, Tensor], Any]
"""``score(outputs, targets)`` of a whole split, higher is better; or a torchmetrics ``Metric``."""

FILE_MODULE = "_netwright_task_"
"""Prefix of the module name that a task file is imported under."""

_BUILTIN = {
    "breast-cancer": "netwright.core.builtin.breast_cancer",
    "digits": "netwright.core.builtin.digits",
    "fashion-mnist": "netwright.core.builtin.fashion_mnist",
    "python-source": "netwright.core.builtin.python_source",
}


class FitFunction(Protocol):
    """A training loop of the user's own."""

    def __call__(
        self, model: nn.Module, *, budget: float | None, seed: int, teacher: nn.Module | None = None
    ) -> nn.Module | None:
        """Train ``model`` for about ``budget`` epochs; return it, or None when trained in place."""
        ...


class EvaluateFunction(Protocol):
    """A score of the user's own, higher is better."""

    def __call__(self, model: nn.Module, split: str) -> float:
        """The score of ``model`` on ``split``: "train", "val" or "test"."""
        ...


@dataclass(frozen=True)
class Task:
    """What a network is for.

    Args:
        name: a short name, used in reports.
        model: a callable without arguments that builds a fresh, untrained model, or an
            ``nn.Module`` already trained.
        data: the three splits.
        loss: ``loss(output, target)``, a scalar tensor.
        score: ``score(outputs, targets) -> float`` on the concatenated outputs of a split, or a
            torchmetrics ``Metric``; higher is better.
        output: how the tensor that ``loss`` and ``score`` see is read from what the model returns.
            By default tensors pass through, and of a Transformers ``ModelOutput`` or a dict
            the ``logits`` are taken.
        recipe: how the model is trained when it comes untrained, and recovered after compression.
        fit: a training loop of your own that replaces Netwright's. ``netwright optimize`` asks it for the recipe's
            epochs for the baseline, and for a quarter of them for each candidate.
        evaluate: a score of your own that replaces ``score``.
        description: one sentence for the report.

    Raises:
        TaskError: an argument of the wrong type, or neither ``score`` nor ``evaluate``.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> split = lambda n: TensorDataset(torch.zeros(n, 4), torch.zeros(n).long())
        >>> task = Task("tiny", lambda: torch.nn.Linear(4, 2), Data(split(8), split(4), split(2)),
        ...             loss=torch.nn.functional.cross_entropy,
        ...             score=lambda o, t: float((o.argmax(1) == t).float().mean()))
        >>> task.trained
        False
        >>> task.build(seed=0)
        Linear(in_features=4, out_features=2, bias=True)
    """

    name: str
    model: nn.Module | Callable[[], nn.Module]
    data: Data
    loss: Loss | None = None
    score: Score | None = None
    output: Callable[[Any], Any] | None = None
    recipe: Recipe | None = None
    fit: FitFunction | None = None
    evaluate: EvaluateFunction | None = None
    description: str = ""

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise TaskError(f"Task.name must be a non-empty string, got {self.name!r}.")
        if not callable(self.model):
            raise TaskError(
                f"Task {self.name!r}: model must be an nn.Module or a callable without arguments that builds "
                f"one, got {type(self.model).__name__}."
            )
        if not isinstance(self.data, Data):
            raise TaskError(
                f"Task {self.name!r}: data must be netwright.Data(train, val, test), got {type(self.data).__name__}."
            )
        if self.loss is None and self.fit is None:
            raise TaskError(f"Task {self.name!r}: give loss=..., or fit=... with a training loop of your own.")
        if self.score is None and self.evaluate is None:
            raise TaskError(f"Task {self.name!r}: give score=..., or evaluate=... with a score of your own.")
        for field in ("loss", "score", "output", "fit", "evaluate"):
            value = getattr(self, field)
            if value is not None and not callable(value):
                raise TaskError(f"Task {self.name!r}: {field} must be callable, got {type(value).__name__}.")

    @property
    def trained(self) -> bool:
        """Whether ``model`` came as a trained module rather than as a builder."""
        return isinstance(self.model, nn.Module)

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh model from the builder, its initialization drawn from ``seed``; or the trained module itself.

        The global random state of torch is left as it was.

        Raises:
            TaskError: the builder raises or returns something else than an ``nn.Module``.
        """
        if isinstance(self.model, nn.Module):
            return self.model
        with seeded(seed):
            try:
                model = self.model()
            except Exception as error:
                raise TaskError(
                    f"Task {self.name!r}: building the model failed: {type(error).__name__}: {error}"
                ) from error
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"Task {self.name!r}: the model builder must return an nn.Module, got {type(model).__name__}."
            )
        return model

    def example(self, count: int = 2) -> Inputs:
        """The inputs of the first ``count`` training items as one batch."""
        return first_inputs(self.data.train, count)

    def outputs(self, model: nn.Module, inputs: Inputs) -> Any:
        """What ``loss`` and ``score`` see when ``model`` is applied to ``inputs``."""
        return self.read(call(model, inputs))

    def read(self, result: Any) -> Any:
        """The part of a model's result that ``loss`` and ``score`` see (see ``output``).

        Raises:
            TaskError: ``output`` raised.
        """
        if self.output is not None:
            try:
                return self.output(Named(result) if type(result) is dict else result)
            except Exception as error:  # a user's function raises whatever it likes
                raise TaskError(
                    f"Task {self.name!r}: output(result) raised {type(error).__name__} on a {type(result).__name__}: "
                    f"{error}"
                ) from error
        if isinstance(result, dict) and "logits" in result:  # ModelOutput is a dict
            return result["logits"]
        if isinstance(result, tuple) and len(result) == 1:
            return result[0]
        return result


def builtin_tasks() -> tuple[str, ...]:
    """Names of the tasks that come with Netwright."""
    return tuple(sorted(_BUILTIN))


def load_task(spec: str) -> Task:
    """The task named by ``spec``: a built-in name, ``file.py:name`` or ``module:name``.

    ``name`` is a :class:`Task`, or a callable without arguments that returns one. A file imports what stands beside it,
    as a script does: while it is read its folder comes first on ``sys.path``, and from then on last. So does a module
    with the current directory.

    Raises:
        TaskError: nothing of that name, a file that raises, or an object that is not a task.

    Example:
        >>> load_task("nowhere")
        Traceback (most recent call last):
        ...
        netwright.core.errors.TaskError: No task 'nowhere'. Built in are breast-cancer, digits, ...
    """
    if spec in _BUILTIN:
        task = importlib.import_module(_BUILTIN[spec]).task()
        assert isinstance(task, Task)
        return task
    if ":" not in spec:
        raise TaskError(
            f"No task {spec!r}. Built in are {', '.join(builtin_tasks())}; your own is written file.py:name or "
            "module:name."
        )
    return _as_task(load_object(spec, "the Task, or a function that returns one,"), spec)


def load_object(spec: str, what: str = "what it defines") -> Any:
    """What ``file.py:name`` or ``module:name`` names: a user's own code, which is run for it.

    Args:
        spec: the place and the name.
        what: what is to be named, for the message.

    Raises:
        TaskError: nothing of that name, or a file that raises.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place:
        raise TaskError(f"{spec!r} names nothing. Your own is written file.py:name or module:name.")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    if not hasattr(module, name):
        raise TaskError(f"{place} defines no {name!r}. Name {what} after the colon.")
    return getattr(module, name)


def _as_task(found: Any, spec: str) -> Task:
    if not isinstance(found, Task) and callable(found):
        try:
            found = found()
        except NetwrightError:
            raise
        except (Exception, SystemExit) as error:
            raise TaskError(f"{spec} raised {type(error).__name__}: {error}") from error
    if not isinstance(found, Task):
        raise TaskError(f"{spec} is a {type(found).__name__}, not a netwright.Task or a function that returns one.")
    return found


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise TaskError(f"No file {path}. A task of your own is written file.py:name.")
    name = FILE_MODULE + path.stem
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} cannot be imported as Python.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling of workers look the module up by name
    try:
        with neighbourhood(str(path.resolve().parent)):
            spec.loader.exec_module(module)
    except NetwrightError:
        raise
    except (Exception, SystemExit) as error:
        hint = _as_part_of_a_package(path.resolve()) if "relative import" in str(error) else ""
        raise TaskError(f"{path} raised {type(error).__name__} while it was imported: {error}{hint}") from error
    return module


def _as_part_of_a_package(path: Path) -> str:
    """How a file that imports relatively to its package is to be named; empty where it is in none."""
    names, folder = [path.stem], path.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    return f". It is part of a package: write {'.'.join(names)}:name from {folder}." if len(names) > 1 else ""


def _load_module(name: str) -> Any:
    try:
        with neighbourhood(os.getcwd()):
            return importlib.import_module(name)
    except NetwrightError:
        raise
    except (Exception, SystemExit) as error:
        raise TaskError(f"Module {name} cannot be imported: {type(error).__name__}: {error}") from error
