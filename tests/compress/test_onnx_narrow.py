"""Narrow weights in ONNX files: types, sizes, and the same numbers as 8-bit storage gives."""

import collections
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.utils.data import TensorDataset

from netwright.compress import Int8
from netwright.compress._quantizers import WeightQuantizer
from netwright.compress.ompq import OMPQ
from netwright.core.artifact import export_onnx
from netwright.core.data import Data
from netwright.core.onnx_narrow import planes, store_narrow
from netwright.core.onnx_weight_only import dequantize_at_load
from netwright.core.task import Task


def kernels(proto):
    """Operations that ONNX Runtime executes after its own optimization, counted."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = f"{folder}/optimized.onnx", 4
        onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return collections.Counter(node.op_type for node in onnx.load(f"{folder}/optimized.onnx").graph.node)


def run(proto, feed):
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return session.run(None, feed)[0]


def model_of(weight, zero, scale, convolution=False, opset=20):
    """A layer that reads a weight of 8-bit storage."""
    initializers = [numpy_helper.from_array(value, name) for name, value in (("w", weight), ("s", scale), ("z", zero))]
    shape = ["b", weight.shape[1], 8, 8] if convolution else ["b", weight.shape[1]]
    out = ["b", weight.shape[0], 6, 6] if convolution else ["b", weight.shape[0]]
    layer = helper.make_node("Conv", ["x", "d"], ["y"]) if convolution else None
    layer = layer or helper.make_node("Gemm", ["x", "d"], ["y"], transB=1)
    nodes = [helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0), layer]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, each) for name, each in (("x", shape), ("y", out))]
    graph = helper.make_graph(nodes, "g", made[:1], made[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8])
def test_the_numbers_stay_and_the_bytes_go(bits, unsigned, convolution):
    random = np.random.default_rng(bits)
    reach = 2 ** (bits - 1) - 1
    shape = (33, 31, 3, 3) if convolution else (99, 101)
    middle = 128 if unsigned else 0
    weight = (random.integers(-reach, reach + 1, shape) + middle).astype(np.uint8 if unsigned else np.int8)
    weight.flat[:2] = middle - reach, middle + reach
    zero = np.full(shape[0], middle, weight.dtype)
    before = model_of(weight, zero, random.uniform(0.1, 1, shape[0]).astype(np.float32), convolution)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    store_narrow(after)
    onnx.checker.check_model(after, full_check=True)
    x = random.normal(size=(2, shape[1], 8, 8) if convolution else (2, shape[1])).astype(np.float32)
    one, two = run(before, {"x": x}), run(after, {"x": x})
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
    kinds = {item.name: item.data_type for item in after.graph.initializer}
    if bits == 4:
        assert kinds["w:half"] == (TensorProto.UINT4 if unsigned else TensorProto.INT4)
        assert "w" not in kinds
        assert after.opset_import[0].version == 21
    elif bits < 8:
        assert "w" not in kinds
        assert after.opset_import[0].version == 20
    else:
        assert after == before
    assert after.ByteSize() <= weight.size * bits / 8 + 4 * 99 + 1200


def test_planes_put_together_are_the_weight():
    weight = np.random.default_rng(0).integers(-3, 4, (7, 5)).astype(np.int8)
    bits = np.unpackbits(planes(weight, 3), axis=1, bitorder="little")[:, : weight.size]
    found = (bits * np.array([1, 2, 4])[:, None]).sum(0) + weight.min()
    assert (found.reshape(7, 5) == weight).all()


def test_a_weight_that_something_else_reads_is_left():
    weight = np.ones((16, 16), np.int8)
    proto = model_of(weight, np.zeros(16, np.int8), np.ones(16, np.float32))
    proto.graph.node.append(helper.make_node("Cast", ["w"], ["other"], to=TensorProto.FLOAT))
    before = proto.SerializeToString()
    store_narrow(proto)
    assert proto.SerializeToString() == before


def test_four_bits_become_planes_where_the_operator_set_must_not_change():
    weight = np.random.default_rng(0).integers(-7, 8, (99, 101)).astype(np.int8)
    proto = model_of(weight, np.zeros(99, np.int8), np.ones(99, np.float32))
    proto.graph.node.append(helper.make_node("GroupNormalization", ["y", "s", "s"], ["n"], num_groups=99))
    store_narrow(proto)
    assert proto.opset_import[0].version == 20
    assert "w" not in {item.name for item in proto.graph.initializer}


def network():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(864, 10)
    )


def task():
    generator = torch.Generator().manual_seed(0)
    splits = [TensorDataset(torch.rand(64, 1, 8, 8, generator=generator), torch.arange(64) % 10) for _ in range(3)]
    return Task("images", network, Data(*splits), nn.functional.cross_entropy, lambda o, t: 0.0)


@pytest.mark.parametrize(
    ("transform", "bits", "kinds"),
    [
        (Int8(), 8, {TensorProto.INT8}),
        (OMPQ(8.0, bits=(8,)), 8, {TensorProto.INT8}),
        (OMPQ(4.0, bits=(4,)), 4, {TensorProto.INT4}),
        (OMPQ(6.0, bits=(4, 8)), 6, {TensorProto.INT4, TensorProto.INT8}),
        (OMPQ(3.0, bits=(2, 3, 4, 8)), 3, None),
    ],
)
def test_what_is_exported_is_as_small_as_it_says(transform, bits, kinds, tmp_path: Path):
    given = task()
    model = given.build(seed=0)
    small = transform(model, given)
    export_onnx(small, given.example(), tmp_path / "model.onnx")
    proto = onnx.load(tmp_path / "model.onnx")
    x = given.example(3)
    feed = {proto.graph.input[0].name: x.numpy()}
    wide = run(proto, feed)
    store_narrow(proto)
    onnx.checker.check_model(proto, full_check=True)
    found, wanted = run(proto, feed), small(x).detach().numpy()
    np.testing.assert_allclose(found, wide, atol=1e-5)
    np.testing.assert_allclose(found, wanted, atol=0.2 * np.abs(wanted).max())  # kernels may saturate
    weights = sum(value.numel() for value in model.parameters() if value.ndim > 1)
    assert proto.ByteSize() < weights * bits / 8 + 4500
    types = {item.data_type for item in proto.graph.initializer if np.prod(item.dims) >= 256}
    assert kinds is None or types == kinds
    wide = {item.name for item in proto.graph.initializer if item.data_type == TensorProto.FLOAT}
    assert not any(np.prod(item.dims) >= 256 for item in proto.graph.initializer if item.name in wide)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_of_float_layers_are_dequantized_when_the_file_is_loaded(bits, tmp_path: Path):
    given = task()
    export_onnx(OMPQ(float(bits), bits=(bits,))(given.build(seed=0), given), given.example(), tmp_path / "weights.onnx")
    found = kernels(onnx.load(tmp_path / "weights.onnx"))
    assert set(found) <= {
        "FusedConv",
        "Conv",
        "Gemm",
        "FusedGemm",
        "Reshape",
        "Flatten",
        "ReorderInput",
        "ReorderOutput",
    }


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_narrow_weights_run_on_the_kernels_of_eight_bits(bits, tmp_path: Path):
    given = task()
    rounded = Int8()(given.build(seed=0), given)
    with torch.no_grad():
        for part in rounded.modules():
            if isinstance(part, WeightQuantizer):
                part.scale *= 127 / (2 ** (bits - 1) - 1)
    export_onnx(rounded, given.example(), tmp_path / "narrow.onnx")
    found = kernels(onnx.load(tmp_path / "narrow.onnx"))
    assert found["QLinearConv"] == 2
    assert found["QGemm"] == 1
    assert "Cast" not in found


@pytest.mark.parametrize("middle", [0, 5])
@pytest.mark.parametrize("convolution", [False, True])
def test_dequantizing_at_load_changes_no_number(convolution, middle):
    random = np.random.default_rng(0)
    weight = random.integers(-100, 101, (33, 31, 3, 3) if convolution else (33, 31)).astype(np.int8)
    zero = np.full(33, middle, np.int8)
    before = model_of(weight, zero, random.uniform(0.1, 1, 33).astype(np.float32), convolution)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    dequantize_at_load(after)
    onnx.checker.check_model(after, full_check=True)
    assert "DequantizeLinear" not in {node.op_type for node in after.graph.node}
    x = random.normal(size=(2, 31, 8, 8) if convolution else (2, 31)).astype(np.float32)
    np.testing.assert_allclose(run(after, {"x": x}), run(before, {"x": x}), rtol=1e-5, atol=1e-3)
