"""Int8 against naive arithmetic in float64, against ONNX Runtime, and against the kernels that it must reach."""

import collections
import copy
import io
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.compress._fold import fold_batch_norms
from netwright.compress.int8_types import _choose, _retype, fastest_int8
from netwright.compress.quantize import Int8, trace
from netwright.core.artifact import OnnxModule, export_onnx, load_weights, save_program, save_weights
from netwright.core.data import Data, call
from netwright.core.errors import TransformError
from netwright.core.onnx_memory import peak_memory
from netwright.core.task import Task
from netwright.core.timing import Ratio


class Block(nn.Module):
    def __init__(self, before, after, stride=1):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.skip = nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride)

    def forward(self, x):
        inner = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(inner)) + self.skip(x))


def residual_net(width=16):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        Block(width, width),
        Block(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


def accuracy(outputs, targets):
    return float((outputs.argmax(1) == targets).float().mean())


def make_task(model, inputs, name="made"):
    """A task of the given inputs, every target zero."""

    class Items:
        def __len__(self):
            return len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)

        def __getitem__(self, index):
            item = {key: value[index] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[index]
            return item, 0

    return Task(name, model, Data(Items(), Items(), Items()), loss=functional.cross_entropy, score=accuracy)


def train(model, images, labels, steps, rate=2e-3):
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        index = torch.randint(0, len(images), (64,), generator=generator)
        loss = functional.cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def digits():
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels))
    images = torch.tensor(pixels, dtype=torch.float32)[order].reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)[order]
    splits = [TensorDataset(images[a:b], labels[a:b]) for a, b in ((0, 1100), (1100, 1400), (1400, 1797))]
    model = train(residual_net(), images[:1100], labels[:1100], 60)
    return Task("digits", model, Data(*splits), loss=functional.cross_entropy, score=accuracy)


@pytest.fixture(scope="module")
def quantized(digits, tmp_path_factory):
    """The quantized model, and its ONNX file."""
    model = Int8()(digits.model, digits)
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    export_onnx(model, digits.example(), path)
    return model, path


def outputs(model, inputs):
    with torch.no_grad():
        return call(model.eval(), inputs)


def kernels(path, tmp_path):
    """Operations that ONNX Runtime executes after its own optimization, counted."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 4
    onnxruntime.InferenceSession(str(path), options)
    return collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


# The graph


def test_folding_keeps_the_function(digits):
    module = trace(digits.model, digits)
    inputs = digits.example(16)
    expected = outputs(module, inputs)
    assert fold_batch_norms(module) == 5
    module.recompile()
    torch.testing.assert_close(outputs(module, inputs), expected, atol=1e-4, rtol=1e-4)
    assert not any("norm" in str(node.target) for node in module.graph.nodes if node.op == "call_function")


def test_folding_a_convolution_used_twice_with_two_norms():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.one, self.two = nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.two.running_var.fill_(9.0)
            self.two.running_mean.fill_(1.0)

        def forward(self, x):
            return self.one(self.conv(x)) - self.two(self.conv(x)) * 3

    model, inputs = Shared().eval(), torch.randn(4, 2, 5)
    module = trace(model, make_task(model, inputs))
    assert fold_batch_norms(module) == 2
    module.recompile()
    torch.testing.assert_close(outputs(module, inputs), outputs(model, inputs))


def test_model_is_untouched_and_result_is_reproducible(digits):
    model = digits.model
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    seen = []
    one = Int8(calibration_items=64)(model, digits, seed=3, progress=lambda share, what: seen.append(share))
    two = Int8(calibration_items=64)(model, digits, seed=3)
    other = Int8(calibration_items=64)(model, digits, seed=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    assert any(not torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert not {id(value) for value in one.parameters()} & {id(value) for value in model.parameters()}


def test_parameter_names_stay(quantized):
    names = [name for name, _ in quantized[0].named_parameters()]
    assert {"0.weight", "0.bias", "3.conv1.weight", "4.skip.weight", "4.skip.bias", "7.weight"} <= set(names)
    assert not any("norm" in name for name in names)
    assert "3.conv1.weight_quantizer.scale" in quantized[0].state_dict()


def test_minmax_range_is_what_the_input_spans(digits, quantized):
    images = digits.data.train.tensors[0]
    quantizer = dict(quantized[0].named_modules())["input_1_quantizer"]
    assert float(quantizer.scale) == pytest.approx(float(images.max()) / 255, rel=1e-4)
    assert int(quantizer.zero_point) == 0


# Integer inference


@pytest.mark.vnni
def test_runtime_agrees_with_the_simulation(digits, quantized):
    model, path = quantized
    images, labels = digits.data.test.tensors
    full, simulated, real = outputs(digits.model, images), outputs(model, images), OnnxModule(path)(images)
    assert accuracy(full, labels) > 0.9
    assert accuracy(real, simulated.argmax(1)) > 0.99
    assert accuracy(simulated, full.argmax(1)) > 0.98
    step = float((full.max() - full.min()) / 255)
    assert float((real - simulated).abs().mean()) < step
    assert float((real - simulated).norm() / simulated.norm()) < 0.01


def test_runtime_uses_integer_kernels_only(quantized, tmp_path):
    found = kernels(quantized[1], tmp_path)
    assert found["QLinearConv"] == 6
    assert found["QLinearAdd"] == 2
    assert found["QLinearGlobalAveragePool"] == 1
    assert found["QGemm"] == 1
    assert not found.keys() & {"Conv", "Gemm", "Add", "Relu", "GlobalAveragePool", "ReduceMean", "DequantizeLinear"}


def test_file_holds_integers_and_is_small(digits, quantized, tmp_path):
    path = quantized[1]
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain for entry in proto.opset_import} == {""}
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in proto.graph.initializer}
    assert sum(value.dtype == np.int8 and value.ndim > 1 for value in arrays.values()) == 7
    assert sum(value.dtype == np.int32 for value in arrays.values()) >= 7
    assert max(value.size for value in arrays.values() if value.dtype == np.float32) <= 32
    wide = residual_net(64)
    sizes = []
    for model in (wide, Int8()(wide, digits)):
        export_onnx(model, digits.example(), tmp_path / "model.onnx")
        sizes.append((tmp_path / "model.onnx").stat().st_size)
    assert sizes[1] < 0.3 * sizes[0]
    assert peak_memory(tmp_path / "model.onnx") < 0.35 * 4 * sum(value.numel() for value in wide.parameters())


def test_weights_in_the_file_are_those_of_the_simulation(quantized):
    model, path = quantized
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}
    stored = [value for value in arrays.values() if value.dtype == np.int8 and value.shape == (16, 1, 3, 3)]
    quantizer = model.get_submodule("0.weight_quantizer")
    rounded = quantizer(model.get_parameter("0.weight")).detach().numpy()
    expected = np.round(rounded / quantizer.scale.numpy()[:, None, None, None])
    assert any(np.array_equal(value, expected) for value in stored)


@pytest.mark.vnni
@pytest.mark.parametrize(
    "step",
    [
        Int8(activation="int8"),
        Int8(weight="uint8"),
        Int8(reduce_range=True),
        Int8(per_channel=False),
        Int8(calibration="mse"),
        Int8(calibration="percentile", calibration_items=100),
    ],
    ids=str,
)
def test_every_setting_exports_what_it_simulates(digits, tmp_path, step):
    model = step(digits.model, digits)
    export_onnx(model, digits.example(), tmp_path / "model.onnx")
    images = digits.data.test.tensors[0][:128]
    simulated, real = outputs(model, images), OnnxModule(tmp_path / "model.onnx")(images)
    assert float((real - simulated).norm() / simulated.norm()) < 0.01
    full = outputs(digits.model, images)
    assert 1e-4 < float((full - simulated).norm() / full.norm()) < 0.1


@pytest.mark.parametrize("settings", [{}, {"weight": "uint8"}, {"reduce_range": True}], ids=str)
def test_weights_of_four_bits_take_half_and_compute_the_same(digits, tmp_path, settings):
    sizes = {}
    for bits in (8, 4):
        model = Int8(weight_bits=bits, **settings)(digits.model, digits)
        path = tmp_path / f"{bits}.onnx"
        export_onnx(model, digits.example(), path)
        sizes[bits] = path.stat().st_size
    images = digits.data.test.tensors[0][:128]
    simulated, real = outputs(model, images), OnnxModule(path)(images)
    assert float((real - simulated).norm() / simulated.norm()) < 0.02  # activations rounded in other places
    four = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    held = [item for item in onnx.load(path).graph.initializer if item.data_type in four and np.prod(item.dims) > 256]
    weights = sum(int(np.prod(item.dims)) for item in held)
    assert weights > 0.8 * sum(value.numel() for value in digits.model.parameters() if value.ndim > 1)
    assert sizes[8] - sizes[4] > 0.9 * weights / 2
    quantizer = model.get_submodule("0.weight_quantizer")
    steps = (quantizer(model.get_parameter("0.weight")) / quantizer.scale[:, None, None, None]).detach().round()
    assert set(steps.flatten().tolist()) <= set(range(-7, 8))
    assert float(steps.abs().max()) == 7


@pytest.mark.parametrize("bits", [1, 9, 4.0, True])
def test_refuses_widths_of_weights(bits):
    with pytest.raises(TransformError, match=r"Int8\.weight_bits must be"):
        Int8(weight_bits=bits)


@pytest.mark.vnni
def test_quantized_model_trains_copies_saves(digits, quantized, tmp_path):
    images, labels = digits.data.train.tensors
    model = copy.deepcopy(quantized[0])
    start = float(functional.cross_entropy(outputs(model, images), labels))
    before = copy.deepcopy(model.state_dict())
    train(model, images, labels, 40, rate=5e-4)
    assert float(functional.cross_entropy(outputs(model, images), labels)) < 0.8 * start
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name, _ in model.named_parameters()} <= moved
    assert "0.weight_quantizer.scale" in moved
    export_onnx(model, digits.example(), tmp_path / "model.onnx")
    expected = outputs(model, images[:64])
    real = OnnxModule(tmp_path / "model.onnx")(images[:64])
    assert float((real - expected).norm() / expected.norm()) < 0.01
    save_program(model, digits.example(), tmp_path / "model.pt2")
    program = torch.export.load(io.BytesIO((tmp_path / "model.pt2").read_bytes()))
    torch.testing.assert_close(outputs_of_program(program, images[:64]), expected)
    assert all("aten" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    save_weights(model, tmp_path / "model.safetensors")
    other = Int8()(digits.model, digits)
    load_weights(other, tmp_path / "model.safetensors")
    torch.testing.assert_close(outputs(other, images[:64]), expected)


def outputs_of_program(program, inputs):
    with torch.no_grad():
        return program.module()(inputs)


class Mobile(nn.Module):
    """Depthwise, padding, ReLU6, SiLU in place, squeeze and excitation, concatenation, pools."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(16 * 2 * 2, 5)

    def forward(self, x):
        x = self.norm(self.stem(functional.pad(x, (0, 1, 0, 1))))
        x = functional.relu6(self.depth(functional.silu(x, inplace=True)))
        gate = functional.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = x * torch.sigmoid(self.excite(gate))
        x = torch.cat([functional.max_pool2d(x, 2), functional.avg_pool2d(x, 2)], 1)
        return self.head(x[:, :, :2, :2].flatten(1))


@pytest.mark.vnni
def test_mobile_pieces_become_integer_kernels(tmp_path):
    torch.manual_seed(0)
    model, inputs = Mobile().eval(), torch.randn(8, 3, 16, 16)
    small = Int8()(model, make_task(model, inputs))
    export_onnx(small, inputs, tmp_path / "model.onnx")
    simulated, real = outputs(small, inputs), OnnxModule(tmp_path / "model.onnx")(inputs)
    assert float((real - simulated).norm() / simulated.norm()) < 0.03
    assert float((outputs(model, inputs) - simulated).norm() / simulated.norm()) < 0.1
    found = kernels(tmp_path / "model.onnx", tmp_path)
    assert found["QLinearConv"] == 4
    assert found["QLinearConcat"] == found["QLinearAveragePool"] == found["QLinearGlobalAveragePool"] == 1
    assert found["QLinearMul"] == found["QLinearSigmoid"] == 2
    assert not found.keys() & {"Pad", "Conv", "Clip", "Relu", "Sigmoid", "Mul", "DequantizeLinear"}


class Encoder(nn.Module):
    """One block of a transformer, its output layer tied to the table."""

    def __init__(self):
        super().__init__()
        self.table, self.norm1, self.norm2 = nn.Embedding(20, 16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.logits = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 20, bias=False)
        self.logits.weight = self.table.weight

    def forward(self, tokens):
        x = self.table(tokens)
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(*heads.unbind(0)).transpose(1, 2).flatten(2))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return {"logits": self.logits(x), "hidden": x}


@pytest.mark.vnni
def test_transformer_multiplies_integers_and_keeps_the_tied_table(tmp_path):
    torch.manual_seed(0)
    model, tokens = Encoder().eval(), torch.randint(0, 20, (8, 6))
    small = Int8()(model, make_task(model, {"tokens": tokens}))
    inputs = {"tokens": tokens}
    export_onnx(small, inputs, tmp_path / "model.onnx")
    full, simulated, real = (
        outputs(model, inputs),
        outputs(small, inputs),
        OnnxModule(tmp_path / "model.onnx")(**inputs),
    )
    assert list(simulated) == list(real) == ["logits", "hidden"]
    for key in full:
        torch.testing.assert_close(real[key], simulated[key], atol=2e-2, rtol=0)
        assert 1e-4 < float((simulated[key] - full[key]).norm() / full[key].norm()) < 0.05
    found = kernels(tmp_path / "model.onnx", tmp_path)
    assert found["MatMulIntegerToFloat"] == 4
    weights = {name for name, _ in small.named_modules() if name.endswith("weight_quantizer")}
    assert weights == {f"{name}.weight_quantizer" for name in ("qkv", "out", "up", "down")}


def test_channel_of_tiny_weights_and_a_bias_fits_32_bits(tmp_path):
    model, inputs = nn.Conv2d(2, 3, 1), torch.rand(8, 2, 4, 4)
    with torch.no_grad():
        model.weight[1] = 1e-11
        model.bias.copy_(torch.tensor([0.5, -3.0, 2.0]))
    small = Int8()(model, make_task(model, inputs))
    export_onnx(small, inputs, tmp_path / "model.onnx")
    real = OnnxModule(tmp_path / "model.onnx")(inputs)
    torch.testing.assert_close(real, outputs(model, inputs), atol=0.05, rtol=0)
    assert real[:, 1].mean() == pytest.approx(-3.0, abs=0.05)


# Choice of types


@pytest.fixture(scope="module")
def measured(digits):
    return fastest_int8(digits.model, digits, seconds=0.05)


def test_types_are_chosen_by_measurement(measured):
    found = measured
    rows = {(row.activation, row.weight, row.reduce_range): row for row in found.table}
    assert {("uint8", "int8", False), ("int8", "int8", False), ("uint8", "uint8", False)} <= set(rows)
    assert all(row.ratio.median > 0 for row in found.table)
    best = rows[found.settings.activation, found.settings.weight, found.settings.reduce_range]
    assert best.right
    assert best.ratio.median == min(row.ratio.median for row in found.table if row.right)
    assert all(row.right for row in found.table if row.activation == "int8")
    assert found.to_dict()["settings"]["activation"] == found.settings.activation


@pytest.mark.vnni
def test_other_types_stand_for_the_same_numbers(digits, quantized, tmp_path):
    images = digits.data.test.tensors[0][:32]
    expected = OnnxModule(quantized[1])(images)
    for activation, weight in (("int8", "int8"), ("uint8", "uint8")):
        _retype(quantized[1], tmp_path / "other.onnx", activation, weight)
        found = OnnxModule(tmp_path / "other.onnx")(images)
        assert float((found - expected).norm() / expected.norm()) < 0.01
        step = Int8(activation=activation, weight=weight)
        export_onnx(step(digits.model, digits), digits.example(), tmp_path / "direct.onnx")
        direct = OnnxModule(tmp_path / "direct.onnx")(images)
        assert float((found - direct).norm() / expected.norm()) < 0.01


def test_wrong_numbers_are_never_chosen(measured):
    quick = Ratio(0.1, 0.1, 0.1, False, 1.0, 10)
    wrong = [
        replace(row, right=row.activation == "int8", ratio=row.ratio if row.activation == "int8" else quick)
        for row in measured.table
    ]
    assert _choose(Int8(), wrong).activation == "int8"
    with pytest.raises(TransformError, match="no pair of integer types"):
        _choose(Int8(), [replace(row, right=False) for row in wrong])


# Layers that stay in float


def test_all_but_the_last_layer_skipped_is_one_rounded_product(digits):
    """Against numpy: the float network's features and the last weight on grids of their own."""
    before, last = digits.model[:-1], digits.model[-1]
    images = digits.data.train.tensors[0]
    result = Int8(skip=tuple("0134"), calibration_items=len(images) // 32 * 32 + 32)(digits.model, digits)
    with torch.no_grad():
        seen = before(images).double().numpy()
    step = seen.max() / 255  # after ReLU and a mean nothing is below zero
    rounded = np.clip(np.rint(before(images[:50]).detach().double().numpy() / step), 0, 255) * step
    scale = np.abs(last.weight.detach().numpy()).max(1, keepdims=True).astype(np.float64) / 127
    weight = np.rint(last.weight.detach().numpy() / scale) * scale
    expected = rounded @ weight.T + last.bias.detach().numpy()
    exact = last(before(images[:50])).detach().numpy()
    assert np.abs(outputs(result, images[:50]).numpy() - expected).max() < 0.1 * np.abs(exact - expected).max()


def test_skipped_layers_are_stored_and_run_in_float(digits, tmp_path):
    path = tmp_path / "mixed.onnx"
    mixed = Int8(skip=("0", "3.conv2", "7"))(digits.model, digits)
    export_onnx(mixed, digits.example(), path)
    stored = collections.Counter(
        item.data_type for item in onnx.load(path).graph.initializer if len(item.dims) > 1 and np.prod(item.dims) > 16
    )
    assert stored == {onnx.TensorProto.FLOAT: 3, onnx.TensorProto.INT8: 4}
    found = kernels(path, tmp_path)
    assert found["QLinearConv"] == 4
    assert found["FusedConv"] + found["Conv"] == 2
    images = digits.data.test.tensors[0]
    torch.testing.assert_close(OnnxModule(path)(images), outputs(mixed, images), rtol=0, atol=0.05)


# Bad input


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation": "int4"}, "activation must be 'uint8' or 'int8', got 'int4'"),
        ({"weight": None}, "weight must be"),
        ({"calibration": "entropy"}, "calibration must be 'minmax' or 'percentile' or 'mse'"),
        ({"calibration_items": 0}, "calibration_items must be a positive integer, got 0"),
        ({"skip": "head"}, r"write \('head',\)"),
    ],
)
def test_unknown_settings(wrong, message):
    with pytest.raises(TransformError, match=message):
        Int8(**wrong)


def test_nothing_to_quantize():
    model = nn.Sequential(nn.LayerNorm(4), nn.GELU())
    with pytest.raises(TransformError, match="nothing to quantize"):
        Int8()(model, make_task(model, torch.randn(4, 4)))
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(TransformError, match="of its own outside of skip, so there is nothing"):
        Int8(skip=("0",))(model, make_task(model, torch.randn(4, 4)))
    with pytest.raises(TransformError, match="skip names 'head', which Sequential does not have"):
        Int8(skip=("head",))(model, make_task(model, torch.randn(4, 4)))


def test_weights_and_activations_that_are_not_finite():
    model = nn.Linear(4, 4)
    task = make_task(model, torch.randn(4, 4))
    with torch.no_grad():
        model.weight[1, 2] = float("nan")
    with pytest.raises(TransformError, match="weight has 1 values that are not finite"):
        Int8()(model, task)
    clean, dirty = nn.Linear(4, 4), torch.randn(4, 4)
    dirty[2, 1] = float("inf")
    with pytest.raises(TransformError, match="not finite on the calibration data"):
        Int8()(clean, make_task(clean, dirty))
