"""Methods side by side: what the rows say, what a crash leaves, what is refused."""

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from netwright.compress import CHITA, Comparison, Int8, Prune, Row, compare, described
from netwright.compress._comparison_figure import _placed
from netwright.core.artifact import OnnxModule
from netwright.core.cost import measure
from netwright.core.errors import ArtifactError, CorruptRunError, RunDirectoryError, TransformError
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.rundir import RunDirectory
from netwright.core.task import Task, load_task
from netwright.core.transform import Chain


@dataclasses.dataclass(frozen=True)
class Thin:
    """Sets the smallest weights to zero; remembers how it was called."""

    share: float = 0.9
    trains: bool = False

    def __call__(self, model, task, *, budget=None, seed=0, progress=None):
        CALLS.append((self.share, budget))
        made = type(model)(*(nn.Linear(layer.in_features, layer.out_features) if isinstance(layer, nn.Linear)
                             else nn.ReLU() for layer in model))  # fmt: skip
        made.load_state_dict(model.state_dict())
        for value in made.parameters():
            if value.ndim > 1:
                value.data[value.abs() <= value.abs().quantile(self.share)] = 0.0
        return made.eval()


@dataclasses.dataclass(frozen=True)
class Broken:
    """Fails."""

    def __call__(self, model, task, *, budget=None, seed=0, progress=None):
        raise ZeroDivisionError("no such luck")


CALLS: list[tuple[float, float | None]] = []


def task() -> Task:
    base = load_task("breast-cancer")
    network = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))
    return dataclasses.replace(base, model=lambda: type(network)(*map(_fresh, network)), recipe=Recipe(epochs=4))


def _fresh(layer: nn.Module) -> nn.Module:
    return nn.Linear(layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else nn.ReLU()


def run(methods, out=None, **more) -> Comparison:
    return compare(task(), methods, out=out, seconds=0.05, console=False, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    out = tmp_path_factory.mktemp("compare") / "run"
    CALLS.clear()
    methods = {"half": Prune(0.5), "thin": Thin(), "broken": Broken(), "both": Chain([Prune(0.5), Int8()])}
    return run(methods, out, epochs=1), out


def test_rows_say_what_the_files_are(finished: tuple[Comparison, Path]) -> None:
    found, out = finished
    assert [entry.name for entry in found.rows] == ["half", "thin", "broken", "both"]
    for entry in (found.baseline, *found.rows):
        if entry.error:
            continue
        model = OnnxModule(out / f"{entry.name}.onnx")
        assert entry.val == pytest.approx(evaluate(model, task(), "val"))
        assert entry.test == pytest.approx(evaluate(model, task(), "test"))
        assert entry.cost is not None
        assert entry.cost.size_bytes == (out / f"{entry.name}.onnx").stat().st_size
    half = found.rows[0].cost
    assert half is not None
    smaller = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))
    assert half.parameters == measure(smaller, torch.zeros(1, 30), repeats=2).parameters


def test_zeros_are_held_in_recovery_and_stored_as_such(finished: tuple[Comparison, Path]) -> None:
    found, out = finished
    thin = found.rows[1]
    assert thin.zeros is not None
    assert thin.zeros == pytest.approx(0.9, abs=0.02)
    assert (out / "thin.onnx").stat().st_size < 0.7 * (out / "baseline.onnx").stat().st_size
    program = torch.export.load(out / "thin.pt2").module()
    assert float((dict(program.named_parameters())["0.weight"] == 0).double().mean()) > 0.85


def test_a_method_that_fails_is_a_row(finished: tuple[Comparison, Path]) -> None:
    broken = finished[0].rows[2]
    assert broken.error == "ZeroDivisionError: no such luck"
    assert broken.cost is None
    assert "broken failed: ZeroDivisionError: no such luck" in finished[0].table()


def test_the_files_hold_the_comparison(finished: tuple[Comparison, Path]) -> None:
    found, out = finished
    content = json.loads((out / "comparison.json").read_text())
    assert Comparison(content["task"], Row.from_dict(content["baseline"]), tuple(map(Row.from_dict, content["rows"])))
    assert tuple(map(Row.from_dict, content["rows"])) == found.rows
    assert content["seed"] == found.seed == 0
    for name in ("baseline", "half", "thin", "both"):
        assert isinstance(torch.export.load(out / f"{name}.pt2").module(), nn.Module)
    page = (out / "comparison.html").read_text()
    assert "half" in page
    assert f"<h1>Compression of {found.task}</h1>" in page
    assert "<p>Seed 0, the baseline takes " in page
    assert "<script src=" not in page
    assert "<link" not in page.split("<body>")[0]


def test_resume_does_nothing_twice(finished: tuple[Comparison, Path], tmp_path: Path) -> None:
    methods = {"thin": Thin(), "half": Prune(0.5)}
    CALLS.clear()
    first = run(methods, tmp_path / "run", epochs=1)
    log = tmp_path / "run" / "compressions.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(lines[0] + lines[1][:20])  # as a crash in the second line leaves it
    mark = tmp_path / "run" / "run.json"
    settings = json.loads(mark.read_text())
    assert settings.pop("kind") == "comparison"
    mark.write_text(json.dumps(settings))  # as versions wrote it that did not say the kind
    again = run(methods, tmp_path / "run", epochs=1, resume=True)
    assert CALLS == [(0.9, 0.0)]
    assert again.rows[0] == first.rows[0]
    assert again.rows[1].val == first.rows[1].val
    with pytest.raises(RunDirectoryError, match="other settings"):
        run(methods, tmp_path / "run", epochs=2, resume=True)


def test_a_method_that_trains_gets_the_budget_and_no_recovery() -> None:
    CALLS.clear()
    found = run({"own": Thin(trains=True)}, epochs=2)
    assert CALLS == [(0.9, 2.0)]
    again = run({"own": Thin(trains=True)}, epochs=0)
    assert found.rows[0].val == again.rows[0].val


def test_described() -> None:
    plain = described(Chain([Prune(0.5), Int8()]))
    assert plain["method"] == "netwright.core.transform:Chain"
    assert [step["method"] for step in plain["steps"]] == [
        "netwright.compress.prune:Prune",
        "netwright.compress.quantize:Int8",
    ]
    assert plain["steps"][0]["settings"]["ratios"] == 0.5


@pytest.mark.parametrize(
    ("methods", "more", "said"),
    [
        ({}, {}, "at least one method"),
        ({"a/b": Thin()}, {}, "'a/b' cannot be a method's name"),
        ({"baseline": Thin()}, {}, "'baseline' cannot be"),
        ({"a": Prune}, {}, "'a' must be a transform such as Prune"),
        ({"a": Thin()}, {"epochs": -1}, "epochs must be a number of at least 0, got -1"),
    ],
)
def test_refused(methods, more, said) -> None:
    with pytest.raises(TransformError, match=said):
        run(methods, **more)


def test_resume_needs_a_folder() -> None:
    with pytest.raises(RunDirectoryError, match="give out="):
        run({"a": Thin()}, resume=True)


def test_zeros_are_held_where_the_recipe_has_a_parameterization() -> None:
    given = task()
    recipe = given.recipe.replace(parameterization="netwright.param:geometric_parameterization")
    found = compare(dataclasses.replace(given, recipe=recipe), {"thin": Thin()}, epochs=1, seconds=0.05, console=False)
    assert found.rows[0].error is None
    assert found.rows[0].zeros == pytest.approx(0.9, abs=0.02)


def own_fit(model, *, budget, seed, teacher=None):
    """Moves every weight; knows of no zeros."""
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.01)


def own_task(fit=own_fit) -> Task:
    given = task()
    return dataclasses.replace(given, fit=fit, evaluate=lambda model, split: 0.0)


def test_zeros_are_held_where_the_task_trains_by_its_own_fit() -> None:
    methods = {"chita": CHITA(0.9, stages=2, gradients=16, batch_size=4), "half": Prune(0.5)}
    found = compare(own_task(), methods, seconds=0.05, console=False)
    assert [entry.error for entry in found.rows] == [None, None]
    assert 0.89 <= found.rows[0].zeros <= 0.91
    assert found.rows[1].zeros == 0.0


def test_an_own_fit_that_returns_another_network_is_a_row_with_its_reason() -> None:
    def other(model, *, budget, seed, teacher=None):
        return None if teacher is None else nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 2))

    found = compare(own_task(other), {"thin": Thin(), "half": Prune(0.5)}, seconds=0.05, console=False)
    assert "The zeros of 0.weight (64, 30) cannot be kept" in found.rows[0].error
    assert "has shape (8, 30)" in found.rows[0].error
    assert found.rows[1].error is None


def test_few_zeros_are_held_as_well() -> None:
    found = run({"quarter": Thin(0.25), "none": Thin(0.0)}, epochs=1)
    assert found.rows[0].zeros == pytest.approx(0.25, abs=0.01)
    assert found.rows[1].zeros < 0.02


def test_a_chain_spends_the_whole_training_on_the_steps_that_train() -> None:
    CALLS.clear()
    run({"chain": Chain([Thin(0.2), Chain([Thin(0.5, trains=True), Int8()])])}, epochs=4)
    assert CALLS == [(0.2, 0.0), (0.5, 4.0)]


def test_a_setting_that_json_cannot_hold_is_named() -> None:
    with pytest.raises(TransformError, match=r"'odd' cannot be recorded, for Thin.share is <built-in function print>"):
        run({"odd": Chain([Int8(), Thin(print)])})


@pytest.mark.parametrize("full", ["folder", "file"])
def test_a_full_disk_is_not_held_against_the_method(full: str, tmp_path: Path, monkeypatch) -> None:
    save, calls = RunDirectory.save, []

    def fail_once(self, name, write):
        if name.startswith("thin") and not calls:
            calls.append(name)
            if full == "folder":
                raise RunDirectoryError("Cannot write.")
            raise ArtifactError("Cannot write.") from OSError(28, "No space left on device")
        return save(self, name, write)

    monkeypatch.setattr(RunDirectory, "save", fail_once)
    methods = {"half": Prune(0.5), "thin": Thin()}
    with pytest.raises((RunDirectoryError, ArtifactError), match="Cannot write"):
        run(methods, tmp_path / "run", epochs=0)
    found = run(methods, tmp_path / "run", epochs=0, resume=True)
    assert calls
    assert [entry.error for entry in found.rows] == [None, None]


def test_the_training_of_the_baseline_is_not_lost(tmp_path: Path, monkeypatch) -> None:
    methods, trained = {"half": Prune(0.5)}, []

    def counted(*args, **settings):
        trained.append(settings["seed"])
        return fit(*args, **settings)

    def stopped(*_):
        raise KeyboardInterrupt

    whole = run(methods, tmp_path / "whole", epochs=0)
    monkeypatch.setattr("netwright.compress._comparison_baseline.fit", counted)
    with monkeypatch.context() as patched:
        patched.setattr("netwright.compress._comparison_baseline.export_model", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(methods, tmp_path / "run", epochs=0)
    found = run(methods, tmp_path / "run", epochs=0, resume=True)
    assert trained == [0]
    assert found.baseline.val == whole.baseline.val
    assert found.baseline.seconds > 0
    weights = [(tmp_path / name / "baseline.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1]
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "run")]
    assert names[0] == names[1]


@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_a_damaged_baseline_is_not_held_against_the_methods(damage: str, tmp_path: Path) -> None:
    methods = {"half": Prune(0.5)}
    run(methods, tmp_path / "run", epochs=0)
    (tmp_path / "run" / "compressions.jsonl").unlink()
    artifact = tmp_path / "run" / "baseline.onnx"
    before = artifact.read_bytes()
    artifact.unlink() if damage == "missing" else artifact.write_bytes(b"")
    found = run(methods, tmp_path / "run", epochs=0, resume=True)
    assert found.rows[0].error is None
    assert artifact.read_bytes() == before


@dataclasses.dataclass(frozen=True)
class Wanders:
    """Changes the working directory."""

    folder: str

    def __call__(self, model, task, *, budget=None, seed=0, progress=None):
        os.chdir(self.folder)
        return model


def test_a_method_that_changes_the_directory_leaves_the_files_in_theirs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    assert run({"lost": Wanders(str(tmp_path / "elsewhere"))}, "run", epochs=0).rows[0].error is None
    assert (tmp_path / "run" / "comparison.html").exists()
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("compressions.jsonl", "{}\n"),
        ("compressions.jsonl", "[1]\n"),
        ("compressions.jsonl", json.dumps({**Row("half").to_dict(), "val": "many"}) + "\n"),
        ("compressions.jsonl", json.dumps({**Row("half").to_dict(), "ratio": {"median": 1.0}}) + "\n"),
        ("baseline.json", "[]\n"),
        ("baseline.json", '{"val": 1.0, "cost": null}\n'),
        ("run.json", "[]\n"),
    ],
)
def test_files_edited_by_hand_are_named(
    file: str, text: str, finished: tuple[Comparison, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(finished[1], tmp_path / "run")
    (folder / file).write_text(text)
    methods = {"half": Prune(0.5), "thin": Thin(), "broken": Broken(), "both": Chain([Prune(0.5), Int8()])}
    with pytest.raises(CorruptRunError, match=file):
        run(methods, folder, epochs=1, resume=True)


def test_a_page_of_a_task_whose_name_no_file_can_hold(finished: tuple[Comparison, Path], tmp_path: Path) -> None:
    odd = dataclasses.replace(finished[0], task="<caf\udce9>", seed=None, machine=None)
    page = odd.save(tmp_path / "odd.html").read_text()
    assert "<h1>Compression of &lt;caf\\udce9&gt;</h1>" in page
    assert "<p>The baseline takes " in page


def test_labels_of_neighbours_stand_apart() -> None:
    points, widths = [(80.0, 150.0)] * 6 + [(390.0, 299.0)], [60.0, 90.0, 40.0, 60.0, 60.0, 70.0, 70.0]
    moves = _placed(points, widths)
    assert moves[0] == (7, 5.0)  # where it was before there were others
    starts = [
        x + across - width * (across < 0) for (x, _), (across, _), width in zip(points, moves, widths, strict=True)
    ]
    feet = [y + up for (_, y), (_, up) in zip(points, moves, strict=True)]
    boxes = list(zip(starts, feet, widths, strict=True))
    for (start, foot, width), (other, below, _) in itertools.permutations(boxes, 2):
        assert other < start or other > start + width or abs(foot - below) >= 13
    assert all(0 <= start <= 400 - width and 0 <= foot <= 287 for start, foot, width in boxes)
