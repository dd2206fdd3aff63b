"""The algebra of convolutions that follow each other or are added up."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Extent", "Kernel", "Pair", "add", "compose", "identity"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Extent:
    """What a convolution of images looks at: height and width of its kernel, stride, zeros on either side."""

    size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)

    def then(self, other: "Extent") -> "Extent":
        """That of both in a row, padded once."""
        (a, b), (s, t), (p, q) = self.size, self.stride, self.padding
        (c, d), (u, v), (e, f) = other.size, other.stride, other.padding
        return Extent((a + (c - 1) * s, b + (d - 1) * t), (s * u, t * v), (p + s * e, q + t * f))

    def offset(self, other: "Extent") -> Pair | None:
        """Where ``other`` lies within this one when outputs are to meet; None where it reaches beyond."""
        at = self.padding[0] - other.padding[0], self.padding[1] - other.padding[1]
        fits = all(a >= 0 and a + less <= more for a, less, more in zip(at, other.size, self.size, strict=True))
        return at if fits and self.stride == other.stride else None


@dataclass(frozen=True)
class Kernel:
    """An affine convolution of images.

    Args:
        weight: ``(outputs, inputs / groups, height, width)``, float64.
        bias: ``(outputs,)``, float64.
        stride: of rows and columns.
        padding: zeros on either side of rows and columns.
        groups: 1, or the number of channels where each is convolved for itself.
    """

    weight: Tensor
    bias: Tensor
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    groups: int = 1

    @property
    def size(self) -> Pair:
        """Height and width."""
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def extent(self) -> Extent:
        """What it looks at."""
        return Extent(self.size, self.stride, self.padding)

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved for itself."""
        return self.groups == self.weight.shape[0] and self.weight.shape[1] == 1

    def dense(self) -> "Kernel":
        """The same convolution in one group."""
        if self.groups == 1:
            return self
        outputs, inputs = self.weight.shape[0] // self.groups, self.weight.shape[1]
        weight = self.weight.new_zeros(self.weight.shape[0], inputs * self.groups, *self.size)
        for group in range(self.groups):
            rows = slice(group * outputs, (group + 1) * outputs)
            weight[rows, group * inputs : (group + 1) * inputs] = self.weight[rows]
        return Kernel(weight, self.bias, self.stride, self.padding)

    def dilated(self, rate: Pair) -> "Kernel":
        """The kernel with ``rate - 1`` zeros between its entries."""
        if rate == (1, 1):
            return self
        size = [(length - 1) * step + 1 for length, step in zip(self.size, rate, strict=True)]
        weight = self.weight.new_zeros(*self.weight.shape[:2], *size)
        weight[:, :, :: rate[0], :: rate[1]] = self.weight
        return Kernel(weight, self.bias, self.stride, self.padding, self.groups)

    def identity_like(self) -> bool:
        """Whether it gives back what it gets."""
        if self.size != (1, 1) or self.stride != (1, 1) or self.padding != (0, 0):
            return False
        square = self.dense().weight[:, :, 0, 0]
        return square.shape[0] == square.shape[1] and bool(
            (square == torch.eye(len(square), dtype=square.dtype, device=square.device)).all()
            and (self.bias == 0).all()
        )


def identity(channels: int, device: torch.device | str = "cpu") -> Kernel:
    """The convolution that gives back its ``channels``."""
    one = torch.ones(channels, 1, 1, 1, dtype=torch.float64, device=device)
    return Kernel(one, torch.zeros_like(one[:, 0, 0, 0]), groups=channels)


def compose(first: Kernel, second: Kernel) -> Kernel:
    r"""The convolution that equals ``second`` after ``first`` where no zeros are padded between the two.

    With kernels :math:`K_1`, :math:`K_2`, biases :math:`b_1`, :math:`b_2`, strides :math:`s_1`, :math:`s_2` and
    paddings :math:`p_1`, :math:`p_2`,

    .. math:: K[o, i, y] = \sum_{c, v} K_2[o, c, v]\, K_1[c, i, y - s_1 v], \quad
              b[o] = b_2[o] + \sum_{c, v} K_2[o, c, v]\, b_1[c], \quad s = s_1 s_2, \quad p = p_1 + s_1 p_2.
    """
    extent = first.extent.then(second.extent)
    together = first.depthwise and second.depthwise
    one, two = (first, second) if together else (first.dense(), second.dense())
    groups = one.groups if together else 1
    inner = one.bias[:, None] if together else one.bias
    sums = two.weight.sum((2, 3))
    bias = two.bias + ((sums * inner)[:, 0] if together else sums @ inner)
    spread = two.dilated(first.stride).weight.flip(2, 3)
    reach = spread.shape[2] - 1, spread.shape[3] - 1
    full = functional.conv2d(one.weight.transpose(0, 1), spread, padding=reach, groups=groups)
    return Kernel(full.transpose(0, 1).contiguous(), bias, extent.stride, extent.padding, groups)


def add(main: Kernel, other: Kernel) -> Kernel | None:
    """The convolution that equals the sum of two; None where ``other`` reaches beyond ``main``, or strides differ."""
    offsets = main.extent.offset(other.extent)
    if offsets is None:
        return None
    together = main.depthwise and other.depthwise
    one, two = (main, other) if together else (main.dense(), other.dense())
    weight = one.weight.clone()
    rows, columns = (slice(at, at + length) for at, length in zip(offsets, other.size, strict=True))
    weight[:, :, rows, columns] += two.weight
    return Kernel(weight, one.bias + two.bias, main.stride, main.padding, one.groups)
