"""Predictors against dense linear algebra and held-out truth."""

import numpy as np
import pytest

from netwright.core.errors import SettingError
from netwright.search import BayesianRidge, SupportVectors, TreeEnsemble, choose


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


@pytest.mark.parametrize("make", [TreeEnsemble, SupportVectors])
def test_others_interpolate_and_repeat(make):
    inputs, _ = data(60, 2)
    targets = np.sin(inputs[:, 0]) * 10
    mean, deviation = make(seed=1).fit(inputs, targets).predict(inputs)
    assert np.abs(mean - targets).mean() < 1.5
    assert (deviation >= 0).all()
    np.testing.assert_array_equal(mean, make(seed=1).fit(inputs, targets).predict(inputs)[0])


def test_choice_follows_the_data():
    inputs, rng = data(120)
    assert choose(inputs, inputs @ [1.0, -2, 3, 0, 1]).name == "ridge"
    steps = np.where(inputs[:, 0] > 4, 5.0, 0.0) * np.where(inputs[:, 1] > 4, 1, -1)
    assert choose(inputs, steps + 0.01 * rng.normal(size=120)).name == "trees"


def test_uncertainty_is_honest_on_unseen_points():
    inputs, rng = data(400)

    def truth(rows):
        return np.abs(rows[:, 0] - 4) * 3 + rows[:, 1] + rng.normal(size=len(rows))

    found = choose(inputs[:200], truth(inputs[:200]))
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
        choose(inputs, targets)


def test_constant_targets():
    inputs, _ = data(20)
    mean, deviation = choose(inputs, np.full(20, 3.0)).predict(inputs)
    np.testing.assert_allclose(mean, 3.0)
    assert np.isfinite(deviation).all()
