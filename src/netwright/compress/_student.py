"""The smaller network that a distillation method trains."""

import copy
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import nn

from netwright.compress._settings import check_weights
from netwright.core.data import beside
from netwright.core.errors import NetwrightError, RecipeError, TransformError
from netwright.core.evaluate import device_of
from netwright.core.randomness import isolated
from netwright.core.recipe import resolve
from netwright.core.task import Task
from netwright.core.transform import is_transform

__all__ = ["StudentSpec", "build_student", "check_student"]

StudentSpec: TypeAlias = str | Mapping[str, Any]
"""An import path of a function without arguments that builds the student, or ``{"method": ..., "settings": ...}``: a
transform, by import path, that makes the student out of the teacher."""


def check_student(owner: object, spec: StudentSpec) -> StudentSpec:
    """``spec`` as plain data.

    Raises:
        TransformError: neither an import path nor a mapping of ``method`` and ``settings``.
    """
    name = type(owner).__name__
    if isinstance(spec, str) and ":" in spec:
        return spec
    if isinstance(spec, Mapping) and "method" in spec and set(spec) <= {"method", "settings"}:
        method, settings = spec["method"], spec.get("settings", {})
        if isinstance(method, str) and isinstance(settings, Mapping):
            return {"method": method, "settings": dict(settings)}
    raise TransformError(
        f"{name}.student must be an import path module:function, or a transform as "
        f"{{'method': 'netwright.compress:Prune', 'settings': {{'ratios': 0.5}}}}; got {spec!r}."
    )


def build_student(owner: object, spec: StudentSpec, teacher: nn.Module, task: Task, seed: int) -> nn.Module:
    """The student, untrained or cut out of the teacher; it shares no tensor with it.

    Raises:
        TransformError: a path that leads to no function or transform, a function that fails, or a student that is no
            module, that has weights that are not finite, or whose outputs differ from the teacher's in shape.
    """
    name = type(owner).__name__
    try:
        made: Any = resolve(spec if isinstance(spec, str) else spec["method"])
    except RecipeError as error:
        raise TransformError(f"{name}.student: {error}") from error
    if isinstance(spec, str):
        student = _built(name, spec, made, seed)
    else:
        try:
            transform: Any = made(**spec["settings"])
        except (TypeError, ValueError) as error:
            raise TransformError(f"{name}.student: {spec['method']} refuses {spec['settings']}: {error}.") from error
        if not is_transform(transform):
            raise TransformError(f"{name}.student: {spec['method']} is no transform.")
        student = transform(teacher, task, seed=seed, budget=0.0)
    if not isinstance(student, nn.Module):
        raise TransformError(f"{name}.student gives a {type(student).__name__}, not an nn.Module.")
    check_weights(f"{name}.student", student)
    student = copy.deepcopy(student).to(device_of(teacher))
    _check_outputs(name, student, teacher, task)
    return student


def _built(name: str, path: str, function: Any, seed: int) -> Any:
    """What a function without arguments returns."""
    if not callable(function):
        raise TransformError(f"{name}.student: {path} is a {type(function).__name__}, not a function.")
    try:
        with isolated(seed):
            return function()
    except Exception as error:  # the user's own code may raise anything
        raise TransformError(
            f"{name}.student: {path} fails when it is called without arguments: {type(error).__name__}: {error}"
        ) from error


def _check_outputs(name: str, student: nn.Module, teacher: nn.Module, task: Task) -> None:
    shapes = []
    for model in (student.eval(), teacher):
        try:
            shapes.append(tuple(task.outputs(model, beside(task.example(2), model)).shape))
        except (RuntimeError, AttributeError, TypeError, ValueError, LookupError, NetwrightError) as error:
            what = "student" if model is student else "teacher"
            raise TransformError(f"{name}: the {what} cannot be run on the task's inputs: {error}.") from error
    if shapes[0] != shapes[1]:
        raise TransformError(
            f"{name}: the student's outputs are {shapes[0]} for two items, the teacher's {shapes[1]}. They must match."
        )
