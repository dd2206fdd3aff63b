"""Peak memory of an inference, computed from the ONNX file."""

from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from netwright.core.errors import ArtifactError

__all__ = ["peak_memory"]

_SMALL = 1024  # initializers up to this many bytes may be shapes, which shape inference reads
_VIEWS = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}  # outputs that share the memory of their input


def peak_memory(path: str | Path, batch: int = 1) -> int:
    r"""Bytes that one inference needs: the weights as stored, plus the activations alive at the worst moment.

    .. math:: \text{peak} = \sum_w |w| + \max_t \sum_{a \in \text{alive}(t)} |a|

    where ``t`` runs over the operations in the order of the file and an activation is alive from the operation that
    makes it to the last one that reads it; inputs and outputs of the model are counted. It is computed, so that two
    runs agree to the byte and no other process colours it. Reshapes share memory with their input. In a quantized
    file, a float tensor that is only ever quantized, and one that is only a dequantized view of integers, count
    nothing, for runtimes fuse them away. What depends on no input is computed when the file is loaded, and counts as a
    weight. What the runtime itself needs (its code, its copies of weights in other
    layouts, scratch space of its kernels) is left out; a tensor whose shape depends on the data counts with 1 for
    each unknown dimension.

    Args:
        path: an ONNX file.
        batch: items in the call: the value of the file's dynamic batch dimension.

    Raises:
        ArtifactError: a file that is missing or not ONNX.

    Cost: linear in the number of operations; weights are not copied.
    """
    proto = _load(path)
    graph = proto.graph
    weights = {item.name: _tensor_bytes(item.data_type, item.dims) for item in graph.initializer}
    sizes = _activation_sizes(proto, batch)
    return _fold(graph, weights, sizes) + _peak(graph, sizes)


def _fold(graph: Any, weights: dict[str, int], sizes: dict[str, int]) -> int:
    """Take the operations that depend on no input out of ``graph``; returns the bytes of all weights that are left."""
    known, rest = dict(weights), []
    for node in graph.node:
        inner = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
        if not inner and node.op_type != "DequantizeLinear" and all(name in known for name in node.input if name):
            known.update({name: sizes.get(name, 0) for name in node.output})
        else:
            rest.append(node)
    folded = len(rest) < len(graph.node)
    del graph.node[:]
    graph.node.extend(rest)
    read = {name for node in rest for name in _reads(node)} | {value.name for value in graph.output}
    return sum(size for name, size in known.items() if name in read or (name in weights and not folded))


def _peak(graph: Any, sizes: dict[str, int]) -> int:
    """The most bytes alive at once, over the schedule of the file."""
    owner = _owners(graph.node)
    last: dict[str, int] = {}
    for position, node in enumerate(graph.node):
        for name in _reads(node):
            last[owner.get(name, name)] = position
    for value in graph.output:
        last[owner.get(value.name, value.name)] = len(graph.node)
    alive = {value.name: sizes[value.name] for value in graph.input if value.name in sizes}
    peak = now = sum(alive.values())
    for position, node in enumerate(graph.node):
        for name in node.output:
            if owner.get(name, name) == name:
                alive[name] = sizes.get(name, 0)
                now += alive[name]
        peak = max(peak, now)
        for name in {owner.get(read, read) for read in (*_reads(node), *node.output)}:
            if name in alive and last.get(name, -1) <= position:
                now -= alive.pop(name)
    return peak


def _activation_sizes(proto: Any, batch: int) -> dict[str, int]:
    """Bytes by name of every tensor that is not a weight; large weights are taken out of ``proto``."""
    graph = proto.graph
    inputs = {value.name for value in graph.input}
    weights = {item.name: item for item in graph.initializer}
    del graph.initializer[:]
    for name, item in weights.items():
        if _tensor_bytes(item.data_type, item.dims) <= _SMALL:
            graph.initializer.append(item)
        elif name not in inputs:
            graph.input.append(onnx.helper.make_tensor_value_info(name, item.data_type, list(item.dims)))
    for value in graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = batch
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    fused = _fused(inferred)
    return {
        value.name: 0 if value.name in fused else _value_bytes(value)
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
        if value.name not in weights
    }


def _fused(graph: Any) -> set[str]:
    """Float tensors that a runtime never writes: all that is read from or made by integers alone."""
    quantized_only: dict[str, bool] = {}
    for node in graph.node:
        for name in _reads(node):
            quantized_only[name] = quantized_only.get(name, True) and node.op_type == "QuantizeLinear"
    outputs = {value.name for value in graph.output}
    views = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    inputs = {value.name for value in graph.input}
    return (views | {name for name, only in quantized_only.items() if only}) - outputs - inputs


def _owners(nodes: Iterable[Any]) -> dict[str, str]:
    owner: dict[str, str] = {}
    for node in nodes:
        if node.op_type in _VIEWS and node.input:
            owner[node.output[0]] = owner.get(node.input[0], node.input[0])
    return owner


def _reads(node: Any) -> list[str]:
    inner = (each for attribute in node.attribute for each in (attribute.g, *attribute.graphs))
    return [*node.input, *(name for graph in inner for each in graph.node for name in _reads(each))]


def _value_bytes(value: Any) -> int:
    tensor = value.type.tensor_type
    return _tensor_bytes(tensor.elem_type, [dim.dim_value or 1 for dim in tensor.shape.dim])


def _tensor_bytes(kind: int, dims: Iterable[int]) -> int:
    if kind == onnx.TensorProto.UNDEFINED:
        return 0
    if kind == onnx.TensorProto.STRING:
        return 0
    width = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).itemsize
    return width * prod(dims)


def _load(path: str | Path) -> Any:
    if not Path(path).is_file():
        raise ArtifactError(f"No ONNX file {path}.")
    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf's decoding error is not public
        raise ArtifactError(f"{path} is not a readable ONNX file: {type(error).__name__}.") from error
