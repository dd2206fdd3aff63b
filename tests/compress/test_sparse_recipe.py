"""The sparse recipe: against its updates written out in float64, and against one-shot pruning with fine-tuning."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_reference import RATE, gradients, keep_largest, matrices, network, numbers, put, regression
from torch import nn

from netwright.compress._sparse_recipe_masks import largest, magnitude_mask, shared_epochs
from netwright.compress._weights import FlatWeights
from netwright.compress.sparse_recipe import SparseRecipe
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.fit import fit
from netwright.testing import check_transform


def naive(task, wanted: list[float], ratio: float, layers: bool = False) -> list[np.ndarray]:
    """Descent with the zeros that ``wanted`` asks for in each iteration; a new mask whenever that changes."""
    params = numbers(task.model)
    cut = params[0].size

    def chosen(vector: np.ndarray, share: float) -> np.ndarray:
        parts = [vector[:cut], vector[cut:]] if layers else [vector]
        return np.concatenate([keep_largest(part, max(1, round((1 - share) * part.size))) for part in parts])

    last, mask = None, None
    for share in wanted:
        if share != last:
            last, mask = share, chosen(matrices(params), share) if share else np.ones(56, dtype=bool)
        put(params, matrices(params) * mask)
        found = gradients(params, task)
        put(params, matrices(params) - RATE * matrices(found) * mask)
        params[1], params[3] = params[1] - RATE * found[1], params[3] - RATE * found[3]
    put(params, matrices(params) * chosen(matrices(params), ratio))
    return params


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_gradual_masks_are_the_naive_ones(scope) -> None:
    task = regression()
    method = SparseRecipe(0.8, "gradual", scope, start=0.25, stop=0.75, updates=3)
    # twelve iterations: dense, then two of each of three steps of 0.8 (1 - (1 - x)^3), then 0.8
    rises = [0.8 * (1 - (1 - third / 3) ** 3) for third in (0, 1, 2)]
    wanted = [0.0] * 3 + [rise for rise in rises for _ in range(2)] + [0.8] * 3
    for left, right in zip(
        numbers(method(task.model, task, budget=12)), naive(task, wanted, 0.8, scope == "layer"), strict=True
    ):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-12)


def test_alternating_masks_are_the_naive_ones() -> None:
    task = regression()
    method = SparseRecipe(0.7, "alternating", start=0.2, stop=0.8, updates=2)
    wanted = [0.0] * 4 + [0.7] * 3 + [0.0] * 3 + [0.7] * 3 + [0.0] * 3 + [0.7] * 4
    for left, right in zip(numbers(method(task.model, task, budget=20)), naive(task, wanted, 0.7), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-12)


def test_all_at_once_is_pruning_and_fine_tuning() -> None:
    task = regression(batch_size=4)
    method = SparseRecipe(0.6, stop=1e-9, updates=1)
    found = method(task.model, task, budget=5, seed=7)
    pruned = SparseRecipe(0.6)(task.model, task, budget=0)
    tuned = fit(pruned, task, task.recipe.replace(epochs=5, keep_zeros=True), seed=7, validate=False).model
    for left, right in zip(found.parameters(), tuned.parameters(), strict=True):
        assert torch.equal(left, right)


def test_extended_training_is_what_is_spent() -> None:
    task = regression()
    assert SparseRecipe(extension=2.5).epochs(task) == 10.0
    free = SparseRecipe(0.5, extension=2.5)(task.model, task)
    told = SparseRecipe(0.5)(task.model, task, budget=10)
    for left, right in zip(free.parameters(), told.parameters(), strict=True):
        assert torch.equal(left, right)
    words = []
    SparseRecipe(0.5, extension=2.5)(task.model, task, progress=lambda fraction, what: words.append(what))
    assert "10 epochs, 2.5 times the dense recipe's" in words[0]


def test_learning_rate_scales_the_recipe() -> None:
    task = regression()
    doubled = regression(optimizer_settings={"lr": 2 * RATE})
    for left, right in zip(
        SparseRecipe(0.5, learning_rate=2.0)(task.model, task, budget=3).parameters(),
        SparseRecipe(0.5)(task.model, doubled, budget=3).parameters(),
        strict=True,
    ):
        assert torch.equal(left, right)


@given(st.floats(0.01, 0.99), st.integers(1, 30), st.integers(1, 200), st.sampled_from([(0.0, 0.5), (0.2, 0.9)]))
def test_gradual_sparsity_rises_to_the_ratio(ratio, updates, total, span) -> None:
    method = SparseRecipe(ratio, start=span[0], stop=span[1], updates=updates)
    found = [method.sparsity(step, total) for step in range(total + 1)]
    assert found == sorted(found)
    assert found[-1] == ratio
    assert len(set(found)) <= updates + 1


@given(st.integers(1, 40), st.data())
def test_largest_keeps_exactly_so_many(count, data) -> None:
    values = torch.tensor(data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), min_size=1, max_size=40)))
    mask = largest(values, count)
    assert int(mask.sum()) == min(count, len(values))
    if bool(mask.any()) and not bool(mask.all()):
        assert values[mask].min() >= values[~mask].max()


@given(st.floats(0, 40), st.lists(st.floats(0.01, 5), min_size=1, max_size=6), st.integers(1, 15))
def test_shared_epochs_never_exceed_the_budget(epochs, shares, batch) -> None:
    task = regression(batch_size=batch)
    parts = shared_epochs(task, epochs, shares)
    steps = max(1, 12 // batch)
    assert sum(parts) <= epochs + 1e-9
    assert sum(parts) > epochs - 1 / steps - 1e-9
    assert all(abs(part * steps - round(part * steps)) < 1e-9 for part in parts)


def test_layer_scope_leaves_a_weight_in_every_layer() -> None:
    model = network()
    mask = magnitude_mask(FlatWeights(model), 0.99, "layer")
    assert int(mask[:35].sum()) == int(mask[35:].sum()) == 1


@pytest.mark.parametrize(
    "method", [SparseRecipe(0.8), SparseRecipe(0.8, "alternating", "layer", updates=2)], ids=["gradual", "alternating"]
)
def test_conforms(method) -> None:
    check_transform(lambda: method)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1}, r"ratio must lie in \(0, 1\)"),
        ({"schedule": "cosine"}, "schedule must be 'gradual' or 'alternating', got 'cosine'"),
        ({"scope": "row"}, "scope must be 'global' or 'layer'"),
        ({"extension": 0}, "extension must be a finite number, greater than 0"),
        ({"start": 1.0}, r"start must lie in \[0, 1\)"),
        ({"stop": 0.0}, r"stop must lie in \(0, 1\)"),
        ({"start": 0.5, "stop": 0.5}, "stop must be above start=0.5, got 0.5"),
        ({"updates": 0}, "updates must be a positive integer"),
        ({"learning_rate": float("inf")}, "learning_rate must be a finite number"),
        ({"exclude": "fc"}, "exclude must be a sequence of names"),
    ],
)
def test_refuses_settings(settings, message) -> None:
    with pytest.raises(TransformError, match=f"SparseRecipe.{message}"):
        SparseRecipe(**settings)


def test_refuses_models_and_tasks() -> None:
    task = regression()
    with pytest.raises(NothingToPruneError, match="no weight matrix or kernel"):
        SparseRecipe()(nn.BatchNorm1d(3), task)
    with pytest.raises(TransformError, match="exclude names 'head'"):
        SparseRecipe(exclude=["head"])(task.model, task)
    with pytest.raises(TransformError, match="trains by its own fit="):
        SparseRecipe()(task.model, dataclasses.replace(task, fit=lambda model, **_: model))
    broken = network()
    broken[2].bias.data[0] = float("inf")
    with pytest.raises(TransformError, match=r"2.bias has 1 values that are not finite"):
        SparseRecipe()(broken, task)
