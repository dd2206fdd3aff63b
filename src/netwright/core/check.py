"""A look at a task before any work is done on it."""

import copy
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from netwright.core.data import Dataset, Inputs, call, stack, to_device
from netwright.core.errors import DataError, TaskError
from netwright.core.evaluate import device_of, evaluate, score_outputs, settled
from netwright.core.losses import task_loss
from netwright.core.outputs import to_cpu
from netwright.core.overlap import check_overlap
from netwright.core.randomness import isolated
from netwright.core.score import class_rows
from netwright.core.task import Task

__all__ = ["check_task"]

_SAMPLE = 256


def check_task(task: Task) -> None:
    """Make sure that a task can be worked on, or say in one sentence why not.

    Of every split the first, the last and 256 random items are looked at (all items of a ``TensorDataset`` for values
    that are not finite): pairs of input and target, finite, of the same structure, shape and dtype in all splits.
    The model takes a batch of them, the loss of it is a finite scalar that depends on the model and does not mix items
    up, the score of some ``val`` items, or else of all, is a finite number, and the splits do not share items
    (:func:`netwright.core.overlap.check_overlap`).

    Takes well under a second plus the time to load some thousand items. A task's own ``fit`` and ``evaluate`` are
    not called.

    Args:
        task: the task.

    Raises:
        DataError: something wrong with an item, named by split and index, or with the splits.
        TaskError: something wrong with the model, the loss or the score.

    Example:
        >>> from netwright.core.task import load_task
        >>> check_task(load_task("breast-cancer"))
    """
    with isolated(0):
        samples = {split: _sample(dataset, split) for split, dataset in task.data.splits().items()}
        shape = _signature(samples["train"][0])
        for split, items in samples.items():
            for index, item in items.items():
                _check_item(item, shape, split, index)
                if task.fit is None or task.evaluate is None:
                    _check_target(item[1], split, index)
            _check_all_finite(task.data.splits()[split], split)
        check_overlap(task.data)
        model = task.build()
        if task.fit is None:
            _check_loss(task, model, samples["train"])
        if task.evaluate is None:
            _check_score(task, model, samples["val"])


def _sample(dataset: Dataset, split: str) -> dict[int, Any]:
    size = len(dataset)
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:_SAMPLE].tolist()
    return {index: _item(dataset, split, index) for index in dict.fromkeys([0, size - 1, *chosen])}


def _item(dataset: Dataset, split: str, index: int) -> Any:
    try:
        item = dataset[index]
    except Exception as error:  # a user's dataset raises whatever it likes
        raise DataError(f"Data.{split}[{index}] raised {type(error).__name__}: {error}") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise DataError(f"Data.{split}[{index}] must be a pair (input, target), got {type(item).__name__}.")
    for leaf in _leaves(item):
        if not isinstance(leaf, Tensor | np.ndarray | np.generic | int | float):
            raise DataError(
                f"Data.{split}[{index}] holds a {type(leaf).__name__}. Inputs and targets must be tensors, arrays or "
                "numbers: encode text and labels in the dataset."
            )
    return item


def _check_item(item: Any, shape: Any, split: str, index: int) -> None:
    found = _signature(item)
    if found != shape:
        raise DataError(
            f"Data.{split}[{index}] is {_words(found)}, but Data.train[0] is {_words(shape)}. Every item of every "
            "split must have the same shape and type: resize, crop or pad them in the dataset."
        )
    for what, value in (("input", item[0]), ("target", item[1])):
        if not all(map(_is_finite, _leaves(value))):
            raise DataError(
                f"The {what} of Data.{split}[{index}] has a value that is NaN or infinite. Remove or fill such values."
            )


def _check_target(target: Any, split: str, index: int) -> None:
    if isinstance(target, Mapping | tuple | list):
        raise DataError(
            f"The target of Data.{split}[{index}] is a {type(target).__name__}. It must be one tensor, array or "
            "number. Stack or concatenate several in the dataset, and take them apart in the loss."
        )


def _check_all_finite(dataset: Dataset, split: str) -> None:
    if type(dataset) is not TensorDataset:
        return
    for tensor in dataset.tensors:
        if tensor.is_floating_point() and not bool(tensor.sum().isfinite()):
            rows = (~tensor.isfinite()).flatten(1).any(1) if tensor.ndim > 1 else ~tensor.isfinite()
            if bool(rows.any()):
                raise DataError(
                    f"Data.{split}[{int(rows.nonzero()[0])}] is one of {int(rows.sum())} items with NaN or infinite "
                    "values. Remove or fill such values."
                )


def _check_loss(task: Task, model: nn.Module, items: Mapping[int, Any]) -> None:
    inputs, targets = _batch(list(items.values())[:8], model)
    output = _output(task, model, inputs)
    if isinstance(output, Tensor):
        _check_classes(task, output, items)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loss = task_loss(task, output, targets)
    for warning in said:
        _check_broadcast(task, str(warning.message), len(targets))
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if not math.isfinite(float(loss.detach())):
        raise TaskError(
            f"Task {task.name!r}: the loss of the first training batch is {float(loss.detach())}. Look for log(0), "
            "a division by zero, or inputs of a size that the model was not made for."
        )
    if not loss.requires_grad:
        raise TaskError(f"Task {task.name!r}: the loss does not depend on any parameter that requires a gradient.")


def _check_broadcast(task: Task, warning: str, size: int) -> None:
    """Refuse a loss of which torch warns that each of ``size`` outputs meets the targets of all items."""
    found = re.match(r"Using a target size \((.*?)\) that is different to the input size \((.*?)\)", warning)
    target, output = (tuple(map(int, re.findall(r"\d+", part))) for part in found.groups()) if found else ((), ())
    if len(target) != len(output) and target[:1] == output[:1] == (size,):
        raise TaskError(
            f"Task {task.name!r}: the loss compares shape {output} with shape {target}, so each output with the "
            "targets of all items of the batch. Give both one shape: output.squeeze(-1) or target.unsqueeze(-1)."
        )


def _check_classes(task: Task, output: Tensor, items: Mapping[int, Any]) -> None:
    """Refuse a class beyond the model's outputs, unless the loss takes it: to ignore it, or in a code of its own."""
    output = output.detach().cpu()  # a CUDA device is of no use any more once it saw such a class
    _, targets = stack(list(items.values())[:8])
    rows = class_rows(output, targets)
    if rows is None:
        return
    classes = rows[0].shape[1]
    taken: set[int] = set()
    for index, item in items.items():
        target = torch.as_tensor(item[1])
        beyond = set(target[target >= classes].tolist()) - taken
        if beyond and not _takes(task, output, target):
            within = target.clamp(max=classes - 1)
            for value in sorted(beyond) if _takes(task, output, within) else ():
                if not _takes(task, output, torch.where(target == value, target, within)):
                    raise DataError(
                        f"Task {task.name!r}: Data.train[{index}] has the target {value}, but the model has {classes} "
                        f"outputs, so targets go from 0 to {classes - 1}."
                    )
        taken |= beyond


def _takes(task: Task, output: Tensor, target: Tensor) -> bool:
    """Whether the loss of ``output`` ``(n, ...)`` does not raise where every item has this target."""
    loss = copy.deepcopy(task.loss).cpu() if isinstance(task.loss, nn.Module) else task.loss
    assert loss is not None
    try:
        loss(output, target.expand(len(output), *target.shape).clone())
    except Exception:  # a user's loss raises whatever it likes
        return False
    return True


def _check_score(task: Task, model: nn.Module, items: Mapping[int, Any]) -> None:
    inputs, targets = _batch(list(items.values()), model)
    with settled(model):
        output = _output(task, model, inputs)
    try:
        score_outputs(task, to_cpu(output, task.name), targets.cpu())
    except TaskError:
        if len(items) == len(task.data.val):
            raise
        evaluate(model, task, "val")  # a few items may be of one class only, or have none to count


def _batch(items: list[Any], model: nn.Module) -> tuple[Inputs, Tensor]:
    inputs, targets = stack(items)
    place = device_of(model)
    return to_device(inputs, place), targets.to(place)


def _output(task: Task, model: nn.Module, inputs: Inputs) -> Any:
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        result = call(model, inputs)
    except Exception as error:  # whatever a model raises, the user needs to know on what
        raise TaskError(
            f"Task {task.name!r}: {type(model).__name__} does not accept a batch of inputs of "
            f"{_words(_signature(inputs))}: {type(error).__name__}: {error}"
        ) from error
    finally:
        for part, training in modes:
            part.training = training
    return task.read(result)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    if isinstance(value, tuple | list):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]


def _is_finite(value: Any) -> bool:
    tensor = torch.as_tensor(value)
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _signature(value: Any) -> Any:
    """Structure, shapes and dtypes, comparable with ``==``."""
    if isinstance(value, Mapping):
        return {key: _signature(part) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return tuple(map(_signature, value))
    if isinstance(value, Tensor):
        return f"{'x'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return f"a {type(value).__name__}"
    return _signature(tensor)


def _words(signature: Any) -> str:
    if isinstance(signature, dict):
        return "{" + ", ".join(f"{key}: {_words(part)}" for key, part in signature.items()) + "}"
    if isinstance(signature, tuple):
        return "(" + ", ".join(map(_words, signature)) + ")"
    return str(signature)
