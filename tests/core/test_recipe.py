"""Recipes as plain data."""

import dataclasses
import functools
import json
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netwright.core.errors import NetwrightError, RecipeError
from netwright.core.optimization import (
    Parameterization,
    make_average,
    make_clip,
    make_optimizer,
    make_penalty,
    make_schedule,
)
from netwright.core.recipe import Recipe, resolve

POSITIVE = st.floats(1e-6, 1e6)
SHARE = st.floats(0, 1)
VALUES = st.booleans() | st.integers(-99, 99) | POSITIVE | st.lists(SHARE, max_size=2)
PLAIN = st.dictionaries(st.text(max_size=6), VALUES)
RECIPES = st.builds(
    Recipe,
    optimizer=st.text(max_size=10),
    optimizer_settings=PLAIN,
    schedule=st.none() | st.text(max_size=10),
    schedule_settings=PLAIN,
    batch_size=st.integers(1, 10**6),
    epochs=POSITIVE,
    clip_norm=st.none() | POSITIVE,
    average=st.none() | st.floats(0.01, 0.999),
    precision=st.sampled_from(["float32", "bfloat16"]),
    distill_weight=SHARE,
    distill_temperature=POSITIVE,
)


@given(RECIPES)
@settings(max_examples=100, deadline=None)
def test_a_recipe_round_trips_through_json(recipe: Recipe) -> None:
    text = recipe.to_json()
    assert Recipe.from_json(text) == recipe
    assert set(json.loads(text)) == {field.name for field in dataclasses.fields(Recipe)}


def test_a_recipe_from_a_few_settings_has_the_others_by_default() -> None:
    assert Recipe.from_json('{"epochs": 3}') == Recipe(epochs=3)
    assert Recipe.from_json("{}") == Recipe()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("batch_size", 0),
        ("batch_size", -3),
        ("batch_size", 1.5),
        ("batch_size", True),
        ("optimizer", 3),
        ("optimizer", None),
        ("optimizer_settings", [1]),
        ("schedule", 3),
        ("schedule_settings", None),
        ("average_method", None),
        ("penalty_settings", "lr"),
        ("epochs", 0),
        ("epochs", -1.0),
        ("epochs", math.inf),
        ("epochs", math.nan),
        ("clip_norm", 0.0),
        ("clip_norm", math.nan),
        ("average", 0.0),
        ("average", 1.0),
        ("precision", "float8"),
        ("distill_weight", -0.1),
        ("distill_weight", 1.1),
        ("distill_weight", math.nan),
        ("distill_temperature", 0.0),
        ("distill_temperature", math.inf),
    ],
)
def test_an_impossible_setting_is_named_with_its_value(setting: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"Recipe\.{setting} must be .*got {re.escape(repr(value))}"):
        Recipe(**{setting: value})
    with pytest.raises(RecipeError, match=setting):
        Recipe().replace(**{setting: value})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "must be a JSON object"),
        ("[]", "must be a JSON object, got list"),
        ("3", "must be a JSON object, got int"),
        ('{"epoch": 3}', "no setting epoch. Known are .*epochs"),
        ('{"epochs": -3}', r"Recipe\.epochs must be"),
        ('{"optimizer": 3}', r"Recipe\.optimizer must be a string, got 3"),
    ],
)
def test_text_that_is_no_recipe_is_refused(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.from_json(text)


def test_replace_leaves_the_original() -> None:
    recipe = Recipe()
    assert recipe.replace(epochs=2.5).epochs == 2.5
    assert recipe == Recipe()
    with pytest.raises(RecipeError, match="no such setting"):
        recipe.replace(epoch=2)


def test_resolve_finds_nested_names() -> None:
    assert resolve("torch.optim:AdamW") is torch.optim.AdamW
    assert resolve("torch:nn.functional.relu") is torch.nn.functional.relu


@pytest.mark.parametrize(
    "path",
    ["torch.optim.AdamW", ":AdamW", "torch.optim:", "", "no.such:Thing", "torch.optim:Adamant", "torch.optim:SGD.x"],
)
def test_a_path_that_leads_nowhere_is_named(path: str) -> None:
    with pytest.raises(NetwrightError) as caught:
        resolve(path)
    assert repr(path) in str(caught.value)


@pytest.mark.parametrize("name", ["total_steps", "T_max", "total_iters"])
def test_lengths_in_iterations_change_with_the_epochs(name: str) -> None:
    recipe = Recipe(epochs=8, schedule_settings={"max_lr": 0.8, name: 160})
    assert recipe.lasting(2.0) == recipe.replace(epochs=2.0, schedule_settings={"max_lr": 0.8, name: 40})
    assert recipe.lasting(32.0).schedule_settings[name] == 640
    assert recipe.lasting(8) == recipe
    assert recipe.lasting(0.01).schedule_settings[name] == 1


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("step_size", 30, 8),
        ("step_size_up", 100, 25),
        ("step_size_down", 2, 1),
        ("T_0", 40, 10),
        ("milestones", [80, 120, 121], [20, 30, 31]),
        ("warmup", 8, 2),
        ("warmup", 3, 0),
        ("warmup", 0, 0),
        ("warmup", 0.25, 0.25),
        ("T_mult", 2, 2),
    ],
)
def test_parts_of_a_schedule_change_with_the_epochs(name: str, given: Any, expected: Any) -> None:
    recipe = Recipe(epochs=8, schedule_settings={name: given})
    assert recipe.lasting(2.0).schedule_settings == {name: expected}
    assert recipe.lasting(8).schedule_settings == {name: given}


@given(st.integers(2, 500), st.data(), st.floats(0.01, 3))
@settings(max_examples=50, deadline=None)
def test_a_warmup_stays_shorter_than_its_schedule(total: int, data: st.DataObject, epochs: float) -> None:
    warmup = data.draw(st.integers(0, total - 1))
    recipe = Recipe(epochs=3, schedule_settings={"warmup": warmup, "total_steps": total}).lasting(epochs)
    assert recipe.schedule_settings["warmup"] < recipe.schedule_settings["total_steps"]


def test_epochs_of_a_schedule_become_its_iterations() -> None:
    recipe = Recipe(epochs=8, schedule_settings={"max_lr": 0.8, "epochs": 8, "steps_per_epoch": 18})
    assert recipe.lasting(3.0).schedule_settings == {"max_lr": 0.8, "total_steps": 54}
    assert recipe.lasting(8.0).schedule_settings == recipe.schedule_settings
    with pytest.raises(RecipeError, match="epochs"):
        recipe.lasting(-1.0)


def test_scaled_touches_learning_rates_only() -> None:
    recipe = Recipe(optimizer_settings={"lr": 0.4, "weight_decay": 0.1}, schedule_settings={"max_lr": 0.8, "x": 3})
    found = recipe.scaled(0.25)
    assert found.optimizer_settings == {"lr": 0.1, "weight_decay": 0.1}
    assert found.schedule_settings == {"max_lr": 0.2, "x": 3}
    assert recipe.optimizer_settings["lr"] == 0.4
    assert recipe.scaled(1.0) == recipe


def test_scaled_reaches_lists_of_rates_and_optimizers_within() -> None:
    inner = {"lr": 0.4, "weight_decay": 0.1}
    recipe = Recipe(
        optimizer="netwright.optim:OptEx.over",
        optimizer_settings={"lr": None, "base": "sgd", "base_settings": inner},
        schedule_settings={"max_lr": [0.4, 0.8]},
    )
    found = recipe.scaled(0.5)
    assert found.optimizer_settings["base_settings"] == {"lr": 0.2, "weight_decay": 0.1}
    assert found.optimizer_settings["lr"] is None
    assert found.schedule_settings["max_lr"] == [0.2, 0.4]
    assert inner["lr"] == 0.4


def test_scaled_reaches_the_rate_that_a_parameterization_shares_out() -> None:
    recipe = Recipe(parameterization="netwright.param:mup", parameterization_settings={"lr": 0.5, "damping": 3.0})
    assert recipe.scaled(0.25).parameterization_settings == {"lr": 0.125, "damping": 3.0}


def test_a_setting_that_json_does_not_know_is_named() -> None:
    base = {"base": torch.optim.SGD, "lr": 0.1}
    with pytest.raises(RecipeError, match=r"Recipe\.optimizer_settings\['base'\] cannot be .* import path"):
        Recipe(optimizer_settings=base).to_json()
    with pytest.raises(RecipeError, match=r"Recipe\.clip_settings\['more'\]\['limit'\] cannot be"):
        Recipe(clip_settings={"more": {"limit": torch.tensor(1.0)}}).to_json()


def made(**changes: Any) -> list[Any]:
    """Everything that a recipe names, built."""
    model = nn.Linear(2, 1)
    recipe = Recipe(schedule=None, average=0.9).replace(**changes)
    optimizer = make_optimizer(recipe, model)
    found = [optimizer, make_schedule(recipe, optimizer, 3), make_clip(recipe), make_average(recipe, model)]
    return [*found, make_penalty(recipe, model), Parameterization(recipe, model)]


LEAKS = ["subprocess:Popen", "os:system", "os:mkdir", "torch:save", "builtins:exec", "math:pi"]


@pytest.mark.parametrize(
    "path", [*LEAKS, "torch.utils.cpp_extension:load_inline", "netwright.core.artifact:save_weights"]
)
@pytest.mark.parametrize("setting", ["optimizer", "schedule", "clip", "average_method", "penalty", "parameterization"])
def test_what_is_of_another_kind_is_not_called(setting: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, name = path.partition(":")
    kind = resolve(path)
    if not isinstance(kind, float):
        monkeypatch.setattr(f"{module}.{name}", functools.wraps(kind)(lambda *_, **__: pytest.fail("it was called")))
    with pytest.raises(RecipeError, match=f"{path} (is not called|cannot average weights)"):
        made(**{setting: path})


def own_optimizer(params, lr=0.1):
    return torch.optim.SGD(params, lr)


def own_schedule(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer)


def own_clip():
    return lambda params: None


def own_penalty(model):
    return lambda: 0.0


def own_parameterization(model):
    return None


partly = functools.partial(torch.optim.SGD, momentum=0.5)


def test_functions_of_the_users_own_need_no_annotations() -> None:
    names = ("schedule", "clip", "penalty", "parameterization")
    found = made(**{name: f"{__name__}:own_{name}" for name in names}, optimizer=f"{__name__}:own_optimizer")
    assert isinstance(found[0], torch.optim.SGD)
    assert all(callable(part) for part in (found[2], found[4]))
    assert made(optimizer=f"{__name__}:partly")[0].defaults["momentum"] == 0.5


def test_methods_of_libraries_are_of_their_kind() -> None:
    within = {"base_settings": {"lr": 0.1}}
    made(optimizer="netwright.optim:OptEx.over", optimizer_settings=within, clip="netwright.optim:AutoClip")
    made(average_method="netwright.optim:SwitchEMA", parameterization="torch.nn.utils.parametrizations:weight_norm")
