"""Where the learning rate of a short word goes."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

from netwright.core.errors import RecipeError
from netwright.core.optimization import Parameterization, make_optimizer, make_schedule
from netwright.core.recipe import Recipe
from netwright.param.mup import shapes_of
from netwright.workshop import change_recipe, training_entries

DIGITS = Recipe(optimizer_settings={"lr": 2e-3}, schedule_settings={"max_lr": 2e-3})
STEPS = 40


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def mup_recipe(**settings: Any) -> Recipe:
    base = json.loads(json.dumps(shapes_of(network(8))))
    return Recipe(
        parameterization="netwright.param:mup",
        parameterization_settings={"base": base, "optimizer": "adam", **settings},
    )


def peaks(recipe: Recipe) -> list[float]:
    """The highest rate that each group has, the lowest group first."""
    model = network(32)
    groups = Parameterization(recipe, model).groups
    optimizer = make_optimizer(recipe, model, groups)
    schedule = make_schedule(recipe, optimizer, STEPS)
    seen = []
    for _ in range(STEPS):
        seen.append([group["lr"] for group in optimizer.param_groups])
        if schedule is not None:
            schedule.step()
    return sorted(max(column) for column in zip(*seen, strict=True))


@pytest.mark.parametrize("key", ["lr", "optimizer.lr"])
@pytest.mark.parametrize(("text", "rate"), [("3e-4", 3e-4), (".1", 0.1), ("1.e-2", 0.01), ("+2", 2.0), ("1", 1.0)])
def test_a_rate_is_also_the_peak(key: str, text: str, rate: float) -> None:
    changed = change_recipe(DIGITS, [f"{key}={text}"])
    assert changed.optimizer_settings == {"lr": rate}
    assert changed.schedule_settings == {"max_lr": rate}


@pytest.mark.parametrize("key", ["lr", "optimizer.lr"])
@pytest.mark.parametrize("text", ["fast", "true", "nan", "inf", "", "[0.1]", "none"])
def test_what_is_no_rate_is_refused(key: str, text: str) -> None:
    with pytest.raises(RecipeError, match="lr must be a number"):
        change_recipe(DIGITS, [f"{key}={text}"])


def test_other_numbers_are_read_in_the_same_way() -> None:
    changed = change_recipe(DIGITS, ["epochs=.5", "clip_norm=+1", "optimizer.eps=1.e-6", "batch_size=32"])
    assert (changed.epochs, changed.clip_norm, changed.batch_size) == (0.5, 1.0, 32)
    assert changed.optimizer_settings == {"lr": 2e-3, "eps": 1e-6}
    assert change_recipe(DIGITS, ["optimizer.line_search=wolfe"]).optimizer_settings["line_search"] == "wolfe"


def test_optimizers_that_choose_their_step_are_trained_once() -> None:
    entries = training_entries(DIGITS, ["sgd", "dog", "sania", "udog"], [0.1, 0.2])
    assert [entry.name for entry in entries] == ["sgd", "sgd", "dog", "sania", "udog"]
    assert [entry.recipe.optimizer_settings for entry in entries[2:]] == [{"lr": 1.0}, {"lr": 1.0}, {}]
    own = Recipe(optimizer="netwright.optim:DoG", optimizer_settings={"average": None}, schedule=None)
    assert training_entries(own, None, [0.1, 0.2])[0].recipe == own
    assert len(training_entries(own, None, [0.1, 0.2])) == 1
    assert change_recipe(DIGITS, ["optimizer=dog", "lr=0.5"]).optimizer_settings == {"lr": 0.5}, "asked for by name"


def test_what_is_set_changes_every_compared_optimizer_that_has_it() -> None:
    changes = ["lr=0.3", "optimizer.weight_decay=0.1", "optimizer.momentum=0.9", "epochs=2"]
    entries = training_entries(DIGITS, ["sgd", "adamw", "dog"], changes=changes)
    assert [dict(entry.recipe.optimizer_settings) for entry in entries] == [
        {"lr": 0.3, "weight_decay": 0.1, "momentum": 0.9},
        {"lr": 0.3, "weight_decay": 0.1},
        {"lr": 1.0, "weight_decay": 0.1},
    ]
    assert [entry.recipe.schedule_settings["max_lr"] for entry in entries] == [0.3, 0.3, 1.0]
    assert [entry.recipe.epochs for entry in entries] == [2, 2, 2]
    (own,) = training_entries(DIGITS, None, changes=changes[:2])
    assert own.recipe == change_recipe(DIGITS, changes[:2])
    with pytest.raises(RecipeError, match=r"optimizer\.momentum=0\.9 changes none of adamw, lion"):
        training_entries(DIGITS, ["adamw", "lion"], changes=changes)
    with pytest.raises(RecipeError, match=r"lr=0\.3 changes none of dog"):
        training_entries(DIGITS, ["dog"], changes=["lr=0.3"])
    with pytest.raises(RecipeError, match="by --lrs and by --set"):
        training_entries(DIGITS, ["sgd"], [0.1], ["lr=0.3"])


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "none"])
def test_the_rates_of_mup_follow_lr_and_keep_their_ratio(schedule: str) -> None:
    start = change_recipe(mup_recipe(), [f"schedule={schedule}"])
    for lr in (1e-3, 1e-2):
        low, high = peaks(change_recipe(start, [f"lr={lr}"]))
        assert high == pytest.approx(lr, rel=0.02)
        assert high / low == pytest.approx(4.0)
    entries = training_entries(start, None, [1e-3, 1e-2])
    assert [peaks(entry.recipe)[1] for entry in entries] == pytest.approx([1e-3, 1e-2], rel=0.02)
    assert [entry.recipe.optimizer_settings["lr"] for entry in entries] == [1e-3, 1e-2]


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_one_peak_for_all_does_not_undo_the_rates_of_mup() -> None:
    given = json.dumps(mup_recipe().parameterization_settings["base"])
    named = ["parameterization=netwright.param:mup", f"parameterization.base={given}"]
    for changes in (
        ["lr=0.02", *named],
        [*named, "lr=0.02"],
        [*named, "schedule=one-cycle", "lr=0.02"],
        ["lr=0.02", *named, "schedule=one-cycle"],
        [*named, "optimizer=adam", "lr=0.02"],
    ):
        assert peaks(change_recipe(DIGITS, changes)) == pytest.approx([0.005, 0.02], rel=0.02)
    before = copy.deepcopy(DIGITS)
    without = change_recipe(DIGITS, ["lr=0.02", *named, "parameterization=none", "parameterization_settings={}"])
    assert peaks(without) == pytest.approx([0.02], rel=0.02)
    assert before == DIGITS


def test_an_optimizer_around_another_takes_the_rate_for_it() -> None:
    for name, within in (("optex", torch.optim.Adam), ("agvm", torch.optim.SGD)):
        plain = change_recipe(DIGITS, [f"optimizer={name}"])
        assert plain.optimizer_settings == {}
        assert plain.schedule_settings == {}, "the peak is the default of the optimizer within"
        recipe = change_recipe(
            DIGITS, [f"optimizer={name}", "lr=0.25", 'optimizer.base_settings={"weight_decay": 0.5}']
        )
        assert recipe.schedule_settings == {"max_lr": 0.25}
        made = make_optimizer(recipe, network(4))
        assert type(made.optimizer) is within
        assert {(group["lr"], group["weight_decay"]) for group in made.param_groups} == {(0.25, 0.5)}
    entries = training_entries(DIGITS, ["optex", "sgd"], [0.1, 0.2])
    assert [entry.recipe.optimizer_settings for entry in entries] == [{"lr": 0.1}, {"lr": 0.2}] * 2
    lion = change_recipe(DIGITS, ["optimizer=optex", "optimizer.base=lion"])
    assert type(make_optimizer(lion, network(4)).optimizer).__name__ == "Lion"
