"""Stages of residual bottleneck blocks with group convolutions, and what a pass through them costs."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["Shape", "Stage", "StagedNetwork", "count", "strides"]

Shape: TypeAlias = tuple[int, int, int]
"""Channels, height and width of an image."""
_LEAST = 4  # pixels below which the shorter side is not halved


class Stage(NamedTuple):
    """A run of equal blocks.

    Args:
        width: channels of every block, a multiple of ``group_width``.
        depth: number of blocks.
        group_width: channels of one group of the 3x3 convolution.
    """

    width: int
    depth: int
    group_width: int


def strides(inputs: Shape, stages: int) -> list[int]:
    """The stride of the stem and of each stage's first block.

    All halve the resolution where the shorter side then still has 4 pixels; of a smaller image the first ones do not.

    Example:
        >>> strides((3, 224, 224), 4), strides((1, 28, 28), 4)
        ([2, 2, 2, 2, 2], [1, 1, 1, 2, 2])
    """
    halvings = min(stages + 1, max(0, int(math.log2(min(inputs[1:]) / _LEAST))))
    return [1] * (stages + 1 - halvings) + [2] * halvings


class _Block(nn.Module):
    """``relu(f(x) + shortcut(x))``, ``f`` a 1x1, a 3x3 group and a 1x1 convolution, each with batch normalization."""

    def __init__(self, width_in: int, width: int, group_width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, groups=width // group_width, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class StagedNetwork(nn.Module):
    """Stem, stages, global average pooling and a linear layer, ``(n, C, H, W) -> (n, outputs)``.

    Weights of convolutions are drawn from a normal distribution of variance ``2 / fan_out``.

    Args:
        stages: at least one.
        inputs: ``(C, H, W)``; the resolution decides which stages halve it (:func:`strides`).
        outputs: logits that come out.
        stem: channels of the 3x3 convolution in front.
    """

    def __init__(self, stages: Sequence[Stage], inputs: Shape, outputs: int, stem: int) -> None:
        super().__init__()
        steps = strides(inputs, len(stages))
        self.stem = nn.Sequential(
            nn.Conv2d(inputs[0], stem, 3, steps[0], 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()
        )
        blocks: list[nn.Module] = [
            _Block(before, stage.width, stage.group_width, stride)
            for before, stage, stride in _each(stages, steps, stem)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(stages[-1].width, outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``x``."""
        logits: Tensor = self.head(self.pool(self.blocks(self.stem(x))).flatten(1))
        return logits


def count(stages: Sequence[Stage], inputs: Shape, outputs: int, stem: int) -> int:
    """Multiply-accumulates of one image, without building the network."""
    channels, *size = inputs
    steps = strides(inputs, len(stages))
    height, width = (_after(side, steps[0]) for side in size)
    total = 9 * channels * stem * height * width
    for before, stage, stride in _each(stages, steps, stem):
        total += before * stage.width * height * width
        height, width = _after(height, stride), _after(width, stride)
        inside = 9 * stage.group_width + stage.width
        outside = before if stride != 1 or before != stage.width else 0
        total += stage.width * (inside + outside) * height * width
    return total + stages[-1].width * outputs


def _each(stages: Sequence[Stage], steps: Sequence[int], stem: int) -> Iterator[tuple[int, Stage, int]]:
    """Every block as its incoming width, its stage and its stride."""
    before = stem
    for stage, first in zip(stages, steps[1:], strict=True):
        for block in range(stage.depth):
            yield before, stage, first if block == 0 else 1
            before = stage.width


def _after(side: int, stride: int) -> int:
    return -(-side // stride)
