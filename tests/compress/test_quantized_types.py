"""Quantized networks of other float types than 32 bits: in torch, in a file, and as float32 has them."""

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from netwright.compress import GETA, OMPQ, Codebooks, EasyQuant, Int8
from netwright.compress._quantizers import Integers, WeightQuantizer, weight_scale
from netwright.core.artifact import OnnxModule, export_onnx
from netwright.core.data import Data
from netwright.core.errors import ArtifactError
from netwright.core.task import Task

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)


def linear() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    return model, torch.randn(32, 32)


def convolutions() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    return model, torch.randn(32, 3, 8, 8)


def task_of(model: nn.Module, inputs: Tensor) -> Task:
    data = Data(*(TensorDataset(inputs, torch.zeros(len(inputs)).long()) for _ in range(3)))
    return Task("made", model, data, nn.functional.cross_entropy, lambda outputs, targets: 0.0)


@pytest.mark.parametrize(
    ("build", "kind", "method"),
    [
        (linear, torch.float16, Int8()),
        (linear, torch.float16, OMPQ()),
        (linear, torch.float16, EasyQuant(bits=6)),
        (convolutions, torch.float16, Int8()),
        (convolutions, torch.float16, Int8(weight_bits=4)),
        (convolutions, torch.float16, GETA(ratio=0)),
        (linear, torch.float64, Int8(per_channel=False)),  # ONNX Runtime has no convolution of float64
        (linear, torch.float64, OMPQ()),
        (linear, torch.float64, GETA(ratio=0)),
    ],
)
def test_the_file_computes_what_the_module_does(build: Any, kind: torch.dtype, method: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    model = model.to(kind).eval()
    inputs = inputs.to(kind)
    rounded = method(model, task_of(model, inputs), budget=0)
    export_onnx(rounded, inputs, tmp_path / "made.onnx")
    with torch.no_grad():
        expected, exact = rounded(inputs), model(inputs)
    found = OnnxModule(tmp_path / "made.onnx")(inputs)
    assert found.dtype == expected.dtype == kind
    assert not torch.equal(exact, expected)  # it was rounded
    assert float((found - expected).double().norm()) < 0.02 * float(expected.double().norm())  # ties in rounding
    stored = onnx.load(str(tmp_path / "made.onnx")).graph.initializer
    assert not [item for item in stored if len(item.dims) > 1 and min(item.dims) > 1 and item.data_type in FLOATS]


@pytest.mark.parametrize("method", [Int8(), OMPQ()])
def test_double_computes_what_single_does(method: Any) -> None:
    torch.manual_seed(0)
    model, inputs = convolutions()
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        single = method(model, task_of(model, inputs))(inputs)
        found = method(double, task_of(double, inputs.double()))(inputs.double())
        exact = model(inputs)
    assert float((found - single).norm()) < 0.2 * float((single - exact).norm())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_a_channel_of_zeros_has_a_scale(kind: torch.dtype) -> None:
    weight = torch.tensor([[0.0, 0.0], [2.0, -4.0]], dtype=kind)
    scale = weight_scale(weight, 0, 127, True)
    assert scale.dtype == torch.float32
    assert scale[0] > 0
    assert scale[1] == torch.tensor(4.0) / 127
    rounded = WeightQuantizer(weight, 0, Integers(-127, 127), True).eval()(weight)
    assert rounded.dtype == kind
    assert torch.equal(rounded[0], weight[0])
    assert float((rounded[1] - weight[1]).abs().max()) <= 4 / 127


def test_codebooks_of_a_type_without_kernels_are_refused_in_plain_words(tmp_path: Path) -> None:
    model, inputs = linear()
    model, inputs = model.bfloat16().eval(), inputs.bfloat16()
    made = Codebooks(3)(model, task_of(model, inputs), budget=0)
    with pytest.raises(ArtifactError, match=r"bfloat16.* model\.float\(\)"):
        export_onnx(made, inputs, tmp_path / "made.onnx")
