"""Random small networks of mixed operations: what a hypernetwork is trained on, and what it is asked about."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from netwright.core.errors import SettingError
from netwright.core.randomness import seeded

__all__ = ["RandomNetwork", "random_networks"]

OPERATIONS = ("conv3", "conv1", "separable3", "grouped3", "bottleneck", "max_pool", "average_pool", "skip")


class Cell(nn.Module):
    """A few operations, each on the sum of one or two results before it, ``(n, c, h, w) -> (n, c, h, w)``.

    Args:
        channels: ``c``.
        operations: one for each step.
        sources: which results each step adds; 0 is the cell's input.
        joined: whether the last result is added to the input, or taken alone.
    """

    def __init__(
        self, channels: int, operations: Sequence[str], sources: Sequence[Sequence[int]], joined: bool
    ) -> None:
        super().__init__()
        self.steps = nn.ModuleList(_step(name, channels) for name in operations)
        self.sources = tuple(tuple(part) for part in sources)
        self.joined = joined

    def forward(self, x: Tensor) -> Tensor:
        """The last result."""
        results = [x]
        for step, sources in zip(self.steps, self.sources, strict=True):
            given = results[sources[0]]
            for source in sources[1:]:
                given = given + results[source]
            results.append(step(given))
        return results[-1] + x if self.joined else results[-1]


class RandomNetwork(nn.Module):
    """Stem, cells in stages of which each after the first halves the resolution, pooling, classifier.

    Args:
        inputs: channels of the image.
        classes: logits that come out.
        rng: draws the architecture.
    """

    def __init__(self, inputs: int, classes: int, rng: np.random.Generator) -> None:
        super().__init__()
        width = int(rng.choice([8, 12, 16]))
        layers: list[nn.Module] = [_convolution(inputs, width, 3)]
        cells, halved = int(rng.integers(1, 4)), int(rng.integers(0, 3))
        for number in range(cells):
            if number == halved:
                wider = int(rng.choice([width, 2 * width]))
                layers.append(_convolution(width, wider, 3, stride=2))
                width = wider
            layers.append(_cell(width, rng))
        self.features = nn.Sequential(*layers)
        side = int(rng.choice([1, 2]))
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.head = nn.Linear(width * side**2, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``(n, inputs, h, w)``."""
        logits: Tensor = self.head(self.pool(self.features(x)).flatten(1))
        return logits


def random_networks(count: int, seed: int, *, inputs: int = 1, classes: int = 10) -> list[RandomNetwork]:
    """Small convolutional networks of random depth, width, wiring and operations.

    Reach for it to train a hypernetwork, or to have architectures that it has not seen: different seeds draw
    different networks. Widths are 8 to 32, kernels 1 and 3; batch norm follows every convolution but depthwise ones.

    Args:
        count: how many.
        seed: source of the draws, of the initial weights too.
        inputs: channels of the image.
        classes: logits that come out.

    Raises:
        SettingError: a count, channels or classes below 1.

    Example:
        >>> import torch
        >>> [tuple(network(torch.zeros(2, 1, 8, 8)).shape) for network in random_networks(2, seed=0)]
        [(2, 10), (2, 10)]
    """
    for name, value in (("count", count), ("inputs", inputs), ("classes", classes)):
        if value < 1:
            raise SettingError(f"{name} must be at least 1, got {value}.")
    rng = np.random.default_rng(seed)
    with seeded(seed):
        return [RandomNetwork(inputs, classes, rng) for _ in range(count)]


def _cell(channels: int, rng: np.random.Generator) -> Cell:
    count = int(rng.integers(1, 3))
    operations = [str(rng.choice(OPERATIONS)) for _ in range(count)]
    sources = [sorted({step, int(rng.integers(0, step + 1))}) for step in range(count)]
    return Cell(channels, operations, sources, bool(rng.random() < 0.5))


def _step(name: str, channels: int) -> nn.Module:
    if name == "max_pool":
        return nn.MaxPool2d(3, 1, 1)
    if name == "average_pool":
        return nn.AvgPool2d(3, 1, 1)
    if name == "skip":
        return nn.Identity()
    if name == "separable3":
        depthwise = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        return nn.Sequential(depthwise, _convolution(channels, channels, 1))
    if name == "bottleneck":
        narrow = channels // 2
        return nn.Sequential(_convolution(channels, narrow, 1), _convolution(narrow, channels, 3))
    size, groups = {"conv3": (3, 1), "conv1": (1, 1), "grouped3": (3, 4)}[name]
    return _convolution(channels, channels, size, groups=groups)


def _convolution(inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
