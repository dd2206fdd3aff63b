"""CHITA: its regression against dense algebra and exhaustive search, its memory, and what it refuses."""

import dataclasses
import itertools
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_reference import gradients, network, numbers, regression
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from netwright.compress._elimination import eliminate, fit_and_costs
from netwright.compress._hard_threshold import hard_threshold_step, solve_sparse
from netwright.compress._least_squares import LeastSquares, refit
from netwright.compress._per_sample_gradients import gradient_rows
from netwright.compress._weights import FlatWeights, loss_gradients, training_batches
from netwright.compress.chita import CHITA
from netwright.core.data import Data
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.fit import fit
from netwright.core.task import Task
from netwright.testing import check_transform
from tests.graph.zoo import build

RIDGE = 0.3


def random_problem(seed: int, n: int = 8, p: int = 10, ridge: float = RIDGE) -> LeastSquares:
    generator = torch.Generator().manual_seed(seed)
    rows, anchor = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, p), (p,)))
    return LeastSquares(rows, rows @ anchor - 0.5, anchor, ridge, (rows.square().mean(0) + ridge).sqrt())


def dense(problem: LeastSquares) -> tuple[np.ndarray, np.ndarray, float]:
    """H, b and c of ``1/2 w'Hw - b'w + c``."""
    x, t, anchor = (part.double().numpy() for part in (problem.rows, problem.target, problem.anchor))
    hessian = x.T @ x / len(t) + problem.ridge * np.eye(len(anchor))
    return hessian, x.T @ t / len(t) + problem.ridge * anchor, t @ t / 2 / len(t) + problem.ridge / 2 * anchor @ anchor


def on_support(hessian: np.ndarray, b: np.ndarray, support: list[int]) -> np.ndarray:
    found = np.zeros(len(b))
    found[support] = np.linalg.solve(hessian[np.ix_(support, support)], b[support])
    return found


def test_function_gradient_and_curvature_are_the_dense_ones() -> None:
    problem = random_problem(0)
    hessian, b, constant = dense(problem)
    w = np.random.default_rng(0).normal(size=10)
    assert problem.value(torch.tensor(w)) == pytest.approx(w @ hessian @ w / 2 - b @ w + constant, rel=1e-12)
    np.testing.assert_allclose(problem.gradient(torch.tensor(w)), hessian @ w - b, rtol=1e-12)
    assert problem.curvature(torch.tensor(w)) == pytest.approx(w @ hessian @ w, rel=1e-12)


@pytest.mark.parametrize("size", [3, 8, 17])
def test_refit_is_dense_least_squares_on_the_support(size) -> None:
    problem = random_problem(1, n=8, p=20)
    hessian, b, _ = dense(problem)
    support = sorted(np.random.default_rng(size).permutation(20)[:size].tolist())
    found = refit(problem, torch.tensor(support))
    np.testing.assert_allclose(found, on_support(hessian, b, support)[support], rtol=1e-9)


def test_best_support_by_exhaustive_search() -> None:
    gaps = []
    for seed in range(30):
        problem = random_problem(seed)
        hessian, b, constant = dense(problem)

        def value(w, hessian=hessian, b=b, constant=constant) -> float:
            return w @ hessian @ w / 2 - b @ w + constant

        best = min(value(on_support(hessian, b, list(s))) for s in itertools.combinations(range(10), 4))
        found = solve_sparse(problem, problem.anchor, 4)
        assert int((found != 0).sum()) == 4
        support = found.nonzero().flatten().tolist()
        np.testing.assert_allclose(found, on_support(hessian, b, support), atol=1e-9)
        gaps.append(problem.value(found) / best - 1)
    assert min(gaps) > -1e-9
    assert np.median(gaps) < 1e-9  # the best support of 210 in most problems, and not far from it elsewhere
    assert np.mean(gaps) < 0.15


def test_an_entry_costs_what_its_removal_costs() -> None:
    """Against the rise of the objective when the dense system is solved again without the entry."""
    problem = random_problem(4, n=6, p=12)
    hessian, b, _ = dense(problem)
    support = [0, 2, 3, 5, 7, 8, 11]
    fit, costs = fit_and_costs(problem, torch.tensor(support))
    whole = torch.tensor(on_support(hessian, b, support))
    np.testing.assert_allclose(fit, whole[support], rtol=1e-9)
    for place, entry in enumerate(support):
        fewer = torch.tensor(on_support(hessian, b, [other for other in support if other != entry]))
        assert float(costs[place]) == pytest.approx(problem.value(fewer) - problem.value(whole), rel=1e-8)


def test_one_entry_at_a_time_it_is_the_greedy_surgeon() -> None:
    problem = random_problem(5, n=8, p=20)
    hessian, b, _ = dense(problem)
    w = problem.anchor
    for count in range(19, 5, -1):
        w = eliminate(problem, w, count)
        np.testing.assert_allclose(w, surgeon(hessian, b, count), rtol=1e-6, atol=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 6))
def test_elimination_leaves_the_number_asked_for(seed, count, cuts) -> None:
    problem = random_problem(seed, n=5, p=20)
    start = problem.anchor * (torch.arange(20) % 4 != 0)
    found = eliminate(problem, start, count, cuts=cuts)
    assert int((found != 0).sum()) == min(count, 15)
    assert not bool(found[start == 0].any())


def test_many_entries_are_as_well_chosen_as_by_a_dense_surgeon() -> None:
    ratios, finer = [], []
    for seed in range(10):
        problem = random_problem(seed, n=20, p=60, ridge=0.1)
        hessian, b, _ = dense(problem)
        dense_answer = torch.tensor(surgeon(hessian, b, 15))
        found = solve_sparse(problem, problem.anchor, 15)
        ratios.append(problem.value(found) / problem.value(dense_answer))
        finer.append(problem.value(eliminate(problem, problem.anchor, 15, cuts=12)) / problem.value(dense_answer))
    assert np.mean(ratios) < 1.25  # in a hundredth of the time where there are thousands of weights
    assert min(ratios) < 1  # greedy choices are not optimal either
    assert np.mean(finer) < 1.1


def surgeon(hessian: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
    """Greedy Optimal Brain Surgeon with the dense inverse: the entry whose loss rises least goes, others follow."""
    inverse, w = np.linalg.inv(hessian), np.linalg.solve(hessian, b)
    alive = list(range(len(b)))
    while len(alive) > count:
        out = min(alive, key=lambda i: w[i] ** 2 / inverse[i, i])
        w = w - inverse[:, out] * w[out] / inverse[out, out]
        inverse = inverse - np.outer(inverse[:, out], inverse[out]) / inverse[out, out]
        alive.remove(out)
        w[out] = 0.0
    return w


@given(st.integers(0, 10**6), st.integers(1, 19), st.integers(2, 12))
def test_steps_never_raise_the_objective(seed, count, n) -> None:
    problem = random_problem(seed, n=n, p=20)
    w = problem.anchor * (torch.arange(20) < count)
    value = problem.value(w)
    for _ in range(5):
        w, found = hard_threshold_step(problem, w, count, value)
        assert found <= value
        assert found == pytest.approx(problem.value(w), rel=1e-12)
        assert int((w != 0).sum()) <= count
        value = found


def test_step_is_exact_while_the_support_stays() -> None:
    drawn = random_problem(2)
    anchor = torch.zeros(10, dtype=torch.float64)
    anchor[:4] = 100.0
    problem = LeastSquares(drawn.rows, drawn.rows @ anchor - 0.5, anchor, RIDGE, torch.ones(10).double())
    hessian, b, _ = dense(problem)
    w = anchor + 0.1 * torch.arange(10).double() * (anchor != 0)
    moved, _ = hard_threshold_step(problem, w, 4, problem.value(w))
    slope = (hessian @ w.numpy() - b) * (np.arange(10) < 4)
    wanted = w.numpy() - slope * (slope @ slope) / (slope @ hessian @ slope)
    np.testing.assert_allclose(moved, wanted, rtol=1e-12)


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
    for width in (100, 200, 400):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 20))
        split = [TensorDataset(torch.randn(n, 20), torch.randn(n, 20)) for n in (128, 4, 4)]
        task = Task("wide", model, Data(*split), nn.functional.mse_loss, lambda o, t: 0.0)
        size = 40 * width
        with Memory() as memory:
            CHITA(0.9, stages=2, gradients=32, batch_size=4)(model, task)
        assert memory.largest <= 32 * size * 8  # the rows, in float64 at most: no p by p matrix of 4 p² bytes
        peaks.append(memory.peak / size)
    assert max(peaks) < 1.1 * peaks[0]  # p grows fourfold
    assert max(peaks) < 5 * 32 * 4  # bytes for each weight: five times the rows


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
