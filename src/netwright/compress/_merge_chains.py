"""Chains of convolutions in a traced graph: each reads the one before, through a pointwise function at most."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from netwright.compress._fold import attribute, op_name

__all__ = ["Boundary", "Chain", "Layer", "Skip", "find_chains", "image_size"]

_POINTWISE = frozenset(
    ("relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "hardswish", "hardsigmoid",
     "sigmoid", "tanh", "mish", "softplus")
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A convolution and the batch norm that alone reads it.

    Args:
        conv: its node.
        norm: the node of its batch norm, or None.
        stride, padding, dilation, groups: of the convolution.
    """

    conv: fx.Node
    norm: fx.Node | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def last(self) -> fx.Node:
        """The node with its output."""
        return self.norm or self.conv


@dataclass(frozen=True)
class Skip:
    """A connection that is added to the output of a layer.

    Args:
        start: the position whose value it takes.
        join: the node of the sum.
        layer: a convolution on the way, or None.
    """

    start: int
    join: fx.Node
    layer: Layer | None


@dataclass(frozen=True)
class Boundary:
    """What follows a layer: at most one sum, at most one pointwise function, and the node with the value."""

    skip: Skip | None
    act: fx.Node | None
    value: fx.Node


@dataclass
class Chain:
    """Layers ``1..n`` with their boundaries; position ``p`` is the value after layer ``p``, position 0 the input."""

    source: fx.Node
    layers: list[Layer] = field(default_factory=list)
    boundaries: list[Boundary] = field(default_factory=list)

    def value(self, position: int) -> fx.Node:
        """The node with the value at a position."""
        return self.source if position == 0 else self.boundaries[position - 1].value

    def skips(self) -> list[tuple[Skip, int]]:
        """Every skip with the position of its sum."""
        return [(each.skip, position + 1) for position, each in enumerate(self.boundaries) if each.skip is not None]


def image_size(node: fx.Node) -> tuple[int, int, int] | None:
    """Channels, height and width of an image-valued node with fixed sizes; None for any other."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.ndim != 4:
        return None
    channels, height, width = value.shape[1:]
    fixed = all(isinstance(size, int) for size in (channels, height, width))
    return (channels, height, width) if fixed else None


def find_chains(module: fx.GraphModule) -> list[Chain]:
    """The chains of a graph whose batch norms are thawed, in its order; every convolution is in one at most."""
    return _Walk(module).chains()


class _Walk:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.reads = Counter(
            str(node.target) for node in module.graph.nodes if node.op == "get_attr" for _ in node.users
        )
        self.calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
        self.taken: set[fx.Node] = set()

    def chains(self) -> list[Chain]:
        found = []
        for node in self.module.graph.nodes:
            layer = self.layer(node)
            if layer is None or node in self.taken:
                continue
            source = node.args[0]
            if any(other is not node and self.residual(other, node) for other in self.convs(source)):
                continue  # the shortcut of a longer path, which comes later
            chain = Chain(source)
            self.walk(chain, layer)
            found.append(chain)
        return found

    def walk(self, chain: Chain, layer: Layer) -> None:
        """Append layers from ``layer`` on until the chain ends."""
        awaited: Skip | None = self.opening(chain, 0, layer)
        following: Layer | None = layer
        while following is not None:
            chain.layers.append(following)
            self.taken.add(following.conv)
            value, skip = following.last, None
            if awaited is not None and value in awaited.join.all_input_nodes and set(value.users) == {awaited.join}:
                value, skip, awaited = awaited.join, awaited, None
                if skip.layer is not None:
                    self.taken.add(skip.layer.conv)
            act = None
            if len(value.users) == 1 and self.pointwise(user := next(iter(value.users))):
                value = act = user
            chain.boundaries.append(Boundary(skip, act, value))
            following, opened = self.next(chain, awaited)
            awaited = awaited or opened

    def next(self, chain: Chain, awaited: Skip | None) -> tuple[Layer | None, Skip | None]:
        """The layer that continues a chain, and the skip that opens before it."""
        position = len(chain.layers)
        value = chain.value(position)
        for conv in self.convs(value):
            layer = self.layer(conv)
            if layer is None or conv in self.taken:
                continue
            if set(value.users) == {conv}:
                return layer, None
            skip = None if awaited is not None else self.opening(chain, position, layer)
            if skip is not None:
                rest = skip.join if skip.layer is None else skip.layer.conv
                if set(value.users) == {conv, rest}:
                    return layer, skip
        return None, None

    def opening(self, chain: Chain, position: int, layer: Layer) -> Skip | None:
        """The skip around the path that begins with ``layer``, or None."""
        value = chain.value(position)
        join = self.end(layer)
        if join is None:
            return None
        operands = join.all_input_nodes
        if value in operands:
            return Skip(position, join, None)
        for other in self.convs(value):
            shortcut = self.layer(other)
            if shortcut is not None and other is not layer.conv and self.residual(layer.conv, other):
                return Skip(position, join, shortcut)
        return None

    def residual(self, main: fx.Node, other: fx.Node) -> bool:
        """Whether the path from ``main`` is added to the single layer ``other``, and is the longer one of both."""
        path, shortcut = self.layer(main), self.layer(other)
        if path is None or shortcut is None:
            return False
        join = self.end(path)
        return join is not None and set(shortcut.last.users) == {join} and path.last not in join.all_input_nodes

    def end(self, layer: Layer) -> fx.Node | None:
        """The sum that a path of layers without branches ends in, right after a layer."""
        node = layer.last
        while len(node.users) == 1:
            user = next(iter(node.users))
            if self.sums(user):
                return None if self.pointwise(node) else user
            step = self.layer(user)
            if step is not None and user.args[0] is node:
                node = step.last
            elif self.pointwise(user):
                node = user
            else:
                return None
        return None

    def sums(self, node: fx.Node) -> bool:
        """Whether a node adds two images of the same shape."""
        if op_name(node) not in ("add", "add_") or len(node.args) != 2 or node.kwargs or len(node.all_input_nodes) != 2:
            return False
        sizes = {image_size(each) for each in (node, *node.all_input_nodes)}
        return len(sizes) == 1 and None not in sizes

    def pointwise(self, node: fx.Node) -> bool:
        return op_name(node).rstrip("_") in _POINTWISE and len(node.all_input_nodes) == 1

    def convs(self, value: fx.Node) -> Iterator[fx.Node]:
        return (user for user in value.users if op_name(user) == "conv2d" and user.args[0] is value)

    def layer(self, node: fx.Node) -> Layer | None:
        """A two-dimensional convolution of fixed sizes with weights of its own, and its batch norm."""
        if op_name(node) != "conv2d" or not isinstance(node.args[0], fx.Node) or image_size(node) is None:
            return None
        if image_size(node.args[0]) is None or node.kwargs:
            return None
        weights = [each for each in node.args[1:3] if each is not None]
        if any(not isinstance(each, fx.Node) or not self.alone(each) for each in weights):
            return None
        rest: list[Any] = list(node.args[3:])
        rest += (1, 0, 1, 1)[len(rest) :]
        stride, padding, dilation, groups = rest
        weight = attribute(self.module, node.args[1])
        assert weight is not None
        rates = _pair(dilation)
        pads = _padding(padding, weight, rates)
        if pads is None:
            return None
        norm = next(iter(node.users)) if len(node.users) == 1 else None
        own = norm is not None and self.owns(norm)
        return Layer(node, norm if own else None, _pair(stride), pads, rates, int(groups))

    def alone(self, node: fx.Node) -> bool:
        """Whether a weight is stored and read once."""
        return attribute(self.module, node) is not None and self.reads[str(node.target)] == 1

    def owns(self, node: fx.Node) -> bool:
        """Whether a node calls a batch norm that no other node calls."""
        if node.op != "call_module" or self.calls[str(node.target)] != 1:
            return False
        norm: nn.Module = self.module.get_submodule(str(node.target))
        return isinstance(norm, _BatchNorm) and norm.running_mean is not None


def _pair(value: object) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    assert isinstance(value, list | tuple)
    return int(value[0]), int(value[-1])


def _padding(value: object, weight: torch.Tensor, rates: tuple[int, int]) -> tuple[int, int] | None:
    """Zeros on either side; None for a padding that is not the same on both."""
    if not isinstance(value, str):
        return _pair(value)
    reach = [(size - 1) * rate for size, rate in zip(weight.shape[2:], rates, strict=True)]
    if value == "valid":
        return 0, 0
    return None if any(each % 2 for each in reach) else (reach[0] // 2, reach[1] // 2)
