"""Scores on the concatenated outputs of a split; higher is better for each.

Of a model that predicts classes, ``outputs`` are logits with one axis more than ``targets``: the classes stand
last, ``(n, classes)`` or ``(n, time, vocabulary)``, or second, ``(n, classes, height, width)``, as in a
segmentation. Where both readings fit, the last axis is taken. An axis of length one is not of classes: it holds the
logit of a yes, or a number. Negative targets (the ignore index of ``cross_entropy``) are left out.
"""

import math

from torch import Tensor
from torch.nn import functional

from netwright.core.errors import TaskError

__all__ = ["accuracy", "class_rows", "negative_bits", "negative_perplexity", "r2"]


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Share of targets whose logit is the largest.

    Args:
        outputs: logits, ``(n, classes)``, ``(n, time, classes)`` or ``(n, classes, height, width)``.
        targets: class indices, ``(n,)``, ``(n, time)`` or ``(n, height, width)``.

    Raises:
        TaskError: shapes that do not fit together.

    Example:
        >>> import torch
        >>> accuracy(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]))
        0.5
    """
    logits, classes = _rows_or_error("accuracy", outputs, targets)
    return float((logits.argmax(1) == classes).double().mean())


def r2(outputs: Tensor, targets: Tensor) -> float:
    r"""Coefficient of determination of a regression.

    .. math:: R^2 = 1 - \frac{\sum (y - \hat y)^2}{\sum (y - \bar y)^2}

    with targets :math:`y`, outputs :math:`\hat y` and the mean :math:`\bar y` of each target column; several columns
    are averaged. 1 is perfect, 0 as good as the mean, and it may be negative.

    Args:
        outputs: predictions, ``(n,)`` or ``(n, columns)``.
        targets: true values of the same shape; ``(n,)`` against ``(n, 1)`` is accepted.

    Raises:
        TaskError: shapes that do not fit together, or a target column that is constant.

    Example:
        >>> import torch
        >>> r2(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]))
        1.0
    """
    y_hat, y = outputs.double().flatten(1) if outputs.ndim > 1 else outputs.double()[:, None], targets.double()
    y = y.flatten(1) if y.ndim > 1 else y[:, None]
    if y_hat.shape != y.shape:
        raise TaskError(f"r2 needs outputs and targets of one shape, got {_shape(outputs)} and {_shape(targets)}.")
    total = (y - y.mean(0)).square().sum(0)
    if bool((total == 0).any()):
        raise TaskError("r2 is undefined where a target is the same for every item of the split.")
    return float((1 - (y - y_hat).square().sum(0) / total).mean())


def negative_bits(outputs: Tensor, targets: Tensor) -> float:
    r"""Minus the bits per symbol that a model needs for the targets, :math:`\frac1n\sum_i \log_2 p(y_i)`.

    The natural score of a language model over characters; 0 is perfect, ``-log2(classes)`` is guessing.

    Args:
        outputs: logits, shapes as for :func:`accuracy`.
        targets: class indices, shapes as for :func:`accuracy`.

    Raises:
        TaskError: shapes that do not fit together.

    Example:
        >>> import torch
        >>> negative_bits(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        -2.0
    """
    return -_cross_entropy("negative_bits", outputs, targets) / math.log(2)


def negative_perplexity(outputs: Tensor, targets: Tensor) -> float:
    r"""Minus the perplexity, :math:`-\exp(-\frac1n\sum_i \ln p(y_i))`; -1 is perfect.

    Args:
        outputs: logits, shapes as for :func:`accuracy`.
        targets: class indices, shapes as for :func:`accuracy`.

    Raises:
        TaskError: shapes that do not fit together.

    Example:
        >>> import torch
        >>> round(negative_perplexity(torch.zeros(3, 4), torch.tensor([0, 1, 2])), 6)
        -4.0
    """
    return -math.exp(_cross_entropy("negative_perplexity", outputs, targets))


def class_rows(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
    """Logits ``(rows, classes)`` and class indices ``(rows,)``, or None where the outputs are not over classes.

    Rows whose target is negative are left out.

    Example:
        >>> import torch
        >>> logits, classes = class_rows(torch.zeros(2, 3, 5), torch.zeros(2, 3).long())
        >>> tuple(logits.shape), tuple(classes.shape)
        ((6, 5), (6,))
    """
    if not outputs.is_floating_point() or targets.is_floating_point() or outputs.ndim != targets.ndim + 1:
        return None
    if outputs.shape[:-1] != targets.shape:
        if outputs.ndim < 3 or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
            return None
        outputs = outputs.movedim(1, -1)
    if outputs.shape[-1] == 1:
        return None
    logits, classes = outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1).long()
    kept = classes >= 0
    return (logits, classes) if bool(kept.all()) else (logits[kept], classes[kept])


def _rows_or_error(name: str, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    rows = class_rows(outputs, targets) if isinstance(outputs, Tensor) else None
    if rows is None:
        kind = f"{_shape(outputs)} {outputs.dtype}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TaskError(
            f"{name} needs logits with one axis of classes more than the integer targets, got outputs {kind} and "
            f"targets {_shape(targets)} {targets.dtype}."
        )
    if rows[1].numel() == 0:
        raise TaskError(f"{name} has no target that counts: every one is negative.")
    return rows


def _cross_entropy(name: str, outputs: Tensor, targets: Tensor) -> float:
    logits, classes = _rows_or_error(name, outputs, targets)
    return float(functional.cross_entropy(logits.double(), classes))


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
