"""fastest_int8 on weights that a file stores smaller than a byte each, and where the runtime refuses a pair."""

import copy

import onnx
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.compress import int8_types
from netwright.compress.int8_types import _PAIRS, _retype, fastest_int8
from netwright.compress.quantize import Int8
from netwright.core.artifact import OnnxModule, export_onnx
from netwright.core.data import Data
from netwright.core.errors import ArtifactError, TransformError
from netwright.core.task import Task


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


def task_of(model: nn.Module) -> Task:
    data = [TensorDataset(torch.randn(32, 32), torch.zeros(32).long()) for _ in range(3)]
    return Task("made", model, Data(*data), nn.functional.cross_entropy, lambda outputs, targets: 0.0)


def sparse(share: float) -> nn.Sequential:
    model = network()
    with torch.no_grad():
        model[2].weight *= torch.rand(64, 64) >= share
    return model


@pytest.mark.parametrize(
    ("model", "settings"),
    [(network(), Int8(weight_bits=4)), (network(), Int8(weight_bits=3)), (sparse(0.7), Int8()), (sparse(1.0), Int8())],
    ids=["4 bits", "3 bits", "70% zeros", "a layer of zeros"],
)
def test_weights_that_are_stored_smaller_are_measured_in_every_type(
    model: nn.Module, settings: Int8, tmp_path: object
) -> None:
    task = task_of(model)
    export_onnx(settings(model, task), task.example(), f"{tmp_path}/made.onnx")
    kinds = {item.op_type for item in onnx.load(f"{tmp_path}/made.onnx").graph.node}
    assert kinds & {"Cast", "BitShift", "ScatterElements"}  # or there is nothing to test
    found = fastest_int8(model, task, settings=settings, seconds=0.02)
    whole = [row for row in found.table if not row.reduce_range]
    assert [(row.activation, row.weight) for row in whole] == list(_PAIRS)
    assert all(row.right for row in whole if row.activation == "int8")
    assert found.settings.weight_bits == settings.weight_bits


@pytest.mark.parametrize("share", [0.0, 0.7])
def test_other_types_of_narrow_weights_stand_for_the_same_numbers(share: float, tmp_path: object) -> None:
    model = sparse(share)
    task, settings = task_of(model), Int8(weight_bits=4)
    rounded = settings(model, task)
    inputs = task.example(32)
    export_onnx(rounded, inputs, f"{tmp_path}/made.onnx")
    with torch.no_grad():
        expected, exact = rounded(inputs), model(inputs)
    for activation, weight in (("int8", "int8"), ("uint8", "uint8")):
        _retype(tmp_path / "made.onnx", tmp_path / "other.onnx", activation, weight)
        stored = onnx.load(f"{tmp_path}/other.onnx")
        kinds = {item.data_type for item in stored.graph.initializer if len(item.dims) == 2}
        assert kinds == {onnx.TensorProto.INT8 if weight == "int8" else onnx.TensorProto.UINT8}
        found = OnnxModule(tmp_path / "other.onnx")(inputs)
        assert float((found - expected).norm()) < 0.1 * float((exact - expected).norm())


def test_a_pair_that_cannot_be_loaded_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()

    def loaded(path: object, threads: int = 1) -> OnnxModule:
        if "uint8-uint8" in str(path):
            raise ArtifactError("The runtime refuses it.")
        return OnnxModule(path, threads)

    monkeypatch.setattr(int8_types, "OnnxModule", loaded)
    found = fastest_int8(model, task_of(model), seconds=0.02)
    assert {(row.activation, row.weight) for row in found.table} == {("uint8", "int8"), ("int8", "int8")}


def test_where_no_pair_can_be_loaded_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(network())

    def loaded(path: object, threads: int = 1) -> OnnxModule:
        if "int8" in str(path):
            raise ArtifactError("The runtime refuses it.")
        return OnnxModule(path, threads)

    monkeypatch.setattr(int8_types, "OnnxModule", loaded)
    with pytest.raises(TransformError, match=r"no integer form .* refuses it"):
        fastest_int8(model, task_of(model), seconds=0.02)
