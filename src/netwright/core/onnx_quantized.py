"""From fake-quantized ONNX to integer ONNX, in the patterns that runtimes have kernels for.

A fake-quantize of a weight becomes an integer initializer and a ``DequantizeLinear``; one of an activation a
``QuantizeLinear`` and a ``DequantizeLinear``, with a ``Clip`` of the integers between them where they are not all of
8 bits and the activation is not clipped to theirs already; the bias of a layer whose input and weight are quantized
becomes a 32-bit integer in units of the product of their scales. Scales are 32-bit floats; a model of another type is
cast to them around its fake-quantizes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from netwright.core.errors import ArtifactError
from netwright.core.fake_quantize import DOMAIN, OPERATION

__all__ = ["store_integers"]

_BIASED = {"Conv": 2, "Gemm": 2}
_LARGEST = 2**30  # of a bias, so that adding the products to it stays in 32 bits


@dataclass(frozen=True)
class _Grid:
    """The integers that stand for a tensor: ``value = (integer - zero_point) * scale``."""

    scale: NDArray[np.float32]
    zero_point: NDArray[np.int32]
    axis: int
    low: int
    high: int

    @property
    def kind(self) -> type[np.integer[Any]]:
        return np.int8 if self.low < 0 else np.uint8

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the largest integer of that kind."""
        info = np.iinfo(self.kind)
        return int(info.min), int(info.max)

    def apply(self, value: NDArray[Any]) -> NDArray[np.integer[Any]]:
        """Integers of a float array, rounded as torch rounds them."""
        clipped: NDArray[Any] = np.clip(self.steps(value), self.low, self.high)
        return clipped.astype(self.kind)

    def steps(self, value: NDArray[Any]) -> NDArray[Any]:
        """The same before they are clipped."""
        shape = [-1 if position == self.axis else 1 for position in range(value.ndim)] if self.scale.ndim else []
        inverse = (np.float32(1) / self.scale).reshape(shape)
        steps: NDArray[Any] = np.rint(value.astype(np.float32) * inverse) + self.zero_point.reshape(shape)
        return steps


def store_integers(proto: Any) -> None:
    """Rewrite every fake-quantize node of ``proto``, in place; a model without any is left as it is.

    Raises:
        ArtifactError: one whose range is beyond -128 to 127 and 0 to 255.
    """
    if not any(node.domain == DOMAIN for node in proto.graph.node):
        return
    _Rewriter(proto.graph).run()
    kept = [entry for entry in proto.opset_import if entry.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)


class _Rewriter:
    """One pass over one graph."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.weights = {item.name: item for item in graph.initializer}
        self.grids: dict[str, _Grid] = {}  # of every dequantized tensor, by name
        self.floats: dict[str, NDArray[Any]] = {}  # the float weight behind a dequantized one
        self.nodes: list[Any] = []
        self.makers: dict[str, Any] = {}  # tensor -> the node that makes it
        self.made: dict[tuple[Any, ...], str] = {}

    def run(self) -> None:
        for node in self.graph.node:
            self.makers.update(dict.fromkeys(node.output, node))
            if node.domain == DOMAIN and node.op_type == OPERATION:
                self._fake_quantize(node)
            elif node.op_type == "Transpose" and node.input[0] in self.floats:
                self._transposed_weight(node)
            else:
                if node.op_type == "Conv":
                    self._take_padding(node)
                if node.op_type in _BIASED:
                    self._bias(node)
                self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)

    def _fake_quantize(self, node: Any) -> None:
        source, scale, zero_point = node.input
        given = {attribute.name: attribute.i for attribute in node.attribute}
        grid = _Grid(self._value(scale), self._value(zero_point), given["axis"], given["low"], given["high"])
        if grid.low < grid.bounds[0] or grid.high > grid.bounds[1]:
            raise ArtifactError(
                f"The model rounds to integers from {grid.low} to {grid.high}; an ONNX file holds -128 to 127 or 0 to "
                "255. Quantize to one of these ranges or a part of it."
            )
        maker = self.makers.get(source)
        stored = maker.input[0] if maker is not None and maker.op_type == "Cast" else source
        if stored in self.weights:  # as it is, or made 32-bit floats
            self._weight(self._value(stored).astype(np.float32), grid, node.output[0])
            return
        middle = f"{node.output[0]}:integers"
        places = self._places(grid)
        axis = grid.axis if grid.scale.ndim and grid.axis >= 0 else None
        self._convert("QuantizeLinear", [source, *places], middle, axis)
        if (grid.low, grid.high) != grid.bounds and not self._is_within(source, grid):
            ends = [self._shared(np.asarray(end, grid.kind)) for end in (grid.low, grid.high)]
            self.nodes.append(helper.make_node("Clip", [middle, *ends], [f"{middle}:clipped"]))
            middle = f"{middle}:clipped"
        self._convert("DequantizeLinear", [middle, *places], node.output[0], axis)
        self.grids[node.output[0]] = grid

    def _is_within(self, name: str, grid: _Grid) -> bool:
        """Whether the node that makes a tensor clips it to the range of its grid."""
        node = self.makers.get(name)
        if node is None or node.op_type != "Clip" or grid.scale.ndim:
            return False
        ends = [float(grid.steps(self._value(end))) for end in node.input[1:] if end in self.weights]
        return len(ends) == 2 and grid.low <= min(ends) and max(ends) <= grid.high

    def _weight(self, value: NDArray[Any], grid: _Grid, output: str) -> None:
        if grid.scale.ndim and (grid.scale == grid.scale[0]).all() and (grid.zero_point == grid.zero_point[0]).all():
            grid = _Grid(grid.scale[0].reshape(()), grid.zero_point[0].reshape(()), -1, grid.low, grid.high)
        stored = self._store(grid.apply(value), f"{output}:integers")
        places = self._places(grid)
        self._convert("DequantizeLinear", [stored, *places], output, grid.axis if grid.scale.ndim else None)
        self.grids[output] = grid
        self.floats[output] = value

    def _convert(self, operation: str, inputs: list[str], output: str, axis: int | None) -> None:
        node = helper.make_node(operation, inputs, [output])
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self.nodes.append(node)

    def _transposed_weight(self, node: Any) -> None:
        """A dequantized weight, transposed, is a transposed weight, dequantized."""
        value, grid = self.floats[node.input[0]], self.grids[node.input[0]]
        order = next((list(item.ints) for item in node.attribute if item.name == "perm"), None)
        order = order or list(range(value.ndim))[::-1]
        axis = order.index(grid.axis % value.ndim) if grid.scale.ndim else -1
        moved = _Grid(grid.scale, grid.zero_point, axis, grid.low, grid.high)
        self._weight(np.ascontiguousarray(value.transpose(order)), moved, node.output[0])

    def _take_padding(self, node: Any) -> None:
        """Zero padding between two roundings on the same grid becomes the convolution's own."""
        outer = self.makers.get(node.input[0])
        pad = self.makers.get(outer.input[0]) if outer is not None and outer.op_type == OPERATION else None
        if pad is None or pad.op_type != "Pad" or pad.input[0] not in self.grids or pad.input[1] not in self.weights:
            return
        given = {item.name: item for item in node.attribute}
        mode = next((item.s for item in pad.attribute if item.name == "mode"), b"constant")
        value = self._value(pad.input[2]) if len(pad.input) > 2 and pad.input[2] in self.weights else np.zeros(1)
        inner, outer_grid = self.grids[pad.input[0]], self.grids[node.input[0]]
        amounts = self._value(pad.input[1])
        half = len(amounts) // 2
        fits = len(pad.input) < 4 and not amounts[[0, 1, half, half + 1]].any() and (amounts >= 0).all()
        plain = mode == b"constant" and not value.any() and "pads" in given
        same = inner.scale == outer_grid.scale and inner.zero_point == outer_grid.zero_point
        if not (fits and plain and same and (inner.low, inner.high) == (outer_grid.low, outer_grid.high)):
            return
        extra = [*amounts[2:half], *amounts[half + 2 :]]
        given["pads"].ints[:] = [old + int(new) for old, new in zip(given["pads"].ints, extra, strict=True)]
        node.input[0] = pad.input[0]

    def _bias(self, node: Any) -> None:
        position = _BIASED[node.op_type]
        if len(node.input) <= position or node.input[position] not in self.weights:
            return
        data, weight = (self.grids.get(name) for name in node.input[:2])
        if data is None or weight is None or data.scale.ndim or node.input[1] not in self.floats:
            return
        bias = self._value(node.input[position])
        if bias.ndim != 1:
            return
        weight = self._wide_enough(node, data, weight, bias)
        scale = (data.scale * weight.scale).astype(np.float32)
        integers = np.rint(bias / scale).astype(np.int32)
        name = f"{node.input[position]}:{node.output[0]}"
        inputs = [self._store(integers, f"{name}:integers"), self._store(scale, f"{name}:scale")]
        zero = np.zeros(scale.shape, np.int32)
        inputs.append(self._store(zero, f"{name}:zero"))
        self._convert("DequantizeLinear", inputs, name, 0 if scale.ndim else None)
        node.input[position] = name

    def _wide_enough(self, node: Any, data: _Grid, weight: _Grid, bias: NDArray[Any]) -> _Grid:
        """The weight's grid, coarser where its steps are so small that the bias would not fit into 32 bits.

        That happens in channels whose weights are all but zero; they are stored again, under a name of their own.
        """
        need = np.abs(bias) / (data.scale * np.float32(_LARGEST))
        if (need <= weight.scale).all():
            return weight
        shape = self._value_shape(node.input[1], weight)
        scale = np.maximum(weight.scale, need.reshape(shape) if weight.scale.ndim else need.max()).astype(np.float32)
        wider = _Grid(scale, weight.zero_point, weight.axis, weight.low, weight.high)
        name = f"{node.input[1]}:{node.output[0]}"
        self._weight(self.floats[node.input[1]], wider, name)
        node.input[1] = name
        return self.grids[name]

    def _value_shape(self, name: str, grid: _Grid) -> tuple[int, ...]:
        return (self.floats[name].shape[grid.axis],)

    def _places(self, grid: _Grid) -> list[str]:
        """Names of the initializers of a grid's scale and zero point; equal ones are stored once."""
        zero = grid.zero_point.astype(grid.kind)
        return [self._shared(grid.scale), self._shared(zero)]

    def _shared(self, value: NDArray[Any]) -> str:
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self.made:
            self.made[key] = self._store(value, f"grid:{len(self.made)}")
        return self.made[key]

    def _store(self, value: NDArray[Any], name: str) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def _value(self, name: str) -> NDArray[Any]:
        return np.asarray(numpy_helper.to_array(self.weights[name]))


def drop_unused(graph: Any) -> None:
    """Remove nodes and weights that nothing reads."""
    used = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if used.intersection(node.output):
            kept.append(node)
            used.update(_reads(node))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    for position in reversed(range(len(graph.initializer))):  # in place, for protobuf does not copy 2 GiB
        if graph.initializer[position].name not in used:
            del graph.initializer[position]


def _reads(node: Any) -> set[str]:
    inner = [graph for item in node.attribute for graph in ([item.g] if item.HasField("g") else item.graphs)]
    return set(node.input).union(*(_reads(each) for graph in inner for each in graph.node))


def spatial_means_to_pools(proto: Any) -> None:
    """Write the mean over height and width as ``GlobalAveragePool``, for which runtimes have integer kernels."""
    graph = proto.graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    weights = {item.name: item for item in graph.initializer}
    for node in graph.node:
        if node.op_type != "ReduceMean" or len(node.input) < 2 or ranks.get(node.input[0]) != 4:
            continue
        keep = next((item.i for item in node.attribute if item.name == "keepdims"), 1)
        axes = weights.get(node.input[1])
        if keep and axes is not None and {int(axis) % 4 for axis in numpy_helper.to_array(axes).reshape(-1)} == {2, 3}:
            node.op_type = "GlobalAveragePool"
            del node.attribute[:]
            del node.input[1:]
