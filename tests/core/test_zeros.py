"""Zeros that stay, on disk and while training."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto
from torch import Tensor, nn

from netwright.core.artifact import OnnxModule, export_onnx
from netwright.core.errors import RecipeError, TransformError
from netwright.core.fit import StepHook, fit
from netwright.core.onnx_memory import peak_memory
from netwright.core.onnx_sparse import gaps
from netwright.core.recipe import Recipe
from netwright.core.task import load_task
from netwright.core.zeros import Zeros, is_sparse


def thinned(model: nn.Module, share: float) -> nn.Module:
    model = copy.deepcopy(model)
    for value in model.parameters():
        if value.ndim > 1:
            value.data[torch.rand_like(value) < share] = 0.0
    return model


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 40)
    ).eval()


@given(st.lists(st.tuples(st.integers(0, 900), st.integers(1, 5)), max_size=12))
def test_gaps_lead_back_to_the_tensor(runs: list[tuple[int, int]]) -> None:
    flat = np.concatenate([np.r_[np.zeros(zeros), np.arange(1, full + 1)] for zeros, full in runs] or [np.zeros(3)])
    steps, position = gaps(flat)
    back, at = np.zeros_like(flat), -1
    for step, value in zip(steps, flat[position], strict=True):
        at += int(step)
        back[at] = value
    assert (back == flat).all()
    assert (steps > 0).all()
    assert len(steps) <= np.count_nonzero(flat) + len(flat) // 255


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99, 1.0])
def test_the_file_holds_what_is_not_zero_and_computes_the_same(share: float, tmp_path: Path) -> None:
    whole, inputs = network(), torch.randn(2, 3, 8, 8)
    model = thinned(whole, share)
    for name, kind in (("whole", whole), ("thin", model)):
        export_onnx(kind, inputs, tmp_path / name)
    onnx.checker.check_model(onnx.load(tmp_path / "thin"), full_check=True)
    torch.testing.assert_close(OnnxModule(tmp_path / "thin")(inputs), model(inputs), rtol=1e-5, atol=1e-6)
    left = sum(int((value != 0).sum()) for value in model.parameters() if value.ndim > 1)
    size, before = (tmp_path / "thin").stat().st_size, (tmp_path / "whole").stat().st_size
    if share < 0.4:
        assert size > 0.99 * before  # five bytes for each that is left would not be less
    else:
        assert size < 5.1 * left + 3 * 2000
    assert peak_memory(tmp_path / "thin") == peak_memory(tmp_path / "whole")


def test_the_runtime_puts_zeros_back_once(tmp_path: Path) -> None:
    import onnxruntime

    model, inputs = thinned(network(), 0.9), torch.randn(2, 3, 8, 8)
    export_onnx(model, inputs, tmp_path / "thin.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(tmp_path / "thin.onnx", options, providers=["CPUExecutionProvider"])
    operations = {node.op_type for node in onnx.load(tmp_path / "loaded.onnx").graph.node}
    assert operations.isdisjoint({"ScatterElements", "CumSum", "Cast"})


def test_integers_are_stored_so_too(tmp_path: Path) -> None:
    from netwright.compress import Int8

    task = load_task("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    inputs = task.example(4)
    sizes = {}
    for share in (0.0, 0.9):
        quantized = Int8(reduce_range=True)(thinned(model, share), task)
        path = tmp_path / f"{share}.onnx"
        export_onnx(quantized, inputs, path)
        sizes[share] = path.stat().st_size
        graph = onnx.load(path).graph
        placed = {node.input[2] for node in graph.node if node.op_type == "ScatterElements"}
        values = {item.data_type for item in graph.initializer if item.name in placed}
        assert values == (set() if share == 0 else {TensorProto.INT8})
        reference = quantized(inputs)
        assert (OnnxModule(path)(inputs) - reference).abs().max() < 0.05 * reference.abs().max()
    assert sizes[0.9] < 0.55 * sizes[0.0]


def test_fit_holds_zeros() -> None:
    task = load_task("breast-cancer")
    model = thinned(task.build(seed=0), 0.7)
    assert is_sparse(model)
    before = [value == 0 for value in model.parameters() if value.ndim > 1]
    free = fit(copy.deepcopy(model), task, Recipe(epochs=1), validate=False).model
    held = fit(model, task, Recipe(epochs=1, keep_zeros=True, average=0.9), validate=False).model
    assert not is_sparse(free)
    for gone, value in zip(before, (value for value in held.parameters() if value.ndim > 1), strict=True):
        assert torch.equal(gone, value == 0)


def test_without_zeros_nothing_changes() -> None:
    task = load_task("breast-cancer")
    found = [
        fit(task.build(seed=0), task, Recipe(epochs=1, keep_zeros=keep), validate=False).model.state_dict()
        for keep in (False, True)
    ]
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name])


def test_layers_of_zeros_and_vectors_are_not_held() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[1].bias)
    model[1].weight.data[0, 1] = 0.0
    zeros = Zeros(model)
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(1.0)
    zeros.restore()
    assert int(sum((value == 0).sum() for value in model.parameters())) == 1
    assert model[1].weight[0, 1] == 0


def test_zeros_are_put_into_another_model_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].weight.data[1, 2] = 0.0
    zeros = Zeros(model)
    other = copy.deepcopy(model)
    nn.init.ones_(other[0].weight)
    zeros.put_into(other)
    assert other[0].weight.tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    assert model[0].weight[1, 2] == 0
    with pytest.raises(TransformError, match=r"zeros of 0.weight \(2, 3\) cannot be kept.* it has shape \(2, 4\)"):
        zeros.put_into(nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(TransformError, match="in the trained Linear it is not there"):
        zeros.put_into(nn.Linear(3, 2))


@pytest.mark.parametrize("keep", [True, False])
def test_an_own_fit_hands_back_the_zeros(keep: bool) -> None:
    def own(model: nn.Module, *, budget: float, seed: int, teacher: nn.Module | None = None) -> nn.Module:
        trained = copy.deepcopy(model)
        for value in trained.parameters():
            value.data += 1.0
        return trained

    task = dataclasses.replace(load_task("breast-cancer"), fit=own, evaluate=lambda model, split: 0.0)
    model = thinned(task.build(seed=0), 0.7)
    found = fit(model, task, Recipe(epochs=1, keep_zeros=keep)).model
    for before, value in zip(model.parameters(), found.parameters(), strict=True):
        if before.ndim > 1 and keep:
            assert torch.equal(value, torch.where(before == 0, 0.0, before + 1.0))
        else:
            assert torch.equal(value, before + 1.0)


def test_keep_zeros_is_checked() -> None:
    with pytest.raises(RecipeError, match="keep_zeros must be true or false"):
        Recipe(keep_zeros=1)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="keep_zeros must be false with a parameterization"):
        Recipe(keep_zeros=True, parameterization="torch.nn:Identity")


class Recorder(StepHook):
    """Doubles every gradient, and remembers what it saw."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.calls: list[tuple[str, int, int]] = []

    def before_step(self, step: int, total: int) -> None:
        assert self.weight.grad is not None
        self.weight.grad.mul_(2.0)
        self.calls.append(("before", step, total))

    def after_step(self, step: int, total: int) -> None:
        self.calls.append(("after", step, total))


def test_a_hook_sees_every_step_and_may_change_gradients() -> None:
    task = load_task("breast-cancer")
    plain = Recipe(epochs=0.1, optimizer="torch.optim:SGD", optimizer_settings={"lr": 0.1}, schedule=None)
    model, other = task.build(seed=0), task.build(seed=0)
    first = next(model.parameters())
    before = first.detach().clone()
    hook = Recorder(first)
    result = fit(model, task, plain.replace(epochs=1e-9), validate=False, hook=hook)
    fit(other, task, plain.replace(epochs=1e-9), validate=False)
    assert result.steps == 1
    torch.testing.assert_close(first - before, 2 * (next(other.parameters()) - before))
    hook.calls.clear()
    steps = fit(model, task, plain, validate=False, hook=hook).steps
    assert hook.calls == [(what, step, steps) for step in range(steps) for what in ("before", "after")]


def test_where_no_hook_can_be_called(tmp_path: Path) -> None:
    task = load_task("breast-cancer")
    with pytest.raises(RecipeError, match="no hook together with a checkpoint"):
        fit(task.build(), task, Recipe(epochs=1), hook=StepHook(), checkpoint=tmp_path / "c")
    newton = Recipe(epochs=1, optimizer="netwright.optim:SaddleFreeNewton", optimizer_settings={}, schedule=None)
    with pytest.raises(RecipeError, match="no hook can see its gradients"):
        fit(task.build(), task, newton, hook=StepHook())


def test_scales_and_zero_points_stay_constants(tmp_path: Path) -> None:
    from netwright.compress import Int8

    task = load_task("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 10))
    path = tmp_path / "wide.onnx"
    export_onnx(Int8()(model, task), task.example(2), path)
    proto = onnx.load(str(path))
    stored = {item.name for item in proto.graph.initializer}
    places = {
        name
        for node in proto.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for name in node.input[1:]
    }
    assert places
    assert places <= stored
