"""Predictors against dense linear algebra and held-out truth."""

import itertools

import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern

from netwright.core.errors import SettingError
from netwright.search import BayesianRidge, GaussianProcess, TreeEnsemble, stack
from netwright.search.gaussian_process import kept_rows
from netwright.search.predictors import PREDICTORS, _held_out, _weights


def data(count=80, width=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) * [1, 2, 3, 1, 1][:width] + 4, rng


@pytest.mark.parametrize("count", [12, 80])
@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_ridge_is_the_normal_equations(count, strength):
    inputs, rng = data(count)
    targets = inputs @ rng.normal(size=5) + rng.normal(size=count)
    found = BayesianRidge(strengths=(strength,)).fit(inputs, targets)
    rows = (inputs - inputs.mean(0)) / inputs.std(0)
    gram = np.linalg.inv(rows.T @ rows + strength * np.eye(5))
    weights = gram @ rows.T @ (targets - targets.mean())
    hat = rows @ gram @ rows.T
    residual = targets - targets.mean() - rows @ weights
    noise = residual @ residual / (count - 1 - np.trace(hat))
    new = (rng.normal(size=(7, 5)) + 4 - inputs.mean(0)) / inputs.std(0)
    mean, deviation = found.predict(new * inputs.std(0) + inputs.mean(0))
    np.testing.assert_allclose(mean, targets.mean() + new @ weights)
    np.testing.assert_allclose(deviation**2, noise * (1 + np.einsum("ij,jk,ik->i", new, gram, new)))


def test_ridge_with_more_features_than_rows():
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(10, 30)), rng.normal(size=10)
    found = BayesianRidge(strengths=(1.0,)).fit(inputs, targets)
    rows = (inputs - inputs.mean(0)) / inputs.std(0)
    new = rng.normal(size=(3, 30))
    scaled = (new - inputs.mean(0)) / inputs.std(0)
    gram = np.linalg.inv(rows.T @ rows + np.eye(30))
    np.testing.assert_allclose(
        found.predict(new)[0], targets.mean() + scaled @ gram @ rows.T @ (targets - targets.mean())
    )
    ratio = found.predict(new)[1] ** 2 / (1 + np.einsum("ij,jk,ik->i", scaled, gram, scaled))
    np.testing.assert_allclose(ratio, ratio[0])


@pytest.mark.parametrize("make", [lambda seed: TreeEnsemble(seed=seed), lambda seed: GaussianProcess()])
def test_others_interpolate_and_repeat(make):
    inputs, _ = data(60, 2)
    targets = np.sin(inputs[:, 0]) * 10
    mean, deviation = make(seed=1).fit(inputs, targets).predict(inputs)
    assert np.abs(mean - targets).mean() < 1.5
    assert (deviation >= 0).all()
    np.testing.assert_array_equal(mean, make(seed=1).fit(inputs, targets).predict(inputs)[0])


def test_choice_follows_the_data():
    inputs, rng = data(120)
    assert stack(inputs, inputs @ [1.0, -2, 3, 0, 1]).name == "ridge"
    steps = np.where(inputs[:, 0] > 4, 5.0, 0.0) * np.where(inputs[:, 1] > 4, 1, -1)
    assert stack(inputs, steps + 0.01 * rng.normal(size=120)).name == "trees"


def test_uncertainty_is_honest_on_unseen_points():
    inputs, rng = data(400)

    def truth(rows):
        return np.abs(rows[:, 0] - 4) * 3 + rows[:, 1] + rng.normal(size=len(rows))

    found = stack(inputs[:200], truth(inputs[:200]))
    mean, deviation = found.predict(inputs[200:])
    score = (truth(inputs[200:]) - mean) / deviation
    assert 0.7 < score.std() < 1.4
    assert found.rank_correlation > 0.8


@pytest.mark.parametrize(
    ("inputs", "targets", "words"),
    [
        (np.ones((1, 2)), np.ones(1), "n >= 2"),
        (np.ones((3, 2)), np.ones(4), r"got \(3, 2\), \(4,\)"),
        (np.ones((3, 2)), np.array([1, np.nan, 2]), "finite numbers only"),
    ],
)
def test_bad_inputs(inputs, targets, words):
    with pytest.raises(SettingError, match=words):
        stack(inputs, targets)


def test_constant_targets():
    inputs, _ = data(20)
    mean, deviation = stack(inputs, np.full(20, 3.0)).predict(inputs)
    np.testing.assert_allclose(mean, 3.0)
    assert np.isfinite(deviation).all()


def matern(first, second, length, varying):
    """The kernel entry by entry."""
    found = np.empty((len(first), len(second)))
    for i, x in enumerate(first):
        for j, y in enumerate(second):
            rho = np.sqrt(5) * np.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / varying) / length
            found[i, j] = (1 + rho + rho**2 / 3) * np.exp(-rho)
    return found


@pytest.mark.parametrize("constant", [False, True])
def test_the_process_is_the_dense_posterior_at_the_likeliest_settings(constant):
    inputs, rng = data(40)
    if constant:
        inputs[:, 2] = 7.0  # does not count
    targets = np.sin(inputs[:, 0]) * 5 + inputs[:, 1] + 0.3 * rng.normal(size=40)
    spread = inputs.std(0)
    spread[spread < 1e-12] = 1.0
    rows, new = (inputs - inputs.mean(0)) / spread, (inputs[:6] + 0.4 - inputs.mean(0)) / spread
    new[:, 2] = 0.0 if constant else new[:, 2]
    y, found = (targets - targets.mean()) / targets.std(), {}
    for length in (0.5, 1.0, 2.0, 4.0):
        for noise in (1e-3, 1e-2, 1e-1, 0.5):
            shape = matern(rows, rows, length, 4 if constant else 5) + noise * np.eye(40)
            size = y @ np.linalg.solve(shape, y) / 40
            cross = matern(new, rows, length, 4 if constant else 5)
            mean = cross @ np.linalg.solve(shape, y)
            doubt = 1 - np.einsum("ij,ji->i", cross, np.linalg.solve(shape, cross.T))
            covariance = size * shape
            likelihood = -0.5 * (y @ np.linalg.solve(covariance, y) + np.linalg.slogdet(2 * np.pi * covariance)[1])
            found[length, noise] = likelihood, mean, np.sqrt(size * doubt)
    (length, noise), (_, mean, deviation) = max(found.items(), key=lambda item: item[1][0])
    process = GaussianProcess().fit(inputs, targets)
    assert (process.length, process.noise) == (length, noise)
    got = process.predict(new * spread + inputs.mean(0))
    np.testing.assert_allclose(got[0], targets.mean() + targets.std() * mean, rtol=1e-6)
    np.testing.assert_allclose(got[1], targets.std() * deviation, rtol=1e-5)


def test_the_process_agrees_with_scikit_learn():
    inputs, _ = data(50, 2)
    targets = np.sin(inputs[:, 0])
    process = GaussianProcess().fit(inputs, targets)
    rows, new = (inputs - inputs.mean(0)) / inputs.std(0), np.array([[0.3, -0.2], [1.0, 1.0]])
    kernel = Matern(process.length * np.sqrt(2), "fixed", nu=2.5)
    peer = GaussianProcessRegressor(kernel, alpha=process.noise, optimizer=None).fit(rows, targets - targets.mean())
    mean = process.predict(new * inputs.std(0) + inputs.mean(0))[0]
    np.testing.assert_allclose(mean, targets.mean() + peer.predict(new), rtol=1e-6)


def test_many_rows_keep_the_best_and_the_newest():
    targets = np.random.default_rng(0).permutation(1000).astype(float)
    kept = kept_rows(targets)
    assert len(kept) == len(set(kept)) == 400
    assert {place for place in range(1000) if targets[place] < 200} <= set(kept)
    rest = [place for place in range(1000) if targets[place] >= 200][-200:]
    assert set(rest) <= set(kept)
    inputs = np.random.default_rng(1).normal(size=(1000, 2))
    whole = GaussianProcess().fit(inputs, targets).predict(inputs[:5])[0]
    np.testing.assert_array_equal(whole, GaussianProcess().fit(inputs[kept], targets[kept]).predict(inputs[:5])[0])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_weights_are_the_best_of_the_simplex(count):
    rng = np.random.default_rng(count)
    for _ in range(20):
        residuals = rng.normal(size=(12, count)) * rng.uniform(0.3, 2, count) + rng.normal(size=(12, 1))
        weights = np.array(_weights(residuals))
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1)
        cut = np.arange(101) / 100
        grid = [w for w in itertools.product(cut, repeat=count) if abs(sum(w) - 1) < 1e-9]
        best = min(float(((residuals @ np.array(w)) ** 2).sum()) for w in grid)
        assert ((residuals @ weights) ** 2).sum() <= best + 1e-3 * (residuals**2).sum()


def test_a_stack_is_the_mixture_of_its_predictors():
    inputs, rng = data(60)
    targets = np.abs(inputs[:, 0] - 4) + inputs[:, 1] + 0.1 * rng.normal(size=60)
    found = stack(inputs, targets)
    assert sum(weight > 0 for weight in found.weights.values()) > 1
    assert found.name == max(found.weights, key=lambda name: found.weights[name])
    parts = {name: found.predictors[name].predict(inputs[:4]) for name in found.predictors}
    for row in range(4):
        mean = sum(found.weights[name] * means[row] for name, (means, _) in parts.items())
        second = sum(found.weights[name] * (s[row] ** 2 + m[row] ** 2) for name, (m, s) in parts.items())
        got, deviation = found.predict(inputs[:4])
        assert got[row] == pytest.approx(mean)
        assert deviation[row] ** 2 == pytest.approx(found.stretch**2 * (second - mean**2) + found.noise**2)


def test_a_stack_is_no_worse_on_held_out_rows_than_its_best():
    inputs, rng = data(90)
    targets = np.where(inputs[:, 0] > 4, 3.0, 0.0) + inputs[:, 1] + 0.1 * rng.normal(size=90)
    found = stack(inputs, targets)
    rows = np.random.default_rng([0, 90]).permutation(90)
    held = [_held_out(make(0), inputs[rows], targets[rows])[0] for make in PREDICTORS.values()]
    mixed = sum(weight * mean for weight, mean in zip(found.weights.values(), held, strict=True))
    assert np.sqrt(((mixed - targets[rows]) ** 2).mean()) < min(found.errors.values())
