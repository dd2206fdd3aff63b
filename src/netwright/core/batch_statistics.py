"""Statistics of batch norms, taken anew from data."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from netwright.core.data import Inputs, call, to_device
from netwright.core.evaluate import device_of
from netwright.core.graph.rebuild import RunningNorm

__all__ = ["reestimate"]


def reestimate(model: nn.Module, inputs: Iterable[Inputs]) -> None:
    """Let every batch norm take its statistics from ``inputs`` anew, each the mean over the batches.

    Reach for it where a network was put together from parts whose statistics were taken in other company. Everything
    but the norms is in evaluation mode; a model without batch norms is left alone.

    Args:
        model: in any form, also as a graph that :meth:`netwright.core.graph.Graph.shrink` made; left in eval mode.
        inputs: batches of the training split.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> reestimate(norm, [torch.tensor([[0.0], [2.0]]), torch.tensor([[2.0], [4.0]])])
        >>> norm.running_mean, norm.running_var
        (tensor([2.]), tensor([2.]))

    Cost: a forward pass over ``inputs``.
    """
    model.eval()
    norms: list[Any] = [norm for norm in model.modules() if isinstance(norm, _BatchNorm | RunningNorm)]
    momenta = [norm.momentum for norm in norms]
    if not norms:
        return
    device = device_of(model)
    try:
        with torch.no_grad():
            for number, batch in enumerate(inputs, start=1):
                for norm in norms:
                    norm.momentum = 1.0 / number  # a running mean, with equal weights
                    norm.train()
                call(model, to_device(batch, device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
