"""Recipes as plain data."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netwright.core.errors import NetwrightError, RecipeError
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
    with pytest.raises(RecipeError, match=rf"Recipe\.{setting} must be .*got {value!r}"):
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


def test_scaled_reaches_the_rate_that_a_parameterization_shares_out() -> None:
    recipe = Recipe(parameterization="netwright.param:mup", parameterization_settings={"lr": 0.5, "damping": 3.0})
    assert recipe.scaled(0.25).parameterization_settings == {"lr": 0.125, "damping": 3.0}
