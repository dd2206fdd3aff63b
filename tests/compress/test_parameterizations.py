"""Methods that work on weights as they are: without a parameterization of the recipe, and of the model."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from netwright.compress import (
    GETA,
    HESSO,
    OTO,
    ActivatingPruner,
    Codebooks,
    GlobalSparseMomentum,
    GroupEnvelope,
    MetaAug,
    SparseRecipe,
    StableKD,
    TrainableGate,
    TrilateralKD,
    _training,
)
from netwright.compress._weights import FlatWeights
from netwright.core.fit import StepHook
from netwright.core.task import Task
from netwright.core.transform import Chain
from netwright.testing import small_tasks

GEOMETRIC, CONDITIONED = "netwright.param:geometric_parameterization", "netwright.param:weight_conditioning"
HALF = {"method": "netwright.compress:Prune", "settings": {"ratios": 0.5}}
WHOLE = [
    SparseRecipe(0.95),
    GlobalSparseMomentum(0.9),
    ActivatingPruner(0.9, rounds=2),
    OTO(0.5),
    HESSO(0.5),
    GETA(0.5),
    Codebooks(3),
    StableKD(HALF),
    MetaAug(calibration_items=16),
    TrilateralKD(HALF, outer_items=16),
]
PRUNERS = [SparseRecipe(0.9), GlobalSparseMomentum(0.9), ActivatingPruner(0.9, rounds=2)]


def task_with(parameterization: str | None) -> Task:
    task = small_tasks()[1]
    assert task.recipe is not None
    return dataclasses.replace(task, recipe=task.recipe.replace(parameterization=parameterization))


def named(method: object) -> str:
    return type(method).__name__


@pytest.mark.parametrize("parameterization", [GEOMETRIC, CONDITIONED])
@pytest.mark.parametrize("method", WHOLE, ids=named)
def test_a_parameterization_of_the_recipe_changes_nothing(method, parameterization):
    plain, other = task_with(None), task_with(parameterization)
    wanted, found = (method(each.model, each, budget=1).state_dict() for each in (plain, other))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


@pytest.mark.parametrize("method", [GroupEnvelope(0.5), TrainableGate(0.5)], ids=named)
def test_only_the_training_after_the_cut_has_it(method, monkeypatch):
    seen: list[tuple[str | None, bool]] = []
    fit = _training.fit

    def watched(model, task, recipe, *, hook=None, **more):
        seen.append((recipe.parameterization, hook is not None))
        return fit(model, task, recipe, hook=hook, **more)

    monkeypatch.setattr(_training, "fit", watched)
    task = task_with(GEOMETRIC)
    method(task.model, task, budget=2)
    assert seen == [(None, True), (GEOMETRIC, False)]


def test_a_method_may_name_its_own(monkeypatch):
    seen: list[str | None] = []

    def fit(model, task, recipe, **more):
        seen.append(recipe.parameterization)
        return SimpleNamespace(model=model)

    monkeypatch.setattr(_training, "fit", fit)
    for hook, changes in ((None, {}), (StepHook(), {}), (StepHook(), {"parameterization": CONDITIONED})):
        _training.train("test", nn.Linear(1, 1), task_with(GEOMETRIC), epochs=1, seed=0, hook=hook, **changes)
    assert seen == [GEOMETRIC, None, CONDITIONED]


@pytest.mark.parametrize("budget", [0, 1])
@pytest.mark.parametrize("method", PRUNERS, ids=named)
def test_pruning_after_codebooks_removes_weights(method, budget):
    task = task_with(None)
    sparse = Chain([Codebooks(3), method])(task.model, task, budget=budget)
    assert not any(parametrize.is_parametrized(part) for part in sparse.modules())
    weights = FlatWeights(sparse)
    assert set(weights.parameters) == {"0.weight", "2.weight", "4.weight"}
    assert int((weights.read() != 0).sum()) == round(0.1 * weights.size)
