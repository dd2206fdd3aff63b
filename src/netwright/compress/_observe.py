"""Ranges of activations, from what passes through a model."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from netwright.compress._quantizers import Integers
from netwright.core.errors import TransformError

__all__ = ["Observer", "grid", "mse_range", "percentile_range"]

_BINS = 2048
_PERCENTILE = 99.99
_SHRINKS = 64


class Observer(nn.Module):
    """Passes a tensor on and remembers the range of its values, and on a second pass their histogram.

    Args:
        where: the name of the operation, for messages.
        owner: the name of the method that rounds it, for messages.
    """

    def __init__(self, where: str, owner: str) -> None:
        super().__init__()
        self.where, self.owner = where, owner
        self.low, self.high = 0.0, 0.0  # zero must always be an integer, for padding and ReLU
        self.counts: NDArray[np.float64] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as it is."""
        if self.counts is None:
            low, high = (float(value) for value in torch.aminmax(x.detach()))
            if not (np.isfinite(low) and np.isfinite(high)):
                raise TransformError(
                    f"{self.owner}: the activations at {self.where} are not finite on the calibration data, so no "
                    "range fits them. Check the model's weights and the training split for NaN."
                )
            self.low, self.high = min(self.low, low), max(self.high, high)
        elif self.high > self.low:
            self.counts += torch.histc(x.detach().float(), _BINS, self.low, self.high).double().cpu().numpy()
        return x

    def start_histogram(self) -> None:
        """From now on count values in bins over the range seen so far."""
        self.counts = np.zeros(_BINS)

    def range(self, calibration: str, integers: Integers) -> tuple[float, float]:
        """The range to keep, by the method named."""
        if self.counts is None or self.counts.sum() == 0:
            return self.low, self.high
        if calibration == "percentile":
            return percentile_range(self.counts, self.low, self.high)
        return mse_range(self.counts, self.low, self.high, integers)


def grid(low: float, high: float, integers: Integers) -> tuple[float, int]:
    """Scale and zero point with which ``integers`` span ``[low, high]``, zero being one of the steps.

    Example:
        >>> grid(-64.0, 191.0, Integers(0, 255))
        (1.0, 64)
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (integers.high - integers.low)
    if scale < float(np.finfo(np.float32).tiny):
        return 1.0, integers.low
    zero_point = round(integers.low - low / scale)
    return scale, int(np.clip(zero_point, integers.low, integers.high))


def percentile_range(counts: NDArray[np.float64], low: float, high: float) -> tuple[float, float]:
    """The range that leaves out the outermost 0.01% of the values, half on each side that is not zero."""
    centres = _centres(counts, low, high)
    share = np.cumsum(counts) / counts.sum()
    tail = (100 - _PERCENTILE) / 100
    first = int(np.searchsorted(share, tail / 2, side="right"))
    last = int(np.searchsorted(share, 1 - tail / 2, side="left"))
    return (low if low == 0 else min(0.0, float(centres[first]))), max(0.0, float(centres[min(last, _BINS - 1)]))


def mse_range(counts: NDArray[np.float64], low: float, high: float, integers: Integers) -> tuple[float, float]:
    """The range, a fraction of ``[low, high]``, whose integers have the least mean squared error on the values seen."""
    centres = _centres(counts, low, high)

    def error(fraction: float) -> float:
        scale, zero = grid(low * fraction, high * fraction, integers)
        steps = np.clip(np.rint(centres / scale) + zero, integers.low, integers.high) - zero
        return float((counts * (steps * scale - centres) ** 2).sum())

    best = min(np.linspace(1.0, 0.2, _SHRINKS), key=error)
    return low * float(best), high * float(best)


def _centres(counts: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    edges = np.linspace(low, high, len(counts) + 1)
    return np.asarray((edges[1:] + edges[:-1]) / 2)
