"""Schedules over every optimizer: what they move, and what they leave as it was set."""

from typing import Any

import pytest
import torch
from torch import nn

from netwright.core.errors import RecipeError
from netwright.core.optimization import make_optimizer, make_schedule
from netwright.core.recipe import Recipe
from netwright.optim import available
from netwright.workshop.training_settings import change_recipe, with_optimizer

STEPS = 20

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of")  # the optimizers take no steps here


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def path(recipe: Recipe) -> list[dict[str, Any]]:
    """The settings of the optimizer's first group in every iteration."""
    optimizer = make_optimizer(recipe, network())
    schedule = make_schedule(recipe, optimizer, STEPS)
    seen = []
    for _ in range(STEPS):
        seen.append(dict(optimizer.param_groups[0]))
        if schedule is not None:
            schedule.step()
    return seen


@pytest.mark.parametrize("name", available())
def test_the_default_schedule_moves_every_optimizers_rate(name: str) -> None:
    recipe = with_optimizer(Recipe(), name)
    rates = [group.get("lr") for group in path(recipe)]
    if recipe.schedule is None:
        assert name == "udog"
        assert rates == [None] * STEPS
    else:
        peak = make_optimizer(recipe, network()).param_groups[0]["lr"]
        assert rates[0] == pytest.approx(peak / 25)
        assert max(rates) == pytest.approx(peak, rel=0.02)
        assert rates[-1] < 0.01 * peak


@pytest.mark.parametrize(
    ("changes", "setting", "kept"),
    [
        (["optimizer.betas=[0.5,0.9]"], "betas", (0.5, 0.9)),
        (["optimizer=diffgrad", "optimizer.betas=[0.5,0.9]"], "betas", (0.5, 0.9)),
        (["optimizer=sgd"], "momentum", 0),
        (["optimizer=sgd", "optimizer.momentum=0.0"], "momentum", 0.0),
        (["optimizer=sgd", "optimizer.momentum=0.3"], "momentum", 0.3),
        (["optimizer=mfac"], "momentum", 0.0),
        (["optimizer=exact-gauss-newton"], "momentum", 0.0),
        (["optimizer=rmsprop"], "momentum", 0),
    ],
)
def test_a_momentum_that_was_set_stays(changes: list[str], setting: str, kept: Any) -> None:
    seen = path(change_recipe(Recipe(), changes))
    assert all((tuple(group[setting]) if setting == "betas" else group[setting]) == kept for group in seen)


def test_a_momentum_of_an_optimizer_within_stays() -> None:
    settings = {"base_settings": {"lr": 1e-3, "betas": [0.5, 0.9]}}
    seen = path(Recipe(optimizer="netwright.optim:OptEx.over", optimizer_settings=settings))
    assert all(tuple(group["betas"]) == (0.5, 0.9) for group in seen)


def test_a_momentum_that_was_not_set_is_moved_as_torch_does() -> None:
    for recipe, read in (
        (Recipe(), lambda group: group["betas"][0]),
        (change_recipe(Recipe(), ["optimizer=kfac"]), lambda group: group["momentum"]),
    ):
        values = [read(group) for group in path(recipe)]
        assert values[0] == pytest.approx(0.95)
        assert min(values) == pytest.approx(0.85, abs=2e-3)
        assert values[-1] > 0.94


def test_what_the_recipe_says_of_the_momentum_holds() -> None:
    asked = change_recipe(Recipe(), ["optimizer=sgd", "optimizer.momentum=0.3", "schedule.cycle_momentum=true"])
    assert path(asked)[0]["momentum"] == pytest.approx(0.95)
    unasked = change_recipe(Recipe(), ["schedule.cycle_momentum=false"])
    assert all(group["betas"] == (0.9, 0.999) for group in path(unasked))
    with pytest.raises(RecipeError, match="momentum"):
        path(change_recipe(Recipe(), ["optimizer=dog", "schedule.cycle_momentum=true"]))


@pytest.mark.parametrize("schedule", ["OneCycleLR", "CosineAnnealingLR", "LinearLR"])
def test_without_a_rate_there_is_nothing_to_schedule(schedule: str) -> None:
    recipe = Recipe(
        optimizer="netwright.optim:UDoG", optimizer_settings={}, schedule=f"torch.optim.lr_scheduler:{schedule}"
    )
    with pytest.raises(RecipeError, match=r"UDoG has no learning rate for .*Set schedule=None"):
        path(recipe)
    assert len(path(recipe.replace(schedule=None))) == STEPS
