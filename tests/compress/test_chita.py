"""CHITA: its result against dense algebra, its rows, its memory, and what it refuses."""

import dataclasses
import weakref

import numpy as np
import pytest
import torch
from sparse_reference import gradients, network, numbers, on_support, regression
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from netwright.compress._per_sample_gradients import gradient_rows
from netwright.compress._weights import FlatWeights, loss_gradients, training_batches
from netwright.compress.chita import CHITA
from netwright.core.data import Data
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.fit import fit
from netwright.core.task import Task
from netwright.testing import check_transform
from tests.graph.zoo import build


def test_rows_are_the_gradients_written_out() -> None:
    task = regression()
    model = task.model
    rows = gradient_rows(model, FlatWeights(model), task, count=12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    x, y = task.data.train.tensors
    for row, item in zip(rows, order, strict=True):
        single = dataclasses.replace(task, data=Data(TensorDataset(x[item][None], y[item][None]), *held_out(task)))
        found = gradients(numbers(model), single)
        np.testing.assert_allclose(row, np.concatenate([found[0].ravel(), found[2].ravel()]), atol=1e-14)


def held_out(task: Task) -> tuple:
    return task.data.val, task.data.test


def zoo_task(name: str) -> Task:
    model, inputs = build(name)
    single = inputs if isinstance(inputs, tuple | dict) else (inputs,)
    parts = list(single.values()) if isinstance(single, dict) else list(single)
    size = len(parts[0])

    class Items:
        def __len__(self) -> int:
            return 2 * size

        def __getitem__(self, index: int):
            item = index % size
            if isinstance(inputs, dict):
                return {key: value[item] for key, value in inputs.items()}, 0
            return (tuple(part[item] for part in parts) if isinstance(inputs, tuple) else parts[0][item]), 0

    def loss(output, target):
        first = output if isinstance(output, torch.Tensor) else next(iter(_pytree.tree_leaves(output)))
        return first.float().square().mean()

    return Task(name, model, Data(Items(), Items(), Items()), loss, lambda o, t: 0.0)


ZOO = ["resnet", "two-inputs", "two-outputs", "cross-attention", "gru", "hf-bert"]


@pytest.mark.parametrize("name", ZOO)
def test_works_on_the_zoo(name) -> None:
    task = zoo_task(name)
    model = task.model.eval()
    weights = FlatWeights(model)
    singles = loss_gradients(model, weights, task, training_batches(task, 1, 3, 0, torch.device("cpu")))
    together = gradient_rows(model, weights, task, count=3)
    torch.testing.assert_close(together, singles, rtol=1e-3, atol=1e-5 * float(singles.abs().max()))
    sparse = CHITA(0.8, stages=2, gradients=4, batch_size=1)(model, task)
    assert sum(int((v != 0).sum()) for v in FlatWeights(sparse).parameters.values()) <= round(0.2 * weights.size)
    assert all(bool(value.isfinite().all()) for value in sparse.parameters())


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize(("first_order", "scaled"), [(True, True), (False, True), (True, False)])
def test_result_is_the_dense_optimum_on_its_support(first_order, scaled, exchange) -> None:
    task = regression()
    settings = {"first_order": first_order, "scaled": scaled, "exchange": exchange}
    sparse = CHITA(0.5, stages=1, gradients=12, batch_size=1, **settings)(task.model, task, seed=3)
    rows = loss_gradients(
        task.model, FlatWeights(task.model), task, training_batches(task, 1, 12, 3, torch.device("cpu"))
    )
    x, anchor, w = rows.numpy(), FlatWeights(task.model).read().numpy(), FlatWeights(sparse).read().numpy()
    square = (x**2).mean()
    worth = (x**2).mean(0) + square  # D², of which the ridge is a multiple
    ridge = (x**2 / worth).mean() * np.diag(worth) if scaled else square * np.eye(56)
    hessian = x.T @ x / 12 + ridge
    slope = x.mean(0) if first_order else np.zeros(56)
    b = hessian @ anchor - slope  # of slope'(w - anchor) + 1/2 (w - anchor)'H(w - anchor)
    support = np.flatnonzero(w).tolist()
    assert len(support) == 28
    np.testing.assert_allclose(w, on_support(hessian, b, support), rtol=1e-8, atol=1e-12)


def test_stages_leave_geometric_shares() -> None:
    assert CHITA(0.99, stages=2).counts(10_000) == [1000, 100]
    task = regression()
    halves = CHITA(0.75, stages=2, gradients=6, batch_size=2)(task.model, task, seed=5)
    first = CHITA(0.5, stages=1, gradients=6, batch_size=2)(task.model, task, seed=5)
    second = CHITA(0.75, stages=1, gradients=6, batch_size=2)(first, task, seed=6)
    assert torch.equal(FlatWeights(halves).read(), FlatWeights(second).read())


class Memory(TorchDispatchMode):
    """The most bytes that tensors made inside held at once, and the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in _pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.live:
                storage = leaf.untyped_storage()
                self.live[storage.data_ptr()] = storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
                weakref.finalize(storage, self.live.pop, storage.data_ptr(), 0)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def test_memory_is_linear_in_the_weights() -> None:
    peaks = []
    for width in (50, 100, 200):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 20))
        split = [TensorDataset(torch.randn(n, 20), torch.randn(n, 20)) for n in (128, 4, 4)]
        task = Task("wide", model, Data(*split), nn.functional.mse_loss, lambda o, t: 0.0)
        size = 40 * width
        with Memory() as memory:
            CHITA(0.9, stages=2, gradients=32, batch_size=4)(model, task)
        assert memory.largest <= 32 * size * 8  # the rows, in float64 at most: no p by p matrix of 4 p² bytes
        peaks.append(memory.peak / size)
    assert max(peaks) < 1.1 * peaks[0]  # p grows fourfold, and what is held at a time does not
    assert max(peaks) < 4 * 32 * 4  # bytes for each weight: four times the rows


def test_noise_is_what_was_asked_for() -> None:
    task = regression()
    weights = FlatWeights(task.model)
    clean, noisy = (
        CHITA(0.5, gradients=12, batch_size=1, scaled=False, noise=noise).regression(task.model, weights, task, 0).rows
        for noise in (0.0, 2.0)
    )
    added = (noisy - clean) / clean.square().mean().sqrt()
    assert float(added.std()) == pytest.approx(2.0, rel=0.1)
    assert abs(float(added.mean())) < 0.3


def test_fine_tuning_keeps_the_zeros() -> None:
    task = regression()
    sparse = CHITA(0.7, stages=2, gradients=12, batch_size=1)(task.model, task)
    gone = FlatWeights(sparse).read() == 0
    before = task.loss(sparse(task.data.train.tensors[0]), task.data.train.tensors[1]).item()
    fit(sparse, task, task.recipe.replace(epochs=20, keep_zeros=True), validate=False)
    assert torch.equal(FlatWeights(sparse).read() == 0, gone)
    assert task.loss(sparse(task.data.train.tensors[0]), task.data.train.tensors[1]).item() < before


@pytest.mark.parametrize("method", [CHITA(0.8, 2, 8, 4), CHITA(0.9, 1, 8, 1, scaled=False)])
def test_conforms(method) -> None:
    check_transform(lambda: method)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0}, r"ratio must lie in \(0, 1\)"),
        ({"stages": 0}, "stages must be a positive integer"),
        ({"gradients": 1.5}, "gradients must be a positive integer"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"ridge": 0}, "ridge must be a finite number, greater than 0"),
        ({"noise": -1}, "noise must be a finite number"),
        ({"first_order": 1}, "first_order must be true or false, got 1"),
        ({"exclude": "fc"}, "exclude must be a sequence of names"),
    ],
)
def test_refuses_settings(settings, message) -> None:
    with pytest.raises(TransformError, match=f"CHITA.{message}"):
        CHITA(**settings)


def test_refuses_models_and_tasks() -> None:
    task = regression()
    with pytest.raises(NothingToPruneError, match="no weight matrix or kernel"):
        CHITA()(nn.BatchNorm1d(3), task)
    with pytest.raises(TransformError, match="exclude names 'head'"):
        CHITA(exclude=["head"])(task.model, task)
    with pytest.raises(TransformError, match=r"ratio=0.999 would leave none of 56 weights.*one is 0.982143"):
        CHITA(0.999)(task.model, task)
    with pytest.raises(TransformError, match="needs the gradients of a loss"):
        CHITA()(task.model, dataclasses.replace(task, loss=None, fit=lambda model, **_: model))
    with pytest.raises(TransformError, match="has no gradient at this model"):
        CHITA(batch_size=4)(task.model, dataclasses.replace(task, loss=lambda output, target: 0 * output.sum()))
    with pytest.raises(TransformError, match="not finite"):
        CHITA(batch_size=1)(
            task.model, dataclasses.replace(task, loss=lambda output, target: output.sum().log() * 0 / 0)
        )
    broken = network()
    broken[2].bias.data[0] = float("inf")
    with pytest.raises(TransformError, match=r"2.bias has 1 values that are not finite"):
        CHITA()(broken, task)
