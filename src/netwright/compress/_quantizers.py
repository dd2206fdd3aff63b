"""The modules that a quantized model is built with: fake quantizers of activations and of weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netwright.core import fake_quantize  # registers what torch.export needs to trace the operations below

__all__ = ["ActivationQuantizer", "Integers", "WeightQuantizer", "in_single", "weight_scale"]

assert fake_quantize.DOMAIN
_TINY = 1e-12  # the least range of a tensor of zeros


@dataclass(frozen=True)
class Integers:
    """A range of integers: from ``low`` to ``high``."""

    low: int
    high: int

    @classmethod
    def activation(cls, kind: str) -> "Integers":
        """All of ``"uint8"`` or ``"int8"``."""
        return cls(0, 255) if kind == "uint8" else cls(-128, 127)

    @classmethod
    def weight(cls, kind: str, reach: int) -> "Integers":
        """A range of ``reach`` steps to each side of its middle: 127 are all of 8 bits."""
        middle = 128 if kind == "uint8" else 0
        return cls(middle - reach, middle + reach)

    @property
    def middle(self) -> int:
        """The integer that stands for zero in a symmetric range."""
        return (self.low + self.high) // 2


class ActivationQuantizer(nn.Module):
    r"""Rounds an activation to what integers can hold: ``(clip(round(x / s) + z, low, high) - z) s``.

    Gradients pass straight through, except where the value was clipped. Scale and zero point are buffers, and do not
    train.

    Args:
        scale: ``s``, the size of a step.
        zero_point: ``z``, the integer that stands for zero.
        integers: their range.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: float, zero_point: int, integers: Integers) -> None:
        super().__init__()
        self.integers = integers
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` rounded, in its own type."""
        return in_single(self.rounded, x)

    def rounded(self, x: Tensor) -> Tensor:
        """``x``, of 32-bit floats, rounded."""
        return torch.fake_quantize_per_tensor_affine(
            x, self.scale, self.zero_point, self.integers.low, self.integers.high
        )


class WeightQuantizer(nn.Module):
    """Rounds a weight to what integers can hold, with a scale for each output channel.

    In training mode the scales follow the weights, ``factor_c max |w_c| / reach``; in evaluation mode they stay. The
    buffer ``factor`` is None for ones; whoever sets other scales sets it too, or the first step of training undoes it.

    Args:
        weight: the weight whose scales to start with.
        axis: the dimension of its output channels.
        integers: their range, symmetric about its middle.
        per_channel: one scale per channel, or one for all.
    """

    scale: Tensor
    zero_point: Tensor
    factor: Tensor | None

    def __init__(self, weight: Tensor, axis: int, integers: Integers, per_channel: bool) -> None:
        super().__init__()
        self.axis, self.integers, self.per_channel = axis, integers, per_channel
        self.register_buffer("factor", None)
        self.register_buffer("scale", self._scale(weight))
        zeros = torch.full_like(self.scale, integers.middle, dtype=torch.int32)
        self.register_buffer("zero_point", zeros)

    def _scale(self, weight: Tensor) -> Tensor:
        scale = weight_scale(weight.detach(), self.axis, self.integers.high - self.integers.middle, self.per_channel)
        return scale if self.factor is None else self.factor * scale

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` rounded, in its own type."""
        if self.training:
            self.scale.copy_(self._scale(weight))
        return in_single(self._rounded, weight)

    def _rounded(self, weight: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(
            weight, self.scale, self.zero_point, self.axis, self.integers.low, self.integers.high
        )


def weight_scale(weight: Tensor, axis: int, reach: int, per_channel: bool) -> Tensor:
    """Step sizes ``(c,)`` with which the largest weight of each channel (or of all) is ``reach`` steps."""
    others = [position for position in range(weight.ndim) if position != axis]
    largest = (weight.abs().amax(others) if others else weight.abs()).float()
    if not per_channel:
        largest = largest.max().expand(weight.shape[axis])
    return largest.clamp_min(_TINY) / reach


def in_single(rounded: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``rounded(x)`` in 32-bit floats, which scales are, given back in the type of ``x``."""
    return rounded(x) if x.dtype == torch.float32 else rounded(x.float()).to(x.dtype)
