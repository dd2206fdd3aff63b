"""The two terms of the training loss: the task's own and the teacher's."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from netwright.core.errors import TaskError
from netwright.core.score import class_rows
from netwright.core.task import Task

__all__ = ["task_loss", "teacher_loss"]


def task_loss(task: Task, output: Any, targets: Tensor) -> Tensor:
    """The task's loss of a batch, checked to be a scalar.

    Args:
        task: whose loss is taken.
        output: what the model gave, as ``task.read`` returns it.
        targets: the batch's targets.

    Raises:
        TaskError: a task without a loss, or a loss that raises or is not a scalar tensor.
    """
    if task.loss is None:
        raise TaskError(f"Task {task.name!r} has no loss=; it trains by its own fit=.")
    try:
        loss: Any = task.loss(output, targets)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise TaskError(
            f"Task {task.name!r}: loss(output, target) raised {type(error).__name__} on an output of "
            f"{_kind(output)} and targets of {_kind(targets)}: {error}"
        ) from error
    if not isinstance(loss, Tensor):
        raise TaskError(f"Task {task.name!r}: loss must return a scalar tensor, got {type(loss).__name__}.")
    if loss.ndim != 0:
        raise TaskError(
            f"Task {task.name!r}: loss must return a scalar, got a tensor of shape {tuple(loss.shape)}. "
            "Average it: loss.mean(), or reduction='mean'."
        )
    return loss


def teacher_loss(student: Any, teacher: Any, targets: Tensor, temperature: float) -> Tensor:
    r"""How far a student's outputs are from its teacher's.

    Where outputs are logits over classes (see :mod:`netwright.core.score` for the shapes), the divergence of the
    softened distributions, averaged over the rows :math:`i` that have a target,

    .. math:: \frac{T^2}{n} \sum_i \mathrm{KL}\bigl(\mathrm{softmax}(z^{\text{teacher}}_i / T) \,\|\,
        \mathrm{softmax}(z^{\text{student}}_i / T)\bigr);

    elsewhere the mean squared difference. The factor :math:`T^2` keeps the size of the gradients as :math:`T` changes.
    Of several outputs (a tuple or a dict) the terms are averaged.

    Args:
        student: outputs with gradient.
        teacher: outputs of the same shapes without.
        targets: tell class-like outputs from others, and which rows count.
        temperature: :math:`T > 0`.

    Raises:
        TaskError: outputs whose shapes differ.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0]])
        >>> float(teacher_loss(logits, logits, torch.tensor([0]), 2.0))
        0.0
    """
    if isinstance(student, dict):
        student, teacher = tuple(student.values()), tuple(teacher[key] for key in student)
    if isinstance(student, tuple | list):
        pairs = [(a, b) for a, b in zip(student, teacher, strict=True) if a.is_floating_point()]
        return torch.stack([teacher_loss(a, b, targets, temperature) for a, b in pairs]).mean()
    if student.shape != teacher.shape:
        raise TaskError(
            f"The teacher's output has shape {tuple(teacher.shape)}, the model's {tuple(student.shape)}. "
            "Distillation needs a teacher with the same outputs."
        )
    ours, theirs = class_rows(student, targets), class_rows(teacher, targets)
    if ours is None or theirs is None:
        return functional.mse_loss(student, teacher)
    if len(ours[0]) == 0:
        nothing: Tensor = student.sum() * 0
        return nothing
    divergence = functional.kl_div(
        functional.log_softmax(ours[0] / temperature, 1),
        functional.log_softmax(theirs[0] / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def _kind(value: Any) -> str:
    return f"shape {tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
