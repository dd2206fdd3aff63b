"""Global sparse momentum: against the update written out in float64, and against SGD where every weight is chosen."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from sparse_reference import gradients, keep_largest, matrices, network, numbers, put, regression
from torch import nn

from netwright.compress import global_sparse_momentum as module
from netwright.compress._weights import FlatWeights
from netwright.compress.global_sparse_momentum import GlobalSparseMomentum
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.fit import fit
from netwright.testing import check_transform


def one_cycle(step: int, total: int, high: float) -> float:
    """The learning rate of a one-cycle schedule: cosine from a 25th up, and down to a 10,000th of that."""
    start, top = high / 25, 0.3 * total - 1

    def between(a: float, b: float, share: float) -> float:
        return b + (a - b) / 2 * (1 + math.cos(math.pi * share))

    if step <= top:
        return between(start, high, step / top)
    return between(high, start / 1e4, (step - top) / (total - 1 - top))


def naive(task, *, ratio: float, rate: float, momentum: float, decay: float, steps: int) -> list[np.ndarray]:
    params = numbers(task.model)
    size = matrices(params).size
    chosen = round((1 - ratio) * size)
    buffer = np.zeros(size)
    bias_buffers = [np.zeros_like(params[1]), np.zeros_like(params[3])]
    for step in range(steps):
        found = gradients(params, task)
        weights, slope = matrices(params), matrices(found)
        order = np.argsort(-np.abs(weights * slope))
        gate = np.zeros(size)
        gate[order[:chosen]] = 1.0
        alpha = one_cycle(step, steps, rate)
        buffer = momentum * buffer + decay * weights + gate * slope
        put(params, weights - alpha * buffer)
        for number, at in enumerate((1, 3)):
            bias_buffers[number] = momentum * bias_buffers[number] + found[at]
            params[at] = params[at] - alpha * bias_buffers[number]
    weights = matrices(params)
    put(params, weights * keep_largest(weights, chosen))
    return params


@pytest.mark.parametrize(("ratio", "momentum", "decay"), [(0.6, 0.9, 0.05), (0.9, 0.5, 0.0), (0.3, 0.0, 0.2)])
def test_training_is_the_naive_update(ratio, momentum, decay) -> None:
    task = regression()
    method = GlobalSparseMomentum(ratio, learning_rate=0.1, momentum=momentum, weight_decay=decay)
    found = numbers(method(task.model, task, budget=11))
    wanted = naive(task, ratio=ratio, rate=0.1, momentum=momentum, decay=decay, steps=11)
    for left, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-12)


def test_all_weights_chosen_is_sgd_with_momentum_and_weight_decay() -> None:
    task = regression(
        optimizer_settings={"lr": 0.1, "momentum": 0.98, "weight_decay": 0.03}, schedule=None, batch_size=5
    )
    mine = network()
    weights = FlatWeights(mine)
    fit(mine, task, validate=False, hook=module._Selection(mine, weights, weights.size, 0.03))
    theirs = network()
    groups = [[theirs[0].weight, theirs[2].weight], [theirs[0].bias, theirs[2].bias]]
    optimizer = torch.optim.SGD(
        [{"params": groups[0], "weight_decay": 0.03}, {"params": groups[1]}], lr=0.1, momentum=0.98
    )
    inputs, targets = task.data.train.tensors
    order = torch.Generator().manual_seed(0)
    for _ in range(4):
        shuffled = torch.randperm(len(inputs), generator=order)
        for index in (shuffled[:5], shuffled[5:10]):
            optimizer.zero_grad()
            task.loss(theirs(inputs[index]), targets[index]).backward()
            optimizer.step()
    for left, right in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


def test_weight_never_chosen_shrinks_to_what_is_asked_for() -> None:
    task = regression()
    inputs = task.data.train.tensors[0]
    task = dataclasses.replace(task, model=network())
    inputs[:, 4] = 0.0  # the weights that read it have no gradient
    method = GlobalSparseMomentum(0.5, learning_rate=0.01, momentum=0.5, leftover=0.02)
    model = copy.deepcopy(task.model)
    weights = FlatWeights(model)
    hook = module._Selection(model, weights, weights.size, 0.0)
    decay = method._decay(400)
    settings = {"lr": 0.01, "momentum": 0.5, "weight_decay": decay}
    schedule = {"max_lr": 0.01, "cycle_momentum": False}
    recipe = task.recipe.replace(
        optimizer_settings=settings,
        schedule="torch.optim.lr_scheduler:OneCycleLR",
        schedule_settings=schedule,
        epochs=400,
    )
    fit(model, task, recipe, validate=False, hook=hook)
    left = (model[0].weight[:, 4] / task.model[0].weight[:, 4]).detach().log() / math.log(0.02)
    torch.testing.assert_close(left, torch.ones_like(left), rtol=0, atol=0.05)


def test_exact_number_of_weights_stays_over_all_layers() -> None:
    task = regression()
    result = GlobalSparseMomentum(0.8)(task.model, task, budget=3)
    assert sum(int((value != 0).sum()) for value in result.parameters() if value.ndim > 1) == round(0.2 * 56)
    assert type(result) is nn.Sequential


def test_no_budget_prunes_by_magnitude() -> None:
    task = regression()
    result = matrices(numbers(GlobalSparseMomentum(0.75)(task.model, task, budget=0)))
    whole = matrices(numbers(task.model))
    np.testing.assert_array_equal(result, whole * keep_largest(whole, 14))


def test_excluded_layers_stay_dense() -> None:
    task = regression()
    result = GlobalSparseMomentum(0.5, exclude=["2"])(task.model, task, budget=3)
    assert int((result[2].weight == 0).sum()) == 0
    assert int((result[0].weight == 0).sum()) == 35 - round(0.5 * 35)


def test_conforms() -> None:
    check_transform(lambda: GlobalSparseMomentum(0.8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0}, r"ratio must lie in \(0, 1\), got 0. 0.5 removes half"),
        ({"ratio": 1.0}, r"ratio must lie in \(0, 1\)"),
        ({"ratio": float("nan")}, r"ratio must lie in \(0, 1\)"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number, greater than 0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number, at least 0"),
        ({"leftover": 0.0}, r"leftover must lie in \(0, 1\)"),
        ({"exclude": "fc"}, r"exclude must be a sequence of names; write \('fc',\)"),
    ],
)
def test_refuses_settings(settings, message) -> None:
    with pytest.raises(TransformError, match=f"GlobalSparseMomentum.{message}"):
        GlobalSparseMomentum(**settings)


def test_refuses_models_and_tasks() -> None:
    task = regression()
    with pytest.raises(NothingToPruneError, match="no weight matrix or kernel"):
        GlobalSparseMomentum()(nn.BatchNorm1d(3), task)
    with pytest.raises(TransformError, match="exclude names 'head', which Sequential does not have"):
        GlobalSparseMomentum(exclude=["head"])(task.model, task)
    own = dataclasses.replace(task, fit=lambda model, **_: model)
    with pytest.raises(TransformError, match="trains by its own fit="):
        GlobalSparseMomentum()(task.model, own)
    with pytest.raises(TransformError, match="needs the gradients of a loss"):
        GlobalSparseMomentum()(task.model, dataclasses.replace(own, loss=None))
    broken = network()
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(TransformError, match=r"0.weight has 1 values that are not finite"):
        GlobalSparseMomentum()(broken, task)
