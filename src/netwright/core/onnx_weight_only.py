"""Integer weights of layers that compute in float, made floats once, when a runtime loads the file.

A ``DequantizeLinear`` of a weight belongs to a kernel of integers where the layer's other input is dequantized too.
Elsewhere runtimes keep it and dequantize the weight in every call. There the same arithmetic, ``(q - z) s``, is written
as ordinary operators, which depend on no input: a runtime computes them once, and what runs is the float layer.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["dequantize_at_load"]

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


def dequantize_at_load(proto: Any) -> None:
    """Rewrite every ``DequantizeLinear`` of a weight that no integer kernel takes, in place.

    Args:
        proto: an ONNX model. What is stored keeps its type and size, and no number changes.
    """
    graph = proto.graph
    stored = {item.name: item for item in graph.initializer}
    ranks = {name: len(item.dims) for name, item in stored.items()}
    readers: dict[str, list[Any]] = {}
    integers: set[str] = set()  # dequantized activations
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
        if node.input and all(name in ranks for name in node.input if name):
            ranks[node.output[0]] = _rank(node, ranks, stored)
        elif node.op_type == "DequantizeLinear":
            integers.add(node.output[0])
    made: list[Any] = []
    for node in graph.node:
        alone = not any(integers.intersection(reader.input) for reader in readers.get(node.output[0], ()))
        if node.op_type == "DequantizeLinear" and node.output[0] in ranks and alone and _is_plain(node, stored):
            constants, nodes = _arithmetic(node, ranks[node.output[0]], stored)
            graph.initializer.extend(constants)
            made += nodes
        else:
            made.append(node)
    del graph.node[:]
    graph.node.extend(made)


def _rank(node: Any, ranks: dict[str, int], stored: dict[str, Any]) -> int:
    """Dimensions of what a node makes out of constants; those of its first input but for a reshape."""
    if node.op_type == "Reshape" and node.input[1] in stored:
        return int(np.prod(stored[node.input[1]].dims))
    return ranks[node.input[0]]


def _is_plain(node: Any, stored: dict[str, Any]) -> bool:
    """Whether scale and zero point are stored, one for all or one for each index of an axis, the scale as a float."""
    if node.input[1] not in stored or stored[node.input[1]].data_type not in _FLOATS:
        return False
    blocked = any(attribute.name == "block_size" and attribute.i for attribute in node.attribute)
    return not blocked and all(name in stored and len(stored[name].dims) <= 1 for name in node.input[1:] if name)


def _arithmetic(node: Any, rank: int, stored: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Initializers and nodes of ``(q - z) s``."""
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
    shape = [-1 if place == axis % max(rank, 1) else 1 for place in range(rank)]

    def along(name: str) -> NDArray[Any]:
        value = np.asarray(numpy_helper.to_array(stored[name]))
        return value.reshape(shape) if value.ndim else value

    name, scale = node.output[0], along(node.input[1])
    at = {key: f"{name}:{key}" for key in ("wide", "zero", "moved", "scale")}
    constants = [numpy_helper.from_array(np.ascontiguousarray(scale), at["scale"])]
    kind = stored[node.input[1]].data_type
    nodes, last = [helper.make_node("Cast", [node.input[0]], [at["wide"]], to=kind)], at["wide"]
    zero = along(node.input[2]).astype(np.int32) if len(node.input) > 2 and node.input[2] else np.zeros(1, np.int32)
    if zero.any():
        constants.append(numpy_helper.from_array(np.ascontiguousarray(zero.astype(scale.dtype)), at["zero"]))
        nodes.append(helper.make_node("Sub", [last, at["zero"]], [at["moved"]]))
        last = at["moved"]
    return constants, [*nodes, helper.make_node("Mul", [last, at["scale"]], [name])]
