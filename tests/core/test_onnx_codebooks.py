"""Tables that are looked up whatever the input become ordinary weights."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from netwright.core.onnx_codebooks import compute_lookups

RANDOM = np.random.default_rng(0)
TABLE, POSITIONS = RANDOM.standard_normal((8, 3)).astype(np.float32), np.arange(8)[None]


def embedding(first: str, axis: int) -> onnx.ModelProto:
    """``x + table[positions[index]]``, as an encoder's position embedding is exported; ``first`` takes positions."""
    index = np.array([[2, 0, 5, 1]])
    nodes = [
        helper.make_node(first, ["positions", "index"], ["taken"], axis=axis),
        helper.make_node("Reshape", ["taken", "shape"], ["flat"]),
        helper.make_node("Gather", ["table", "flat"], ["rows"], axis=0),
        helper.make_node("Add", ["x", "rows"], ["y"]),
    ]
    weights = {"positions": POSITIONS, "index": index, "shape": np.array([4]), "table": TABLE}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 3]) for name in "xy"]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "embedding", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("first", ["GatherElements", "Gather"])
def test_a_row_of_positions_is_looked_up(first) -> None:
    proto = embedding(first, axis=1)
    compute_lookups(proto)
    onnx.checker.check_model(proto, full_check=True)
    assert [node.op_type for node in proto.graph.node] == ["Add"]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    given = RANDOM.standard_normal((4, 3)).astype(np.float32)
    np.testing.assert_allclose(session.run(None, {"x": given})[0], given + TABLE[[2, 0, 5, 1]], rtol=1e-6)
    stored = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    np.testing.assert_array_equal(stored["rows"], TABLE[[2, 0, 5, 1]])
