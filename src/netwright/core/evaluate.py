"""What a model scores on a split, and how sure that is."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from netwright.core.data import Dataset, batches, call
from netwright.core.errors import NetwrightError, TaskError
from netwright.core.outputs import concatenate, count_elements, shapes_of, take_items, to_cpu
from netwright.core.task import Task

__all__ = ["Model", "device_of", "evaluate", "paired_interval", "predict", "score_interval", "score_outputs", "settled"]

Model: TypeAlias = nn.Module | Callable[..., Any]
"""An ``nn.Module``, or anything called like one (a wrapped ONNX Runtime session)."""

_WORK = 500_000_000  # output elements that one bootstrap may resample
_SECONDS = 2.0  # after which a bootstrap ends, if it has enough resamples
_LONGEST = 30.0  # seconds that the fewest resamples may take
_FEWEST = 100  # resamples below which a percentile says nothing


def predict(
    model: Model, task: Task, split: str, *, batch_size: int = 256, device: torch.device | str | None = None
) -> tuple[Any, Tensor]:
    """Outputs of ``model`` on a whole split, concatenated along the batch, on the CPU.

    Reach for it when several numbers (a score, its interval, a confusion matrix) are wanted from one pass.
    Memory grows with the outputs of the split; a language model's ``(n, time, vocabulary)`` is the large case.

    Args:
        model: a module (evaluated in eval mode, its training flags restored) or anything called like one.
        task: its data, and how the output is read.
        split: "train", "val" or "test".
        batch_size: items per call.
        device: where to run; None is where the module's parameters are.

    Returns:
        ``(outputs, targets)``: outputs are a tensor, or a tuple or dict of tensors where the model returns such.

    Raises:
        TaskError: a split that does not exist, or an output that is not made of tensors.

    Example:
        >>> from netwright.core.task import load_task
        >>> task = load_task("breast-cancer")
        >>> outputs, targets = predict(task.build(), task, "val")
        >>> len(outputs) == len(targets)
        True
    """
    parts, targets = [], []
    for output, target in _results(model, task, split, batch_size, device):
        parts.append(output)
        targets.append(target)
    return concatenate(parts, task.name), torch.cat(targets)


def evaluate(
    model: Model, task: Task, split: str, *, batch_size: int = 256, device: torch.device | str | None = None
) -> float:
    """The score of ``model`` on a split, higher is better.

    ``task.evaluate`` is asked where it is given. A torchmetrics ``Metric`` sees batch after batch, so that memory
    does not grow with the split; a function sees the concatenated outputs.

    Args:
        model: a module or anything called like one.
        task: its data and score.
        split: "train", "val" or "test".
        batch_size: items per call.
        device: where to run; None is where the module's parameters are.

    Raises:
        TaskError: a split that does not exist, or a score that raises or is not a finite number.

    Example:
        >>> from netwright.core.task import load_task
        >>> task = load_task("breast-cancer")
        >>> 0 <= evaluate(task.build(seed=0), task, "val") <= 1
        True
    """
    _dataset(task, split)
    if task.evaluate is not None:
        if not isinstance(model, nn.Module):
            raise TaskError(f"Task {task.name!r} evaluates with a function of its own, which needs an nn.Module.")
        with settled(model):
            try:
                found = task.evaluate(model, split)
            except NetwrightError:
                raise
            except Exception as error:  # a user's function raises whatever it likes
                raise TaskError(
                    f"Task {task.name!r}: evaluate(model, {split!r}) raised {type(error).__name__} on a "
                    f"{type(model).__name__}: {error}"
                ) from error
        return _finite(found, task, f"evaluate on {split}")
    if _is_metric(task.score):
        metric = _fresh(task.score)
        for output, target in _results(model, task, split, batch_size, device):
            metric.update(output, target)
        return _finite(metric.compute(), task, f"score on {split}")
    return score_outputs(task, *predict(model, task, split, batch_size=batch_size, device=device))


def score_outputs(task: Task, outputs: Any, targets: Tensor) -> float:
    """The task's score of concatenated outputs.

    Raises:
        TaskError: a task without ``score``, or a score that raises or is not a finite number.
    """
    score: Any = task.score
    if score is None:
        raise TaskError(f"Task {task.name!r} has evaluate= but no score=, so outputs alone cannot be scored.")
    try:
        if _is_metric(score):
            metric = _fresh(score)
            metric.update(outputs, targets)
            return _finite(metric.compute(), task, "score")
        return _finite(score(outputs, targets), task, "score")
    except NetwrightError:
        raise
    except Exception as error:  # a user's score raises whatever it likes
        raise TaskError(
            f"Task {task.name!r}: score(outputs, targets) raised {type(error).__name__} on outputs of shape "
            f"{shapes_of(outputs)} and targets of shape {tuple(targets.shape)}: {error}"
        ) from error


def score_interval(
    task: Task, outputs: Any, targets: Tensor, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    r"""Bootstrap percentile interval of a score over the items of a split.

    Items are drawn with replacement, the score of each draw is taken, and the interval is between the
    :math:`(1-\text{level})/2` and :math:`(1+\text{level})/2` quantiles. Time is bounded: large outputs and slow
    scores get fewer resamples, so that at most 5e8 output elements are gathered, and none after 2 seconds, though never
    fewer than 100 (or than asked). Where these take more than 30 seconds there is no interval.

    Args:
        task: whose score is taken.
        outputs: concatenated outputs, as :func:`predict` returns them.
        targets: ``(n, ...)``.
        resamples: draws.
        seed: source of the draws.
        level: coverage, in (0, 1).

    Returns:
        ``(low, high)``.

    Raises:
        TaskError: a score that is undefined on more than half of the draws, or too slow.

    Example:
        >>> from netwright.core.task import load_task
        >>> task = load_task("breast-cancer")
        >>> outputs, targets = predict(task.build(), task, "val")
        >>> low, high = score_interval(task, outputs, targets, resamples=200)
        >>> low <= score_outputs(task, outputs, targets) <= high
        True
    """
    count = _bounded(resamples, count_elements(outputs))
    scores = _resampled(task, partial(_try_score, task, outputs, targets), len(targets), count, seed)
    return _percentiles(scores, level, task)


def paired_interval(
    task: Task,
    outputs_a: Any,
    outputs_b: Any,
    targets: Tensor,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap percentile interval of ``score(b) - score(a)`` on the same items.

    Both models are scored on the same draws, so that what makes an item hard for both cancels: far narrower than
    the difference of two intervals.

    Args:
        task: whose score is taken.
        outputs_a: concatenated outputs of the first model (a baseline).
        outputs_b: concatenated outputs of the second.
        targets: ``(n, ...)``.
        resamples: draws; fewer for large outputs and slow scores, see :func:`score_interval`.
        seed: source of the draws.
        level: coverage, in (0, 1).

    Returns:
        ``(low, high)``; an interval above zero says that ``b`` is better.

    Raises:
        TaskError: a score that is undefined on more than half of the draws, or too slow.
    """

    def difference(index: Tensor) -> float:
        return _try_score(task, outputs_b, targets, index) - _try_score(task, outputs_a, targets, index)

    count = _bounded(resamples, count_elements(outputs_a) + count_elements(outputs_b))
    return _percentiles(_resampled(task, difference, len(targets), count, seed), level, task)


@contextmanager
def settled(model: Model) -> Iterator[None]:
    """Inside, a module is in eval mode and records no gradients; afterwards every training flag is as before."""
    modes = [(part, part.training) for part in model.modules()] if isinstance(model, nn.Module) else []
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _results(
    model: Model, task: Task, split: str, batch_size: int, device: torch.device | str | None
) -> Iterator[tuple[Any, Tensor]]:
    place = device if device is not None else device_of(model)
    with settled(model):
        for inputs, targets in batches(_dataset(task, split), batch_size, device=place):
            yield to_cpu(task.read(call(model, inputs)), task.name), targets.cpu()


def _dataset(task: Task, split: str) -> Dataset:
    splits = task.data.splits()
    if split not in splits:
        raise TaskError(f"Task {task.name!r} has no split {split!r}. There are train, val and test.")
    return splits[split]


def device_of(model: Model) -> torch.device:
    """Where a module's tensors are; the CPU for anything without tensors."""
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    return tensors[0].device if tensors else torch.device("cpu")


def _is_metric(score: Any) -> bool:
    return all(callable(getattr(score, name, None)) for name in ("update", "compute", "reset"))


def _fresh(score: Any) -> Any:
    metric = copy.deepcopy(score)
    metric.reset()
    return metric


def _finite(value: Any, task: Task, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TaskError(f"Task {task.name!r}: {what} must be a number, got {type(value).__name__}.") from error
    if not math.isfinite(number):
        raise TaskError(f"Task {task.name!r}: {what} is {number}. A score must be finite, higher is better.")
    return number


def _bounded(resamples: int, elements: int) -> int:
    return min(resamples, max(_FEWEST, _WORK // max(1, elements)))


def _resampled(task: Task, score: Callable[[Tensor], float], size: int, count: int, seed: int) -> list[float]:
    """The score of ``count`` draws of ``size`` items, or of those for which there was time."""
    generator = torch.Generator().manual_seed(seed)
    scores: list[float] = []
    begin, fastest, fewest = time.perf_counter(), math.inf, min(count, _FEWEST)
    while len(scores) < fewest or (len(scores) < count and time.perf_counter() - begin < _SECONDS):
        start = time.perf_counter()
        scores.append(score(torch.randint(size, (size,), generator=generator)))
        fastest = min(fastest, time.perf_counter() - start)  # a first call may load or compile something
        if len(scores) > 1 and time.perf_counter() - begin > _SECONDS and fastest * fewest > _LONGEST:
            raise TaskError(f"Task {task.name!r}: a score that takes {fastest:.1g} s is too slow for an interval.")
    return scores


def _try_score(task: Task, outputs: Any, targets: Tensor, index: Tensor) -> float:
    try:
        return score_outputs(task, take_items(outputs, index), targets[index])
    except TaskError:  # a draw with one class only, say: left out of the percentiles
        return math.nan


def _percentiles(scores: list[float], level: float, task: Task) -> tuple[float, float]:
    values = np.array(scores)
    values = values[np.isfinite(values)]
    if 2 * len(values) < len(scores):
        raise TaskError(f"Task {task.name!r}: the score is undefined on most resamples of its items.")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
