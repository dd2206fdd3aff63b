"""Activating while pruning: the choice against sorting by hand, the rounds against NumPy, share 0 against magnitude."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_reference import RATE, gradients, keep_largest, matrices, network, numbers, put, regression
from torch import nn

from netwright.compress.activating_pruner import ActivatingPruner, _survivors
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.testing import check_transform


def chosen(before: np.ndarray, after: np.ndarray, alive: list[int], left: int, share: float) -> list[int]:
    """Which indices stay, by sorting lists."""
    gone = len(alive) - left
    by_rule = round(share * gone) if any(after[at] != before[at] for at in alive) else 0
    kept = sorted(alive, key=lambda at: -abs(after[at]))[: len(alive) - (gone - by_rule)]
    negative = sorted((at for at in kept if after[at] < 0), key=lambda at: abs(after[at] - before[at]))
    kept = [at for at in kept if at not in negative[:by_rule]]
    return sorted(sorted(kept, key=lambda at: -abs(after[at]))[:left])


@settings(max_examples=200)
@given(st.integers(2, 40), st.floats(0, 0.99), st.integers(0, 10_000), st.data())
def test_choice_is_that_of_sorting(size, share, seed, data) -> None:
    generator = np.random.default_rng(seed)
    before, after = generator.normal(size=(2, size))
    alive = generator.random(size) < 0.8
    alive[:2] = True
    left = data.draw(st.integers(1, int(alive.sum())))
    found = _survivors(torch.tensor(before), torch.tensor(after), torch.tensor(alive), left, share)
    assert found.nonzero().flatten().tolist() == chosen(before, after, np.flatnonzero(alive).tolist(), left, share)


def test_rule_takes_the_negative_weight_that_hardly_moved() -> None:
    before = torch.tensor([1.0, -2.0, 3.0, -4.0, 0.1])
    after = torch.tensor([1.0, -2.5, 3.0, -4.1, 0.2])
    alive = torch.ones(5, dtype=torch.bool)
    assert _survivors(before, after, alive, 3, 0.5).tolist() == [True, True, True, False, False]
    assert _survivors(before, after, alive, 3, 0.0).tolist() == [False, True, True, True, False]
    assert _survivors(before, after, alive, 4, 0.99).tolist() == [True, True, True, False, True]


def test_magnitude_takes_the_rest_where_few_are_negative() -> None:
    before, after = torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, -4.0])
    found = _survivors(before, after, torch.ones(4, dtype=torch.bool), 1, 0.9)
    assert found.tolist() == [False, False, True, False]


@pytest.mark.parametrize("rewind", [True, False])
def test_rounds_are_the_naive_ones(rewind) -> None:
    task = regression()
    found = ActivatingPruner(0.8, share=0.3, rounds=3, rewind=rewind)(task.model, task, budget=8)
    first = numbers(task.model)
    params = [value.copy() for value in first]
    alive = list(range(56))
    for number in range(4):
        before = matrices(params)
        mask = np.isin(np.arange(56), alive)
        for _ in range(2):
            slopes = gradients(params, task)
            put(params, matrices(params) - RATE * matrices(slopes) * mask)
            params[1], params[3] = params[1] - RATE * slopes[1], params[3] - RATE * slopes[3]
        if number < 3:
            after = matrices(params)
            alive = chosen(before, after, alive, round(0.2 ** ((number + 1) / 3) * 56), 0.3)
            params = [value.copy() for value in first] if rewind else params
            put(params, matrices(params) * np.isin(np.arange(56), alive))
    for left, right in zip(numbers(found), params, strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-12)


def test_one_round_without_training_is_magnitude() -> None:
    task = regression()
    whole = matrices(numbers(task.model))
    result = matrices(numbers(ActivatingPruner(0.75, rounds=4)(task.model, task, budget=0)))
    np.testing.assert_array_equal(result, whole * keep_largest(whole, 14))


def test_own_budget_is_the_recipe_in_every_round() -> None:
    task = regression()
    free = ActivatingPruner(0.5, rounds=2)(task.model, task)
    told = ActivatingPruner(0.5, rounds=2)(task.model, task, budget=12)
    for left, right in zip(free.parameters(), told.parameters(), strict=True):
        assert torch.equal(left, right)


def test_rewinding_restores_statistics_too() -> None:
    task = regression()
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).double().eval()
    result = ActivatingPruner(0.5, rounds=3)(model, task, budget=4)
    assert int(result[1].num_batches_tracked) == 1


def test_conforms() -> None:
    check_transform(lambda: ActivatingPruner(0.8, rounds=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, r"ratio must lie in \(0, 1\)"),
        ({"share": 1.0}, r"share must lie in \[0, 1\)"),
        ({"rounds": 0}, "rounds must be a positive integer"),
        ({"rewind": 1}, "rewind must be true or false, got 1"),
        ({"exclude": "fc"}, "exclude must be a sequence of names"),
    ],
)
def test_refuses_settings(settings, message) -> None:
    with pytest.raises(TransformError, match=f"ActivatingPruner.{message}"):
        ActivatingPruner(**settings)


def test_refuses_models_and_tasks() -> None:
    task = regression()
    with pytest.raises(NothingToPruneError, match="no weight matrix or kernel"):
        ActivatingPruner()(nn.BatchNorm1d(3), task)
    with pytest.raises(TransformError, match="exclude names 'head'"):
        ActivatingPruner(exclude=["head"])(task.model, task)
    with pytest.raises(TransformError, match="trains by its own fit="):
        ActivatingPruner()(task.model, dataclasses.replace(task, fit=lambda model, **_: model))
    broken = network()
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(TransformError, match="values that are not finite"):
        ActivatingPruner()(broken, task)
