"""Every optimizer, named in a recipe, drives the one training loop."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.score import r2
from netwright.core.task import Task
from netwright.optim import available
from netwright.workshop.training_settings import with_optimizer

LEAST = {"lion": 1e-2, "adadelta": 1.0, "sgd": 0.1, "mfac": 1e-3, "diffgrad": 1e-2, "optimistic-amsgrad": 1e-2}
LEAST["agvm"] = LEAST["sgd"]


def task() -> Task:
    generator = torch.Generator().manual_seed(0)

    def part(count: int) -> TensorDataset:
        inputs = torch.randn(count, 4, generator=generator)
        return TensorDataset(inputs, (inputs[:, :1] + inputs[:, 1:2] * 0.5).tanh())

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))

    return Task("regression", network, Data(part(512), part(128), part(64)), nn.functional.mse_loss, r2)


@pytest.mark.parametrize("name", available())
def test_it_trains_by_a_recipe(name: str) -> None:
    record, found = available()[name], task()
    recipe = Recipe(schedule=None, epochs=20 if name == "dog" else 6, batch_size=64)  # DoG starts with tiny steps
    if record.lr_free:
        recipe = with_optimizer(recipe, name)
    else:
        recipe = with_optimizer(recipe, name, LEAST.get(name, 1.0 if record.closure == "outputs" else 1e-2))
    model = found.build(seed=0)
    before = evaluate(model, found, "val")
    result = fit(model, found, recipe, seed=0)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert result.steps == 8 * recipe.epochs
    after = evaluate(result.model, found, "val")
    assert after == pytest.approx(result.history[-1].val_score, rel=1e-6)  # which was taken where it was trained
    assert after > before + 0.3 * (1 - before)


@pytest.mark.parametrize("name", available())
def test_it_trains_by_the_default_recipe(name: str) -> None:
    found = task()
    recipe = with_optimizer(Recipe(epochs=1), name)
    model = found.build(seed=0)
    before = [param.detach().clone() for param in model.parameters()]
    result = fit(model, found, recipe, seed=0)
    assert result.steps == 8
    for start, end in zip(before, result.model.parameters(), strict=True):
        assert bool(end.isfinite().all())
        assert not torch.equal(start, end)
    rates = [record.lr for record in result.history]
    assert recipe.schedule is None or rates[-1] < 0.1 * max(rates)
