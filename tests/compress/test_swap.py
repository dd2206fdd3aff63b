"""SWAP: its transport plan against a linear programme, its regression against CHITA's, and what it refuses."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from sparse_reference import network, regression
from torch import nn

from netwright.compress._hard_threshold import solve_sparse
from netwright.compress._least_squares import LeastSquares
from netwright.compress._sinkhorn import barycentric_target, sinkhorn_plan
from netwright.compress._weights import FlatWeights
from netwright.compress.chita import CHITA
from netwright.compress.swap import SWAP, transport_problem
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.testing import check_transform


def numbers(seed: int, *sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def random_problem(seed: int, n: int = 7, p: int = 12) -> LeastSquares:
    rows, anchor = numbers(seed, n * p, p)
    rows = rows.view(n, p)
    return LeastSquares(rows, rows @ anchor - 0.5, anchor, 0.3, (rows.square().mean(0) + 0.3).sqrt())


@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 7)])
def test_little_entropy_is_the_linear_programme(n, m) -> None:
    a, b = numbers(0, n, m)
    cost = (a[:, None] - b[None, :]).square().numpy()
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    sums = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    exact = linprog(cost.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=sums, bounds=(0, None))
    plan = sinkhorn_plan(a, b, 0.005, iterations=20_000).numpy()
    assert (plan * cost).sum() == pytest.approx(exact.fun, rel=0.01)
    np.testing.assert_allclose(plan.sum(0), 1 / m, rtol=1e-9)
    np.testing.assert_allclose(plan.sum(1), 1 / n, rtol=1e-3)


def test_much_entropy_is_uniform() -> None:
    a, b = numbers(1, 5, 8)
    np.testing.assert_allclose(sinkhorn_plan(a, b, 1e8), np.full((5, 8), 1 / 40), rtol=1e-6)
    np.testing.assert_allclose(barycentric_target(sinkhorn_plan(a, b, 1e8), a), np.full(8, a.mean()), rtol=1e-5)


@given(st.integers(0, 10_000), st.integers(2, 20), st.sampled_from([0.02, 0.1, 1.0]))
@example(7404, 2, 0.02)  # duals of 10^7 that cancel
@settings(max_examples=30, deadline=None)
def test_the_default_accuracy_of_the_plan(seed, size, eps) -> None:
    """Columns are exact and rows are off by a thousandth, also where a few entries are far from the rest."""
    a, noise = numbers(seed, size, size)
    a = a**3
    plan = sinkhorn_plan(a, a + 0.3 * noise, eps * float(a.var(correction=0)))
    torch.testing.assert_close(plan.sum(0), torch.full_like(a, 1 / size), rtol=1e-9, atol=0)
    torch.testing.assert_close(plan.sum(1), torch.full_like(a, 1 / size), rtol=1.1e-3, atol=0)


def test_without_entropy_targets_are_handed_out_by_order() -> None:
    a, b = torch.tensor([0.3, -2.0, 1.1, 0.9]), torch.tensor([5.0, 6.0, -1.0, 7.0])
    target = barycentric_target(sinkhorn_plan(a, b, 1e-3), a)
    torch.testing.assert_close(target, torch.tensor([0.3, 0.9, -2.0, 1.1]))


def test_entropy_draws_targets_to_their_mean() -> None:
    a, b = numbers(6, 30, 30)
    targets = [barycentric_target(sinkhorn_plan(a, b, eps), a) for eps in (1e-2, 1e-1, 1.0, 10.0)]
    assert all(float(target.mean()) == pytest.approx(float(a.mean()), abs=2e-3) for target in targets)
    spreads = [float(target.var()) for target in targets]
    assert float(a.var()) > spreads[0] > spreads[1] > spreads[2] > spreads[3]


def test_without_entropy_it_is_chita_where_the_order_stays() -> None:
    """Exact transport moves the smallest entry to the smallest: nothing, if the fit has the order of the targets."""
    problem = random_problem(2)
    start = problem.anchor
    w = solve_sparse(problem, start, 9)
    assert torch.equal((problem.rows @ w).argsort(), problem.target.argsort())
    same = transport_problem(problem, sinkhorn_plan(problem.target, problem.rows @ w, 1e-6))
    torch.testing.assert_close(same.target, problem.target, rtol=1e-6, atol=1e-9)
    method = SWAP(eps=1e-7, alternations=3)
    torch.testing.assert_close(method._solve(problem, start, 9, True), w, rtol=1e-6, atol=1e-9)
    turned = dataclasses.replace(problem, target=-problem.target)
    swapped = transport_problem(turned, sinkhorn_plan(turned.target, problem.rows @ w, 1e-6))
    torch.testing.assert_close(swapped.target.sort().values, turned.target.sort().values, rtol=1e-6, atol=0)
    assert torch.equal(swapped.target.argsort(), problem.target.argsort())


def test_identical_assignment_is_chita() -> None:
    problem = random_problem(2)
    same = transport_problem(problem, torch.eye(7, dtype=torch.float64) / 7)
    [w] = numbers(3, 12)
    torch.testing.assert_close(same.gradient(w), problem.gradient(w), rtol=1e-12, atol=0)
    task = regression()
    settings = {"ratio": 0.6, "stages": 2, "gradients": 12, "batch_size": 1}
    swap, chita = SWAP(**settings, alternations=0), CHITA(**settings)
    assert torch.equal(FlatWeights(swap(task.model, task)).read(), FlatWeights(chita(task.model, task)).read())


def test_gradient_is_that_of_the_transport_cost() -> None:
    problem = random_problem(4)
    [w] = numbers(5, 12)
    plan = sinkhorn_plan(problem.target, problem.rows @ w, 0.5, iterations=2000, tolerance=1e-12)
    w.requires_grad_(True)
    cost = (plan * (problem.target[:, None] - (problem.rows @ w)[None, :]).square()).sum() / 2
    (cost + problem.ridge / 2 * (w - problem.anchor).square().sum()).backward()
    torch.testing.assert_close(transport_problem(problem, plan).gradient(w.detach()), w.grad, rtol=1e-9, atol=1e-12)


def test_alternation_changes_the_result() -> None:
    task = regression()
    settings = {"ratio": 0.6, "stages": 1, "gradients": 12, "batch_size": 1}
    found = [FlatWeights(SWAP(**settings, alternations=n)(task.model, task)).read() for n in (0, 2)]
    assert not torch.equal(*found)
    assert all(int((w != 0).sum()) == 22 for w in found)


def test_conforms() -> None:
    check_transform(lambda: SWAP(0.8, 2, 8, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.0}, r"ratio must lie in \(0, 1\)"),
        ({"eps": 0.0}, "eps must be a finite number, greater than 0"),
        ({"alternations": -1}, "alternations must be an integer of at least 0"),
        ({"stages": 0}, "stages must be a positive integer"),
    ],
)
def test_refuses_settings(settings, message) -> None:
    with pytest.raises(TransformError, match=f"SWAP.{message}"):
        SWAP(**settings)


def test_refuses_models_and_tasks() -> None:
    task = regression()
    with pytest.raises(NothingToPruneError, match="no weight matrix or kernel"):
        SWAP()(nn.BatchNorm1d(3), task)
    with pytest.raises(TransformError, match=r"SWAP.ratio=0.999 would leave none of 56 weights"):
        SWAP(0.999)(task.model, task)
    with pytest.raises(TransformError, match="SWAP needs the gradients of a loss"):
        SWAP()(task.model, dataclasses.replace(task, loss=None, fit=lambda model, **_: model))
    broken = network()
    broken[2].bias.data[0] = float("inf")
    with pytest.raises(TransformError, match=r"SWAP: 2\.bias has 1 values that are not finite"):
        SWAP()(broken, task)
