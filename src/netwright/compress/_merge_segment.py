"""A part of a chain that becomes one convolution: as layers that can be trained, and merged."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from netwright.compress._fold import attribute
from netwright.compress._merge_chains import Layer, Skip
from netwright.compress._merge_convolutions import Extent, Kernel, Pair, add, compose, identity

__all__ = ["Branch", "Piece", "Segment", "build", "convolution", "extent_of"]


def extent_of(module: fx.GraphModule, layer: Layer) -> Extent:
    """What a layer looks at."""
    weight = attribute(module, layer.conv.args[1])
    assert weight is not None
    rows, columns = ((size - 1) * rate + 1 for size, rate in zip(weight.shape[2:], layer.dilation, strict=True))
    return Extent((rows, columns), layer.stride, layer.padding)


class Piece(nn.Module):
    """A convolution without padding, and its batch norm."""

    def __init__(self, module: fx.GraphModule, layer: Layer) -> None:
        super().__init__()
        weight = attribute(module, layer.conv.args[1])
        bias = attribute(module, layer.conv.args[2]) if len(layer.conv.args) > 2 else None
        assert weight is not None
        self.conv = nn.Conv2d(
            weight.shape[1] * layer.groups,
            weight.shape[0],
            (weight.shape[2], weight.shape[3]),
            layer.stride,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=bias is not None,
            device="meta",
        )
        self.conv.weight = _copied(weight)
        if bias is not None:
            self.conv.bias = _copied(bias)
        self.norm: nn.Module = nn.Identity()
        if layer.norm is not None:
            norm = module.get_submodule(str(layer.norm.target))
            assert isinstance(norm, _BatchNorm)
            self.norm = copy.deepcopy(norm)
        self.extent = extent_of(module, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Padded images to images."""
        result: Tensor = self.norm(self.conv(x))
        return result

    def kernel(self) -> Kernel:
        """The same in evaluation mode, as one convolution with its padding."""
        weight = self.conv.weight.detach().double()
        bias = weight.new_zeros(len(weight)) if self.conv.bias is None else self.conv.bias.detach().double()
        if isinstance(self.norm, _BatchNorm):
            norm = self.norm
            assert norm.running_mean is not None
            assert norm.running_var is not None
            factor = (norm.running_var.double() + norm.eps).rsqrt()
            factor = factor if norm.weight is None else factor * norm.weight.detach().double()
            weight = weight * factor[:, None, None, None]
            bias = (bias - norm.running_mean.double()) * factor
            bias = bias if norm.bias is None else bias + norm.bias.detach().double()
        plain = Kernel(weight, bias, self.extent.stride, self.extent.padding, self.conv.groups)
        rates = self.conv.dilation
        return plain.dilated((rates[0], rates[1]))


class Branch(nn.Module):
    """Layers with a skip around them; without layers, the skip alone."""

    def __init__(self, body: Sequence[Piece], skip: Piece | None) -> None:
        super().__init__()
        self.body, self.skip = nn.Sequential(*body), skip
        inner = Extent()
        for piece in body:
            inner = inner.then(piece.extent)
        around = Extent() if skip is None else skip.extent
        self.extent = inner if body else around
        offset = self.extent.offset(around)
        assert offset is not None
        self.offset: Pair = offset

    def forward(self, x: Tensor) -> Tensor:
        """Padded images to images."""
        if len(self.body) == 0:
            return x if self.skip is None else self.skip(x)
        y: Tensor = self.body(x)
        around = Extent() if self.skip is None else self.skip.extent
        rows, columns = (
            slice(at, at + (count - 1) * stride + size)
            for at, count, stride, size in zip(self.offset, y.shape[2:], self.extent.stride, around.size, strict=True)
        )
        x = x[:, :, rows, columns]
        return y + (x if self.skip is None else self.skip(x))

    def kernel(self, channels: int) -> Kernel:
        """The same as one convolution."""
        if len(self.body) == 0:
            return identity(channels) if self.skip is None else self.skip.kernel()
        main = _composed([piece.kernel() for piece in self.body if isinstance(piece, Piece)])
        whole = add(main, identity(channels, main.weight.device) if self.skip is None else self.skip.kernel())
        assert whole is not None
        return whole


class Segment(nn.Module):
    """Layers and branches that see their input padded once, for all of them.

    Args:
        units: in their order; none for a part that gives back its input.
        channels: of its input.
    """

    def __init__(self, units: Sequence[Piece | Branch], channels: int) -> None:
        super().__init__()
        self.units = nn.Sequential(*units)
        self.channels = channels
        self.extent = Extent()
        for unit in units:
            self.extent = self.extent.then(unit.extent)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(b, c, h, w)`` to images."""
        rows, columns = self.extent.padding
        if rows or columns:
            x = functional.pad(x, (columns, columns, rows, rows))
        result: Tensor = self.units(x)
        return result

    def kernel(self) -> Kernel:
        """The same in evaluation mode, as one convolution."""
        channels, parts = self.channels, []
        for unit in self.units:
            assert isinstance(unit, Branch | Piece)
            part = unit.kernel(channels) if isinstance(unit, Branch) else unit.kernel()
            channels = len(part.weight)
            parts.append(part)
        return _composed(parts) if parts else identity(self.channels)


def build(
    module: fx.GraphModule,
    layers: Sequence[tuple[int, Layer]],
    skips: Sequence[tuple[Skip, int]],
    start: int,
    stop: int,
    channels: int,
) -> Segment:
    """The segment of positions ``start`` to ``stop`` that keeps ``layers``.

    Args:
        module: the graph that the weights are copied from.
        layers: the kept ones with their positions.
        skips: those that begin and end within the segment, with the positions of their ends.
        start: position of its input.
        stop: position of its output.
        channels: of its input.
    """
    kept = dict(layers)
    ends = {skip.start: (skip, stop) for skip, stop in skips}
    units: list[Piece | Branch] = []
    position = start
    while position < stop:
        skip, end = ends.get(position, (None, position + 1))
        body = [Piece(module, kept[each]) for each in range(position + 1, end + 1) if each in kept]
        if skip is None:
            units += body
        elif body or skip.layer is not None:
            units.append(Branch(body, None if skip.layer is None else Piece(module, skip.layer)))
        position = end
    return Segment(units, channels)


def _composed(parts: Sequence[Kernel]) -> Kernel:
    whole = parts[0]
    for part in parts[1:]:
        whole = compose(whole, part)
    return whole


def _copied(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)


def convolution(module: fx.GraphModule, node: fx.Node) -> None:
    """Write the convolution that a segment amounts to in place of the call of that segment."""
    path = str(node.target)
    segment = module.get_submodule(path)
    assert isinstance(segment, Segment)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    kernel = segment.kernel()
    if kernel.identity_like():
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
        return
    first = next(segment.parameters())
    trainable = any(value.requires_grad for value in segment.parameters())
    holder = nn.Module()
    for name, value in (("weight", kernel.weight), ("bias", kernel.bias)):
        value = value.to(first.device, first.dtype)
        setattr(holder, name, nn.Parameter(value.contiguous(), requires_grad=trainable))
    module.set_submodule(path, holder)
    with module.graph.inserting_before(node):
        weight, bias = module.graph.get_attr(f"{path}.weight"), module.graph.get_attr(f"{path}.bias")
        arguments = (source, weight, bias, list(kernel.stride), list(kernel.padding), [1, 1], kernel.groups)
        merged = module.graph.call_function(torch.ops.aten.conv2d.default, arguments)
    merged.meta = {key: value for key, value in node.meta.items() if key != "nn_module_stack"}  # it is no layer's now
    node.replace_all_uses_with(merged)
    module.graph.erase_node(node)
