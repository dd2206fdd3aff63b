"""Trainings side by side: what is chosen, what is kept, what an interruption leaves."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.core.artifact import load_weights
from netwright.core.data import Data
from netwright.core.errors import CorruptRunError, NonFiniteLossError, RecipeError, RunDirectoryError
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.rundir import RunDirectory
from netwright.core.score import accuracy
from netwright.core.task import Task
from netwright.report import write_report
from netwright.report.training_run import read_training
from netwright.workshop import Entry, change_recipe, train, training, training_entries


def task() -> Task:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(240, 6, generator=generator)
    targets = (inputs[:, 0] * inputs[:, 1] > 0).long()
    parts = [TensorDataset(inputs[a:b], targets[a:b]) for a, b in ((0, 120), (120, 180), (180, 240))]
    return Task(
        "signs",
        lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2)),
        Data(*parts),
        functional.cross_entropy,
        accuracy,
    )


BASE = Recipe(epochs=3, batch_size=20, schedule=None, schedule_settings={})


def entries() -> list[Entry]:
    return training_entries(BASE, ["sgd", "adamw"], [1e-3, 3e-2])


def test_the_best_is_chosen_on_val_and_its_model_is_kept(tmp_path: Path) -> None:
    result = train(task(), "signs", entries(), tmp_path / "run", seed=3, console=False)
    rows = result["trainings"]
    assert [row["name"] for row in rows] == ["sgd", "sgd", "adamw", "adamw"]
    for name in ("sgd", "adamw"):
        mine = [row for row in rows if row["name"] == name]
        leader = [row for row in mine if row["leader"]]
        assert len(leader) == 1
        assert leader[0]["val"] == max(row["val"] for row in mine)
        assert all((row["test"] is not None) == row["leader"] for row in mine), "test is read for the chosen alone"
    best = rows[result["best"]]
    assert best["val"] == max(row["val"] for row in rows)
    model = task().build(3)
    load_weights(model, tmp_path / "run" / "model.safetensors")
    assert evaluate(model.eval(), task(), "val") == best["val"]
    assert evaluate(model, task(), "test") == best["test"]["score"]
    again = fit(task().build(3), task(), Recipe.from_json(json.dumps(best["recipe"])), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), model.parameters(), strict=True))
    left = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert left == {"run.json", "trainings.jsonl", "training.json", "recipe.json", "model.safetensors"}


def test_every_training_of_a_module_that_came_trained_starts_from_it(tmp_path: Path) -> None:
    module = task().build(8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    given = dataclasses.replace(task(), model=module)
    result = train(given, "signs", entries(), tmp_path / "run", console=False)
    for row, entry in zip(result["trainings"], entries(), strict=True):
        alone = fit(copy.deepcopy(module), task(), entry.recipe, seed=0)
        assert row["val"] == alone.history[-1].val_score
        assert row["history"][-1]["train_loss"] == alone.history[-1].train_loss
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items()), "it is the user's own"


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(task(), "signs", entries(), tmp_path / "whole", console=False)
    calls = []

    def cut(*args: object, **settings: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*args, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "fit", cut)
    with pytest.raises(KeyboardInterrupt):
        train(task(), "signs", entries(), tmp_path / "cut", console=False)
    page = write_report(tmp_path / "cut").read_text()
    assert "2 of 4 trainings have ended" in page
    resumed = train(task(), "signs", entries(), tmp_path / "cut", resume=True, console=False)
    assert len(calls) == 5, "two ended before the cut, one was cut, two were left"

    def timeless(result: dict) -> list:
        rows = json.loads(json.dumps(result["trainings"]))
        for row in rows:
            row.pop("seconds")
            for record in row["history"]:
                record.pop("seconds")
        return rows

    assert timeless(resumed) == timeless(whole)


def test_a_training_whose_line_cannot_be_written_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RunDirectoryError("Cannot write: No space left on device.")

    monkeypatch.setattr(RunDirectory, "append", full)
    with pytest.raises(RunDirectoryError, match="No space"):
        train(task(), "signs", entries()[:1], tmp_path / "run", console=False)
    monkeypatch.undo()
    assert (tmp_path / "run" / "checkpoint-0.pt").exists()
    train(task(), "signs", entries()[:1], tmp_path / "run", resume=True, console=False)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("damage", [{"entry": "first"}, {"val": "high"}, {"recipe": 3}, {"name": None}])
def test_a_training_that_was_damaged_is_named(damage: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_finish", cut)
    with pytest.raises(KeyboardInterrupt):
        train(task(), "signs", entries()[:1], tmp_path / "run", console=False)
    monkeypatch.undo()
    log = tmp_path / "run" / "trainings.jsonl"
    log.write_text(json.dumps({**json.loads(log.read_text()), **damage}) + "\n")
    with pytest.raises(CorruptRunError, match=r"trainings\.jsonl does not hold trainings"):
        train(task(), "signs", entries()[:1], tmp_path / "run", resume=True, console=False)


def test_a_diverging_training_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    recipes = [Entry("wild", BASE.replace(optimizer="torch.optim:SGD", optimizer_settings={"lr": 1e38})), *entries()]
    result = train(task(), "signs", recipes, tmp_path / "run", console=False)
    assert "loss is" in result["trainings"][0]["error"]
    assert result["trainings"][0]["val"] is None
    assert result["best"] > 0
    run = read_training(tmp_path / "run")
    assert run.trainings[0].error == result["trainings"][0]["error"]
    with pytest.raises(NonFiniteLossError, match="Every training diverged"):
        train(task(), "signs", recipes[:1], tmp_path / "alone", console=False)


def test_a_finished_run_resumed_says_the_same(tmp_path: Path) -> None:
    first = train(task(), "signs", entries()[:1], tmp_path / "run", console=False)
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert train(task(), "signs", entries()[:1], tmp_path / "run", resume=True, console=False) == first
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    with pytest.raises(RunDirectoryError, match="other settings"):
        train(task(), "signs", entries(), tmp_path / "run", resume=True, console=False)
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        train(task(), "signs", entries(), tmp_path / "run", console=False)
    with pytest.raises(RunDirectoryError, match="no run to resume"):
        train(task(), "signs", entries(), tmp_path / "nothing", resume=True, console=False)
    with pytest.raises(RecipeError, match="nothing to train"):
        train(task(), "signs", [], tmp_path / "none", console=False)


def test_the_memory_of_an_optimizer_is_counted(tmp_path: Path) -> None:
    result = train(task(), "signs", training_entries(BASE, ["adamw", "rmsprop"]), tmp_path / "run", console=False)
    words = sum(parameter.numel() for parameter in task().build(0).parameters())
    assert [row["optimizer_bytes"] for row in result["trainings"]] == [2 * 4 * words, 4 * words]


def own(recipe: Recipe | None = None) -> Task:
    """The task with a loop of its own in place of a loss."""

    def loop(model: nn.Module, *, budget: float | None, seed: int, teacher: nn.Module | None = None) -> None:
        del budget, seed, teacher
        with torch.no_grad():
            model[2].bias += 1.0

    return dataclasses.replace(task(), loss=None, fit=loop, recipe=recipe)


def test_a_task_that_trains_by_its_own_fit_has_a_report(tmp_path: Path) -> None:
    train(own(BASE), "signs", training_entries(BASE.replace(epochs=2)), tmp_path / "run", console=False)
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "trained by its own fit" in page
    assert "Score on the validation set by epoch" in page
    assert "Training loss by epoch" not in page
    (training_,) = read_training(tmp_path / "run").trainings
    assert (training_.name, training_.lr) == ("its own fit", None)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"optimizers": ["sgd"]}, "takes no optimizer.*Leave optimizer as it is"),
        ({"optimizers": ["adamw", "sgd"]}, "takes no optimizer"),
        ({"lrs": [0.1]}, "Leave optimizer_settings as it is"),
        ({"lrs": [2e-3, 0.1]}, "takes no optimizer"),
        ({"changes": ["batch_size=4"]}, "Leave batch_size as it is"),
    ],
)
def test_such_a_task_is_not_asked_for_what_it_cannot_heed(tmp_path: Path, more: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        train(own(), "signs", training_entries(Recipe(), **more), tmp_path / "run", console=False)
    assert not (tmp_path / "run").exists()


def test_settings_reach_where_they_belong() -> None:
    changed = change_recipe(
        Recipe(),
        ["optimizer=sgd", "optimizer.momentum=0.9", "lr=0.5", "epochs=2.5", "clip_norm=none", "schedule=cosine"],
    )
    assert changed.optimizer == "torch.optim:SGD"
    assert changed.optimizer_settings == {"momentum": 0.9, "lr": 0.5}
    assert changed.epochs == 2.5
    assert changed.clip_norm is None
    assert changed.schedule == "torch.optim.lr_scheduler:CosineAnnealingLR"
    assert changed.schedule_settings == {}
    peak = change_recipe(changed, ["schedule=one-cycle"])
    assert peak.schedule_settings == {"max_lr": 0.5}
    assert change_recipe(peak, ["lr=0.1"]).schedule_settings == {"max_lr": 0.1}
    assert change_recipe(peak, ["schedule=none"]).schedule is None
    assert change_recipe(Recipe(), ["optimizer=torch.optim:Adam"]).optimizer_settings == {"lr": 1e-3}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optimizer", "key=value"),
        ("=3", "key=value"),
        ("optimizer=sdg", "Did you mean sgd"),
        ("schedule=cosinus", "no schedule 'cosinus'"),
        ("epoch=3", "Did you mean epochs"),
        ("lr=fast", "lr must be a number"),
        ("lr=true", "lr must be a number"),
        ("epochs=-1", "Recipe.epochs must be"),
        ("epochs=many", "Recipe.epochs must be"),
        ("optimizer=torch.optim:Nothing", "cannot be imported"),
    ],
)
def test_a_mistake_in_a_setting_is_named(change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        change_recipe(Recipe(), [change])


def test_entries() -> None:
    named = training_entries(BASE.replace(optimizer="torch.optim:SGD", optimizer_settings={"lr": 0.3, "momentum": 0.5}))
    assert [(entry.name, entry.recipe.optimizer_settings["momentum"]) for entry in named] == [("sgd", 0.5)]
    with pytest.raises(RecipeError, match="different optimizers"):
        training_entries(BASE, ["sgd", "sgd"])
    with pytest.raises(RecipeError, match="different optimizers"):
        training_entries(BASE, [])
    with pytest.raises(RecipeError, match="at least one learning rate"):
        training_entries(BASE, ["sgd"], [])
    for twice in (["AdamW", "adamw"], ["torch.optim:SGD", "sgd"], ["adamw", "torch.optim.adamw:AdamW"]):
        with pytest.raises(RecipeError, match="different optimizers"):
            training_entries(BASE, twice)
    with pytest.raises(RecipeError, match="and different ones"):
        training_entries(BASE, ["sgd"], [1e-3, 0.001])
