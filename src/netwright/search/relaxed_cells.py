"""A small cell space for images, to try relaxed searches on: five operations, cells, and a network of them."""

import math

import torch
from torch import Tensor, nn

from netwright.core.errors import SettingError
from netwright.search.relaxed import Mixed

__all__ = ["OPERATIONS", "DartsCell", "cell_network"]

OPERATIONS = ("none", "skip", "conv_1x1", "conv_3x3", "avg_pool_3x3")
"""What an edge of a ready-made cell chooses from."""


def _operation(kind: str, width: int) -> nn.Module:
    """A fresh module for one of ``OPERATIONS``; a convolution stands between ReLU and batch norm without scale.

    Raises:
        SettingError: another name.
    """
    if kind == "none":
        return nn.Threshold(math.inf, 0.0)  # zero for every number, and part of torch
    if kind == "skip":
        return nn.Identity()
    if kind == "avg_pool_3x3":
        return nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    if kind in ("conv_1x1", "conv_3x3"):
        size = int(kind[-1])
        convolution = nn.Conv2d(width, width, size, 1, size // 2, bias=False)
        return nn.Sequential(nn.ReLU(), convolution, nn.BatchNorm2d(width, affine=False))
    raise SettingError(f"No operation {kind!r}. A cell knows {', '.join(OPERATIONS)}.")


class DartsCell(nn.Module):
    r"""Nodes of feature maps, ``(n, width, h, w) -> (n, width, h, w)``, each the sum over its predecessors.

    .. math:: x_j = \sum_{i < j} \mathrm{mixed}_{ij}(x_i), \qquad j = 1, \dots, nodes - 1,

    :math:`x_0` the input and the last node the output; with four nodes and five operations the cell of NAS-Bench-201.

    Args:
        width: channels.
        alphas: one parameter ``(operations,)`` for each edge (0, 1), (0, 2), (1, 2), (0, 3), ... that cells share; None
            for its own.
        nodes: input and output included, at least 2.
        kinds: names of operations out of ``OPERATIONS``.

    Raises:
        SettingError: a number below its least, or an operation that is not known.

    Example:
        >>> DartsCell(4)(torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        width: int,
        alphas: list[nn.Parameter] | None = None,
        *,
        nodes: int = 4,
        kinds: tuple[str, ...] = OPERATIONS,
    ) -> None:
        super().__init__()
        if width < 1 or nodes < 2:
            raise SettingError(f"A cell needs width >= 1 and nodes >= 2, got {width} and {nodes}.")
        self.links = [(start, end) for end in range(1, nodes) for start in range(end)]
        if alphas is not None and len(alphas) != len(self.links):
            raise SettingError(f"A cell of {nodes} nodes has {len(self.links)} edges, got {len(alphas)} alphas.")
        shared: list[nn.Parameter | None] = [*alphas] if alphas is not None else [None] * len(self.links)
        self.edges = nn.ModuleList(Mixed({kind: _operation(kind, width) for kind in kinds}, alpha) for alpha in shared)

    def forward(self, x: Tensor) -> Tensor:
        """The last node."""
        nodes = {0: x}
        for edge, (start, end) in zip(self.edges, self.links, strict=True):
            value: Tensor = edge(nodes[start])
            nodes[end] = nodes[end] + value if end in nodes else value
        return nodes[max(nodes)]


def cell_network(
    channels_in: int,
    classes: int,
    *,
    width: int = 8,
    stages: tuple[int, ...] = (1, 1),
    nodes: int = 4,
    kinds: tuple[str, ...] = OPERATIONS,
    stride: int = 1,
) -> nn.Sequential:
    """A small super-network for images, ``(n, channels_in, h, w) -> (n, classes)``; all cells decide alike.

    A 3x3 stem, then stages of cells, between which a fixed 3x3 convolution halves the resolution and doubles the width,
    then the global average and a linear layer.

    Args:
        channels_in: of the images.
        classes: logits that come out.
        width: channels of the first stage.
        stages: cells in each.
        nodes: of a cell.
        kinds: operations to choose from.
        stride: of the stem.

    Raises:
        SettingError: see :class:`DartsCell`.

    Example:
        >>> from netwright.search.relaxed import alphas, mixed
        >>> network = cell_network(1, 10, width=4)
        >>> len(mixed(network)), len(alphas(network))
        (12, 6)
    """
    shared = [nn.Parameter(torch.zeros(len(kinds))) for _ in range(nodes * (nodes - 1) // 2)]
    parts: list[nn.Module] = [nn.Conv2d(channels_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)]
    for place, count in enumerate(stages):
        if place:
            parts += [nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * width)]
            width *= 2
        parts += [DartsCell(width, shared, nodes=nodes, kinds=kinds) for _ in range(count)]
    head = [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return nn.Sequential(*parts, *head)
