"""Sparse regression: fits, costs of removal, cuts and hard thresholding against dense algebra and exhaustive search."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_reference import on_support

from netwright.compress._elimination import eliminate, fit_and_costs
from netwright.compress._hard_threshold import hard_threshold_step, solve_sparse
from netwright.compress._least_squares import LeastSquares, refit

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
