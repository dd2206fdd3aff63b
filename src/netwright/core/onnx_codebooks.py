"""Weights that take few values, stored in an ONNX file as codebooks and packed indices into them.

The rows of a tensor fall into groups such that no value is shared between groups. Where each group takes few values
(two bits for four), the file holds these, a byte for each row that names its group, and indices in bit planes. Standard
operators put the tensor together again, which depend on no input, so that a runtime does so once, when it loads the
file: what runs is the dense model, exactly as fast as before, and with the same numbers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from netwright.core.errors import ArtifactError
from netwright.core.fake_quantize import DOMAIN

__all__ = ["Codebooks", "compute_integers", "compute_lookups", "find_codebooks", "store_codebooks"]

_SMALLEST = 512  # elements; smaller tensors are not worth the operators
_WORTH = 0.75  # of the dense bytes, at most
_DECODER = 720  # bytes that the operators and constants of one tensor take, about
_MOST_BITS = 8
_SAMPLE = 4096  # elements by which tensors of many values are told
_FLOATS = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.DOUBLE: 8}
_LOOKUPS = {"Gather", "GatherND", "GatherElements"}
_KEPT = {"DequantizeLinear", "QuantizeLinear"}  # what integers are stored for


@dataclass(frozen=True)
class Codebooks:
    """A matrix as ``table[group[row], index[row, column]]``.

    Args:
        table: ``(groups, words)``; codebooks with fewer values are filled up with zeros.
        group: ``(rows,)``.
        index: ``(rows, columns)``.
    """

    table: NDArray[Any]
    group: NDArray[np.int64]
    index: NDArray[np.int64]

    @property
    def bits(self) -> int:
        """Of one index."""
        return max(1, int(self.table.shape[1] - 1).bit_length())

    @property
    def stored_bytes(self) -> int:
        """What the tensor takes in a file, without operators."""
        rows = len(self.group) * (1 if len(self.table) <= 256 else 4) if len(self.table) > 1 else 0
        return self.bits * -(-self.index.size // 8) + rows + self.table.nbytes


def find_codebooks(matrix: NDArray[Any]) -> Codebooks | None:
    """The codebooks of a matrix; None where a group of its rows takes more than 256 values.

    Args:
        matrix: ``(rows, columns)``.

    Example:
        >>> found = find_codebooks(np.array([[1.0, 2.0], [2.0, 2.0], [5.0, 5.0]]))
        >>> found.table.tolist(), found.group.tolist(), found.index.tolist()
        ([[1.0, 2.0], [5.0, 0.0]], [0, 0, 1], [[0, 1], [1, 1], [0, 0]])

    Cost: a sort of all entries, and of a few thousand where they take many values.
    """
    if not matrix.size or not np.isfinite(matrix).all():
        return None
    sample = matrix.ravel()[:_SAMPLE]
    if len(np.unique(sample)) > max(2**_MOST_BITS, len(sample) // 2):
        return None
    values, flat = np.unique(matrix, return_inverse=True)
    inverse = flat.reshape(matrix.shape)
    rows, count = len(matrix), len(values)
    row = np.repeat(np.arange(rows), matrix.shape[1])
    edges = coo_array((np.ones(matrix.size, np.int8), (row, rows + inverse.ravel())), shape=(rows + count,) * 2)
    groups, label = connected_components(edges, directed=False)
    group, of_value = label[:rows].astype(np.int64), label[rows:].astype(np.int64)
    sizes = np.bincount(of_value, minlength=groups)
    if sizes.max() > 2**_MOST_BITS:
        return None
    order = np.argsort(of_value, kind="stable")  # values ascend within each group
    within = np.empty(count, np.int64)
    within[order] = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    table = np.zeros((groups, int(sizes.max())), matrix.dtype)
    table[of_value, within] = values
    return Codebooks(table, group, within[inverse])


def compute_lookups(proto: Any) -> None:
    """Replace weights that are looked up in a table, whatever the input, by their values, in place.

    What a module writes as codebooks and indices becomes an ordinary initializer, of which integers or sparse forms can
    be made, and which :func:`store_codebooks` makes small again.

    Args:
        proto: an ONNX model.
    """
    constant, _ = _divided(proto.graph)
    looked_up: set[str] = set()
    for node in constant:
        if node.op_type in _LOOKUPS or looked_up.intersection(node.input):
            looked_up.update(node.output)
    _compute(proto, looked_up)


def compute_integers(proto: Any) -> None:
    """Replace integers that are put together before a ``DequantizeLinear`` reads them by their values, in place.

    So narrow and sparse integers are whole initializers again.

    Args:
        proto: an ONNX model.
    """
    _compute(proto, {node.input[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"})


def _divided(graph: Any) -> tuple[list[Any], list[Any]]:
    """Nodes that depend on no input, and the others; those that integers are stored for are others."""
    known = {item.name for item in graph.initializer}
    constant, rest = [], []
    for node in graph.node:
        inner = any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
        fixed = node.input and not inner and node.op_type not in _KEPT and node.domain != DOMAIN
        if fixed and all(name in known for name in node.input if name):
            constant.append(node)
            known.update(node.output)
        else:
            rest.append(node)
    return constant, rest


def _compute(proto: Any, those: set[str]) -> None:
    """Replace those tensors that depend on no input, and that anything else reads, by their values, in place."""
    graph = proto.graph
    constant, rest = _divided(graph)
    made = {name for node in constant for name in node.output}
    read = {name for node in rest for name in _reads(node)} | {value.name for value in graph.output}
    wanted = sorted(those & made & read)
    if not wanted:
        return
    for name, value in zip(wanted, _evaluated(proto, constant, wanted), strict=True):
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    needed = read.difference(wanted)
    for node in reversed(constant):
        if needed.intersection(node.output):
            needed.update(node.input)
    kept = [node for node in graph.node if needed.intersection(node.output) or not made.issuperset(node.output)]
    del graph.node[:]
    graph.node.extend(kept)


def store_codebooks(proto: Any) -> None:
    """Rewrite every initializer of ``proto`` that becomes smaller so, in place; others are left as they are.

    Args:
        proto: an ONNX model of operator set 18 or later.
    """
    kept, made, shared = [], [], {}
    for item in proto.graph.initializer:
        found = _worth(item)
        if found is None:
            kept.append(item)
            continue
        codebooks, turned = found
        constants, nodes = _decoder(item, codebooks, turned)
        own = f"{item.name}:"
        kept += [constant for constant in constants if constant.name.startswith(own)]
        shared.update({constant.name: constant for constant in constants if not constant.name.startswith(own)})
        made += nodes
    if not made:
        return
    nodes = [*made, *proto.graph.node]
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.initializer.extend([*kept, *shared.values()])
    proto.graph.node.extend(nodes)


def _evaluated(proto: Any, nodes: list[Any], wanted: list[str]) -> list[NDArray[Any]]:
    read = {name for node in nodes for name in node.input}
    weights = [item for item in proto.graph.initializer if item.name in read]
    outputs = [onnx.ValueInfoProto(name=name) for name in wanted]
    graph = helper.make_graph(nodes, "lookups", [], outputs, weights)
    model = helper.make_model(graph, opset_imports=list(proto.opset_import), ir_version=proto.ir_version)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return [np.asarray(value) for value in session.run(None, {})]
    except Exception as error:  # the runtime's own exceptions have no common base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArtifactError(
            f"Weights that are looked up in a table cannot be computed: {reason[:300]} Convert the model to float32 or "
            "float16 first: model.float()."
        ) from error


def _reads(node: Any) -> list[str]:
    inner = (each for attribute in node.attribute for each in (attribute.g, *attribute.graphs))
    return [*node.input, *(name for graph in inner for each in graph.node for name in _reads(each))]


def _worth(item: Any) -> tuple[Codebooks, bool] | None:
    """The tensor's codebooks, and whether they are those of its columns, where storing it so saves enough."""
    width = _FLOATS.get(item.data_type)
    if width is None or len(item.dims) < 2 or np.prod(item.dims, dtype=np.int64) < _SMALLEST:
        return None
    value = np.asarray(numpy_helper.to_array(item))
    ways = [(value.reshape(len(value), -1), False)]
    if value.ndim == 2:
        ways.append((np.ascontiguousarray(value.T), True))
    found = [(codebooks, turned) for matrix, turned in ways if (codebooks := find_codebooks(matrix)) is not None]
    if not found:
        return None
    best = min(found, key=lambda entry: entry[0].stored_bytes)
    size = best[0].stored_bytes + _DECODER
    sparse = np.count_nonzero(value) * (width + 1)
    return best if size <= _WORTH * value.nbytes and size < sparse else None


def _decoder(item: Any, found: Codebooks, turned: bool) -> tuple[list[Any], list[Any]]:
    """Initializers and nodes that make the tensor."""
    rows, columns = found.index.shape
    bits, groups = found.bits, len(found.table)
    planes = [np.packbits((found.index.ravel() >> plane) & 1, bitorder="little") for plane in range(bits)]
    own = {
        "planes": np.stack(planes)[:, :, None],
        "count": np.array([rows * columns], np.int64),
        "matrix": np.array([rows, columns], np.int64),
        "table": found.table.ravel(),
    }
    if groups > 1:
        own["group"] = found.group.astype(np.uint8 if groups <= 256 else np.int32)[:, None]
    if not turned and len(item.dims) != 2:
        own["shape"] = np.array(item.dims, np.int64)
    shared = {
        "places": np.arange(8, dtype=np.uint8),
        "one": np.array(1, np.uint8),
        "axis": np.array([0], np.int64),
        "all": np.array([-1], np.int64),
        f"powers{bits}": (2 ** np.arange(bits)).astype(np.int32).reshape(-1, 1, 1),
        f"words{found.table.shape[1]}": np.array(found.table.shape[1], np.int32),
    }
    at = {key: f"{item.name}:{key}" for key in own} | {key: f"codebooks:{key}" for key in shared}

    def step(name: str) -> str:
        return f"{item.name}:{name}:made"

    make = helper.make_node
    nodes = [
        make("BitShift", [at["planes"], at["places"]], [step("shifted")], direction="RIGHT"),
        make("BitwiseAnd", [step("shifted"), at["one"]], [step("single")]),
        make("Cast", [step("single")], [step("wide")], to=TensorProto.INT32),
        make("Mul", [step("wide"), at[f"powers{bits}"]], [step("weighed")]),
        make("ReduceSum", [step("weighed"), at["axis"]], [step("summed")], keepdims=0),
        make("Reshape", [step("summed"), at["all"]], [step("flat")]),
        make("Slice", [step("flat"), at["axis"], at["count"]], [step("cut")]),
        make("Reshape", [step("cut"), at["matrix"]], [step("index")]),
    ]
    last = step("index")
    if groups > 1:
        nodes += [
            make("Cast", [at["group"]], [step("group")], to=TensorProto.INT32),
            make("Mul", [step("group"), at[f"words{found.table.shape[1]}"]], [step("start")]),
            make("Add", [last, step("start")], [step("place")]),
        ]
        last = step("place")
    nodes.append(make("Gather", [at["table"], last], [step("value")]))
    if turned:
        nodes.append(make("Transpose", [step("value")], [item.name], perm=[1, 0]))
    elif "shape" in own:
        nodes.append(make("Reshape", [step("value"), at["shape"]], [item.name]))
    else:
        nodes[-1].output[0] = item.name
    if groups == 1:
        del shared[f"words{found.table.shape[1]}"]
    return [numpy_helper.from_array(np.asarray(array), at[key]) for key, array in (own | shared).items()], nodes
