"""Integer weights of fewer than 8 bits, stored in as few bits as they have.

A weight that a ``DequantizeLinear`` reads takes a byte an entry. Where its entries span fewer than 256 integers it is
stored, whichever is smallest, as

- ``INT4`` or ``UINT4``, two entries a byte, cast to 8 bits (operator set 21);
- ``b`` bit planes, ``b / 8`` bytes an entry, which standard operators put together again.

Neither changes a number, and neither depends on an input, so that a runtime does it once, when it loads the file, and
then runs the kernels of 8-bit weights. (A ``DequantizeLinear`` may read 4 bits itself, but integer kernels do not: ONNX
Runtime then dequantizes in every call and computes in float, many times slower.)
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["planes", "store_narrow"]

_SMALLEST = 256  # entries; smaller weights are not worth the operators
_DECODER = 640  # bytes that a bit-plane decoder's operators and constants take, about
_OPSET = 21  # the first whose Cast reads 4-bit integers
_CHANGED = {"GroupNormalization"}  # operators that mean something else from that set on


def store_narrow(proto: Any, most: int = 7) -> None:
    """Rewrite every narrow integer weight of ``proto``, in place; others are left as they are.

    Args:
        proto: an ONNX model of operator set 18 or later. Its set becomes 21 where a weight is stored in 4 bits.
        most: bits of the widest integers that are stored so.
    """
    graph = proto.graph
    default = next(entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    four = default.version >= _OPSET or not any(node.op_type in _CHANGED for node in graph.node)
    weights = {item.name: item for item in graph.initializer}
    kept, made = [], []
    for item in graph.initializer:
        readers = _readers(graph, item)
        bits = _bits(item) if readers else 8
        if bits > min(most, 7):
            kept.append(item)
            continue
        value = np.asarray(numpy_helper.to_array(item))
        halves = _halves(value, [weights[node.input[2]] for node in readers]) if four else None
        sizes: dict[str, float] = {
            "whole": value.size,
            "halves": value.size / 2 if halves is not None else np.inf,
            "planes": bits * value.size / 8 + _DECODER,
            "sparse": 2 * int(np.count_nonzero(value)) + _DECODER,  # by onnx_sparse, afterwards
        }
        best = min(sizes, key=lambda name: sizes[name])
        if best == "halves" and halves is not None:
            constants, nodes = _store_halves(item, *halves, readers)
            kept += constants
            made += nodes
            default.version = max(default.version, _OPSET)
        elif best == "planes":
            constants, nodes = _decoder(item.name, value, bits)
            kept += constants
            made += nodes
        else:
            kept.append(item)
    nodes = [*made, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)


def planes(value: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Bit ``k`` of every entry less the smallest, packed into bytes: ``(bits, ceil(n / 8))``, the lowest bit first.

    Example:
        >>> planes(np.array([-1, 0, 2], np.int8), 2)
        array([[6],
               [4]], dtype=uint8)
    """
    steps = value.ravel().astype(np.int16) - int(value.min())
    rows = [np.packbits((steps >> plane) & 1, bitorder="little") for plane in range(bits)]
    return np.stack(rows)


def _readers(graph: Any, item: Any) -> list[Any]:
    """The operations that dequantize a weight; none where anything else reads it, or one has no zero point."""
    if item.data_type not in (TensorProto.INT8, TensorProto.UINT8) or np.prod(item.dims) < _SMALLEST:
        return []
    if any(value.name == item.name for value in graph.output):
        return []
    stored = {each.name for each in graph.initializer}
    found = []
    for node in graph.node:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            return []  # a sub-graph may read it too
        if item.name in node.input:
            alone = list(node.input).index(item.name) == 0 and list(node.input).count(item.name) == 1
            if node.op_type != "DequantizeLinear" or not alone or len(node.input) < 3 or node.input[2] not in stored:
                return []
            found.append(node)
    return found


def _bits(item: Any) -> int:
    value = np.asarray(numpy_helper.to_array(item)).astype(np.int16)
    return max(1, int(value.max() - value.min()).bit_length())


def _halves(value: NDArray[Any], zeros: list[Any]) -> tuple[NDArray[Any], list[NDArray[Any]], int] | None:
    """Weight and zero points as 4-bit integers, and their type; None where they do not fit.

    Unsigned bytes are moved so that the smallest is zero, of which dequantization sees nothing.
    """
    points = [np.asarray(numpy_helper.to_array(zero)).astype(np.int16) for zero in zeros]
    wide = value.astype(np.int16)
    signed = value.dtype == np.int8
    if not signed:
        least = int(min(wide.min(), *(point.min() for point in points)))
        wide, points = wide - least, [point - least for point in points]
    low, high = (-8, 7) if signed else (0, 15)
    if any(each.min() < low or each.max() > high for each in (wide, *points)):
        return None
    return wide, points, TensorProto.INT4 if signed else TensorProto.UINT4


def _store_halves(
    item: Any, value: NDArray[Any], zeros: list[NDArray[Any]], kind: int, readers: list[Any]
) -> tuple[list[Any], list[Any]]:
    """Initializers of a weight and of its zero points, which its readers are told of, and the node that widens it."""
    made = [_tensor(f"{item.name}:half", value, kind)]
    wide = helper.tensor_dtype_to_np_dtype(item.data_type)
    for position, (node, zero) in enumerate(zip(readers, zeros, strict=True)):
        node.input[2] = f"{item.name}:zero{position}"
        made.append(numpy_helper.from_array(zero.astype(wide), node.input[2]))
    return made, [helper.make_node("Cast", [f"{item.name}:half"], [item.name], to=item.data_type)]


def _tensor(name: str, value: NDArray[Any], kind: int) -> Any:
    """A 4-bit tensor, two entries a byte, the first in the lower half."""
    flat = np.append(value.ravel(), 0) if value.size % 2 else value.ravel()
    pairs = (flat & 15).astype(np.uint8).reshape(-1, 2)
    packed = (pairs[:, 0] | (pairs[:, 1] << 4)).astype(np.uint8)
    return helper.make_tensor(name, kind, value.shape, packed.tobytes(), raw=True)


def _decoder(name: str, value: NDArray[Any], bits: int) -> tuple[list[Any], list[Any]]:
    """Initializers and nodes that make the tensor ``name`` out of bit planes."""
    constants = {
        "planes": planes(value, bits)[:, :, None],
        "bits": np.arange(8, dtype=np.uint8),
        "one": np.array(1, np.uint8),
        "powers": (2 ** np.arange(bits)).astype(np.int32).reshape(-1, 1, 1),
        "axis": np.array([0], np.int64),
        "all": np.array([-1], np.int64),
        "size": np.array([value.size], np.int64),
        "least": np.array(int(value.min()), np.int32),
        "shape": np.array(value.shape, np.int64),
    }
    steps = ("shifted", "single", "wide", "weighed", "summed", "flat", "cut", "moved", "narrow")
    at = {key: f"{name}:{key}" for key in (*constants, *steps)}
    kind = TensorProto.INT8 if value.dtype == np.int8 else TensorProto.UINT8
    make = helper.make_node
    nodes = [
        make("BitShift", [at["planes"], at["bits"]], [at["shifted"]], direction="RIGHT"),
        make("BitwiseAnd", [at["shifted"], at["one"]], [at["single"]]),
        make("Cast", [at["single"]], [at["wide"]], to=TensorProto.INT32),
        make("Mul", [at["wide"], at["powers"]], [at["weighed"]]),
        make("ReduceSum", [at["weighed"], at["axis"]], [at["summed"]], keepdims=0),
        make("Reshape", [at["summed"], at["all"]], [at["flat"]]),
        make("Slice", [at["flat"], at["axis"], at["size"]], [at["cut"]]),
        make("Add", [at["cut"], at["least"]], [at["moved"]]),
        make("Cast", [at["moved"]], [at["narrow"]], to=kind),
        make("Reshape", [at["narrow"], at["shape"]], [name]),
    ]
    return [numpy_helper.from_array(np.asarray(array), at[key]) for key, array in constants.items()], nodes
