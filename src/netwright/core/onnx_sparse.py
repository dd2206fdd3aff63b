"""Weights with many zeros, stored in an ONNX file as the others alone.

A tensor becomes its values that are not zero and, for each, its distance from the one before in one byte (Han et al.,
"Deep Compression", 2016, arXiv 1510.00149, there in 5 or 8 bits); a gap of more than 255 is bridged by zeros that are
stored. Standard operators put them back, which depend on no input, so that a runtime does so once, when it loads the
file: what runs is the dense model, exactly as fast as before.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["gaps", "store_sparse"]

_SMALLEST = 1024  # elements; smaller tensors are not worth the operators
_WORTH = 0.75  # of the dense bytes, at most
_WIDEST = 255


def store_sparse(proto: Any) -> None:
    """Rewrite every initializer of ``proto`` that becomes smaller so, in place; others are left as they are.

    So are scales and zero points of integers, which a runtime's integer kernels want as constants.

    Args:
        proto: an ONNX model of operator set 13 or later.
    """
    kept, made = [], []
    grids = {
        name
        for node in proto.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for name in node.input[1:]
    }
    for item in proto.graph.initializer:
        value = None if item.name in grids else _worth(item)
        if value is None:
            kept.append(item)
            continue
        initializers, nodes = _decoder(item.name, value)
        kept += initializers
        made += nodes
    if not made:
        return
    nodes = [*made, *proto.graph.node]
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.initializer.extend(kept)
    proto.graph.node.extend(nodes)


def gaps(flat: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Distances between entries to store, and their positions: all that are not zero, and zeros that bridge wide gaps.

    Args:
        flat: a vector.

    Example:
        >>> gaps(np.array([0, 7, 0, 9]))
        (array([2, 2], dtype=uint8), array([1, 3]))
    """
    found = np.flatnonzero(flat)
    distance = np.diff(found, prepend=-1)
    bridges = (distance - 1) // _WIDEST
    position = np.repeat(found - bridges * _WIDEST, bridges + 1)
    within = np.arange(len(position)) - np.repeat(np.cumsum(bridges + 1) - bridges - 1, bridges + 1)
    position = position + within * _WIDEST
    return np.diff(position, prepend=-1).astype(np.uint8), position


def _worth(item: Any) -> NDArray[Any] | None:
    """The tensor, where storing it so saves enough."""
    if np.prod(item.dims, dtype=np.int64) < _SMALLEST or item.data_type == TensorProto.STRING:
        return None
    if item.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8):
        return None
    value = np.asarray(numpy_helper.to_array(item))
    width = value.dtype.itemsize
    if np.count_nonzero(value) * (width + 1) > _WORTH * value.size * width:
        return None
    count = len(gaps(value.ravel())[0])
    return value if count * (width + 1) <= _WORTH * value.size * width else None


def _decoder(name: str, value: NDArray[Any]) -> tuple[list[Any], list[Any]]:
    """Initializers and nodes that make the tensor ``name``."""
    steps, position = gaps(value.ravel())
    constants = {
        "gaps": steps,
        "values": value.ravel()[position],
        "one": np.array(1, np.int64),
        "axis": np.array(0, np.int64),
        "size": np.array([value.size], np.int64),
        "shape": np.array(value.shape, np.int64),
    }
    at = {key: f"{name}:{key}" for key in (*constants, "wide", "ends", "places", "zeros", "flat")}
    zero = numpy_helper.from_array(np.zeros(1, value.dtype))
    nodes = [
        helper.make_node("Cast", [at["gaps"]], [at["wide"]], to=TensorProto.INT64),
        helper.make_node("CumSum", [at["wide"], at["axis"]], [at["ends"]]),
        helper.make_node("Sub", [at["ends"], at["one"]], [at["places"]]),
        helper.make_node("ConstantOfShape", [at["size"]], [at["zeros"]], value=zero),
        helper.make_node("ScatterElements", [at["zeros"], at["places"], at["values"]], [at["flat"]], axis=0),
        helper.make_node("Reshape", [at["flat"], at["shape"]], [name]),
    ]
    return [numpy_helper.from_array(array, at[key]) for key, array in constants.items()], nodes
