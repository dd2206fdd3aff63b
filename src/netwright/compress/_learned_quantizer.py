"""Symmetric grids with a learned step and range, whose bit width follows from both."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netwright.compress._quantizers import in_single
from netwright.core import fake_quantize  # registers what torch.export needs to trace the operation below

__all__ = ["FixedQuantizer", "LearnedGrid", "grid_slopes", "on_grid", "step_of", "width_of"]

assert fake_quantize.DOMAIN
_TINY = 1e-8


def width_of(step: float, reach: float) -> float:
    r"""The bit width of a grid, :math:`b = \log_2(q / d + 1) + 1`; not whole in general.

    Example:
        >>> width_of(1.0, 7.0)
        4.0
    """
    return math.log2(reach / step + 1.0) + 1.0


def step_of(width: float, reach: float) -> float:
    r"""The step of a grid of that width, :math:`d = q / (2^{b-1} - 1)`.

    Example:
        >>> step_of(4.0, 7.0)
        1.0
    """
    return float(reach / (2.0 ** (width - 1.0) - 1.0))


def on_grid(x: Tensor, step: float, reach: float) -> Tensor:
    r""":math:`x^Q = \mathrm{sgn}(x)\, d\, \mathrm{round}(\min(|x|, q) / d)`."""
    return x.sign() * step * torch.round(x.abs().clamp_max(reach) / step)


def residual(x: Tensor, step: float, reach: float) -> Tensor:
    r""":math:`\mathrm{sgn}(x) R(x)`, so that :math:`x^Q = \mathrm{sgn}(x) \min(|x|, q) + d\, \mathrm{sgn}(x) R(x)`."""
    scaled = x.abs().clamp_max(reach) / step
    return x.sign() * (torch.round(scaled) - scaled)


def grid_slopes(x: Tensor, gradient: Tensor, step: float, reach: float) -> tuple[float, float]:
    r"""The slopes of the loss in :math:`d` and :math:`q`, rounding being passed straight through.

    .. math:: \frac{\partial x^Q}{\partial d} = \mathrm{sgn}(x) R(x), \qquad
              \frac{\partial x^Q}{\partial q} = \mathrm{sgn}(x)\, 1[|x| \ge q]
    """
    by_step = (gradient * residual(x, step, reach)).sum()
    by_reach = (gradient * x.sign() * (x.abs() >= reach)).sum()
    return float(by_step), float(by_reach)


@dataclass
class LearnedGrid:
    """The step ``d`` and the range ``q`` of one weight, which stay above zero.

    Args:
        step: ``d``.
        reach: ``q``.
    """

    step: float
    reach: float

    @classmethod
    def of(cls, x: Tensor, width: float) -> "LearnedGrid":
        """A grid of that width over all of ``x``."""
        reach = max(float(x.detach().abs().max()), _TINY)
        return cls(step_of(width, reach), reach)

    @property
    def width(self) -> float:
        """Bits."""
        return width_of(self.step, self.reach)

    def descend(self, x: Tensor, gradient: Tensor, rate: float) -> None:
        """A gradient step, of a size that suits a sum over all weights; neither loses more than half of its value."""
        by_step, by_reach = grid_slopes(x, gradient, self.step, self.reach)
        count = max(1, x.numel())
        levels = self.reach / self.step
        self.step = max(self.step - rate * by_step / math.sqrt(count * levels), 0.5 * self.step)
        self.reach = max(self.reach - rate * by_reach / math.sqrt(count), 0.5 * self.reach, _TINY)

    def project(self, low: float, high: float) -> None:
        """The nearest step with which the width lies within ``[low, high]``."""
        self.step = min(max(self.step, step_of(high, self.reach)), step_of(low, self.reach))


class FixedQuantizer(nn.Module):
    """Rounds a weight to integers of ``width`` bits; the scale is a buffer and does not train.

    Args:
        steps: ``(channels,)`` the size of a step for each output channel.
        width: bits, whole, at most 8.
        axis: their dimension.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, steps: Tensor, width: int, axis: int) -> None:
        super().__init__()
        self.axis, self.width = axis, width
        self.reach = 2 ** (width - 1) - 1
        self.register_buffer("scale", steps.float().clamp_min(_TINY))
        self.register_buffer("zero_point", torch.zeros_like(steps, dtype=torch.int32))

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` rounded, in its own type."""
        return in_single(self._rounded, weight)

    def _rounded(self, weight: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(
            weight, self.scale, self.zero_point, self.axis, -self.reach, self.reach
        )
