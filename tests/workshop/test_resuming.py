"""Which folders a run goes on with, and that nothing is written where it does not."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import tiny
import torch
from torch.utils.data import Dataset

from netwright.compress import Int8, compare
from netwright.core.artifact import save_weights
from netwright.core.data import Data
from netwright.core.errors import CorruptRunError, NetwrightError, RunDirectoryError
from netwright.core.graph import trace
from netwright.core.recipe import Recipe
from netwright.core.rundir import RunDirectory
from netwright.core.task import load_task
from netwright.search import explore
from netwright.workshop import (
    Job,
    dry_run,
    make_job,
    parse_keep,
    parse_targets,
    run_job,
    session,
    train,
    training_entries,
)
from netwright.workshop.baseline import make_baseline
from netwright.workshop.plan import make_plan
from netwright.workshop.resuming import check_same

TASK = "breast-cancer"
SEARCH = {"kind": "search", "task": TASK, "trained_here": True, "seed": 0}
COMPARISON = {"kind": "comparison", "task": TASK, "methods": {}, "seed": 0, "batch": 1, "threads": 1}
REPLAY = {"schema": 1, "kind": "replay", "replay_of": {"task": TASK, "seed": 0}}
OLD_REPLAY = {"schema": 1, "replay_of": {"task": TASK, "seed": 0}}
OPTIMIZATION = {"schema": 1, "kind": "optimization", "task": TASK, "seed": 0, "target": {"macs": "<=0.5x"}}
OPTIMIZATION |= {"keep": {"score": ">=-0.01"}, "command": ""}


def job(out: Path, **more: Any) -> Job:
    return Job(TASK, parse_targets(["macs<=0.5x"]), parse_keep("score>=-0.1"), 60.0, out, **more)


def made(place: Path, settings: dict[str, Any]) -> Path:
    """A folder of a run with these settings, and results that must survive."""
    RunDirectory(place).create(settings).close()
    for name in ("model.safetensors", "recipe.json", "result.json"):
        (place / name).write_text("precious")
    return place


def state(place: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in place.iterdir() if path.name != ".lock"}


def refused(place: Path, words: str) -> None:
    """However an optimization is asked to go on there, it is refused and changes nothing."""
    before = state(place)
    with pytest.raises(RunDirectoryError, match=words):
        make_job(TASK, "macs<=0.5x", out=place, resume=True)
    for go in (run_job, dry_run):
        with pytest.raises(RunDirectoryError, match=words):
            go(job(place), resume=True)
    assert state(place) == before


@pytest.mark.parametrize(
    ("settings", "kind"),
    [(SEARCH, "search"), (COMPARISON, "comparison"), (REPLAY, "replay"), (OLD_REPLAY, "replay")],
)
def test_an_optimization_does_not_go_on_with_a_folder_of_another_command(
    settings: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    refused(made(tmp_path / "run", settings), f"run holds a {kind}, not an optimization")


def test_a_training_is_not_overwritten(tmp_path: Path) -> None:
    place = tmp_path / "run"
    train(load_task(TASK), TASK, training_entries(Recipe(epochs=0.2)), place, console=False)
    refused(place, "run holds a training, not an optimization")


@pytest.mark.parametrize("settings", [[], {"task": TASK, "seed": 0, "methods": {}}])
def test_settings_that_are_no_optimizations_are_named(settings: Any, tmp_path: Path) -> None:
    place = made(tmp_path / "run", settings)
    with pytest.raises(CorruptRunError, match=r"run\.json lacks"):
        make_job(TASK, "macs<=0.5x", out=place, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": "0"},
        {"target": ["latency"]},
        {"keep": {"score": 3}},
        {"budget_s": "abc"},
        {"budget_s": -1},
        {"engine": "horse"},
        {"workers": "2"},
        {"evaluations": 1.5},
        {"sampler": ["linas"]},
        {"threads": None},
    ],
)
def test_a_setting_that_was_damaged_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run").create({**OPTIMIZATION, **change}).close()
    with pytest.raises(CorruptRunError, match=rf"run\.json is damaged: {next(iter(change))} cannot be"):
        make_job(TASK, out=tmp_path / "run", resume=True)


POINT = {
    "steps": [],
    "score": {"val": 0.5, "test": None, "test_ci95": None},
    "latency_ms": {"median": 1, "p10": 1, "p90": 1, "batch": 1, "threads": 1, "runtime": "torch", "repeats": 1},
    **dict.fromkeys(("memory_bytes", "size_bytes", "macs", "parameters"), 1),
}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"point": {}, "history": []}, r"baseline\.json does not hold a baseline \(KeyError: 'score'\)"),
        ({"point": POINT, "history": 3}, r"baseline\.json does not hold a baseline"),
        ({"point": POINT, "history": []}, r"baseline\.onnx cannot be read: No such file"),
    ],
)
def test_a_baseline_that_was_damaged_is_named(record: dict[str, Any], words: str, tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").create(OPTIMIZATION) as run:
        save_weights(tiny.task().build(0), run.path / "baseline.safetensors")
        run.write("baseline.json", record)
        with pytest.raises(CorruptRunError, match=words):
            make_baseline(run, job(run.path), tiny.task(), Recipe(), lambda fraction, what: None, 0.0)


PLAN = {"steps": ["prune"], "int8": None, "int8_table": [], "workers": 1, "started": 0.0}
PLAN |= {"candidate_seconds": 1.0, "final_seconds": 1.0}


@pytest.mark.parametrize("change", [{"steps": 5}, {"workers": "many"}, {"branches": [{"name": "a"}]}, {"int8": 8}])
def test_a_plan_that_was_damaged_is_named(change: dict[str, Any], tmp_path: Path) -> None:
    task = tiny.task()
    graph, baseline = trace(task.build(0), task.example(2)), SimpleNamespace()  # which a plan that is there needs not
    with RunDirectory(tmp_path / "run").create(OPTIMIZATION) as run:
        run.write("plan.json", PLAN)
        assert make_plan(run, job(run.path), task, cast(Any, baseline), graph, float).workers == 1
        run.write("plan.json", {**PLAN, **change})
        with pytest.raises(CorruptRunError, match=r"plan\.json does not hold a plan"):
            make_plan(run, job(run.path), task, cast(Any, baseline), graph, float)


def test_a_clock_that_was_damaged_is_named(tmp_path: Path) -> None:
    task = tiny.task()
    with RunDirectory(tmp_path / "run").create(OPTIMIZATION) as run:
        run.write("clock.json", {"elapsed_s": "abc"})
        with pytest.raises(CorruptRunError, match=r"clock\.json does not hold the time"):
            session.Session(run, job(run.path), task, cast(Any, None), lambda fraction, what: None, 0.0)


@pytest.mark.parametrize("settings", [OPTIMIZATION, {**OPTIMIZATION, "kind": None}])
def test_an_optimization_goes_on_whether_or_not_it_says_so(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {name: value for name, value in settings.items() if value is not None}
    RunDirectory(tmp_path / "run").create(settings).close()
    found = make_job(TASK, out=tmp_path / "run", resume=True)
    assert [(limit.metric, limit.text) for limit in found.limits] == [("macs", "<=0.5x")]


def test_a_dry_run_refuses_to_go_on_with_another_seed(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run").create(OPTIMIZATION).close()
    with pytest.raises(RunDirectoryError, match="has seed 0, not 3"):
        dry_run(job(tmp_path / "run", seed=3), resume=True)


def test_a_run_goes_on_from_another_folder_with_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    begun = replace(job(tmp_path / "run"), task="mine.py:task")
    assert begun.file == str(tmp_path / "here" / "mine.py")
    run = RunDirectory(tmp_path / "run")
    run.create({**OPTIMIZATION, "task": begun.name, "task_file": begun.file}).close()
    monkeypatch.chdir(tmp_path / "there")
    for name in (f"{tmp_path}/here/mine.py:task", "../here/mine.py:task", "mine.py:task"):
        check_same(run, replace(begun, task=name))  # the last by its name, as on a machine that has no such folder
    for name in (f"{tmp_path}/there/mine.py:task", "../here/mine.py:other", "mine:task"):
        with pytest.raises(RunDirectoryError, match=r"has task 'mine\.py:task', not"):
            check_same(run, replace(begun, task=name))


@pytest.mark.parametrize("settings", [OPTIMIZATION, REPLAY, SEARCH, COMPARISON])
def test_the_other_commands_do_not_go_on_with_a_folder_of_another_one(settings: dict[str, Any], tmp_path: Path) -> None:
    place, task = made(tmp_path / "run", settings), load_task(TASK)
    before = state(place)
    with pytest.raises(RunDirectoryError):
        train(task, TASK, training_entries(Recipe(epochs=0.2)), place, resume=True, console=False)
    with pytest.raises(RunDirectoryError):
        compare(task, {"Int8": Int8()}, out=place, resume=True, console=False)
    if settings is not SEARCH:
        with pytest.raises(RunDirectoryError):
            explore(task, out=place, resume=True, progress=lambda fraction, what: None)
    assert state(place) == before


def test_where_a_run_lies_does_not_move_with_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    by_name, by_place = make_job(TASK, "macs<=0.5x"), make_job(TASK, "macs<=0.5x", out="mine")
    assert job(Path("mine")).out == tmp_path / "mine"
    monkeypatch.chdir("/")
    assert by_name.out == tmp_path / "runs" / TASK
    assert by_place.out == tmp_path / "mine"


class Distant(Dataset):
    """Items that another process can read only while a file is there."""

    def __init__(self, part: Any, file: Path) -> None:
        self.part, self.file = part, file
        self.home = os.getpid()

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Any:
        return self.part[index]

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["home"] != os.getpid() and not state["file"].exists():
            raise LookupError("the share is not\nmounted")
        self.__dict__.update(state)


def distant(file: Path, **more: Any) -> Job:
    task = tiny.task()
    parts = (Distant(part, file) for part in task.data.splits().values())
    task = replace(task, data=Data(*parts), recipe=Recipe(epochs=0.5), **more)
    return Job(task, parse_targets(["macs<=0.9x"]), parse_keep("score>=-1"), 60.0, file.parent / "run", evaluations=1)


def test_a_task_that_no_worker_can_read_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    asked = distant(tmp_path / "share")
    words = "Task 'tiny' cannot be read in a worker process: LookupError: the share is not mounted"
    with pytest.raises(NetwrightError, match=words):
        run_job(asked)
    assert not asked.out.exists()


class Ending(Distant):
    """Ends the process that reads it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["home"] != os.getpid():
            os._exit(7)
        super().__setstate__(state)


def test_a_task_that_ends_its_reader_is_refused_too(tmp_path: Path) -> None:
    parts = (Ending(part, tmp_path) for part in tiny.data().splits().values())
    task = replace(tiny.task(), data=Data(*parts))
    with pytest.raises(NetwrightError, match="cannot be read in a worker process: the process ended with code 7"):
        dry_run(Job(task, parse_targets(["macs<=0.9x"]), parse_keep("score>=-1"), 60.0, tmp_path / "run"))


def test_a_run_goes_on_once_its_workers_can_read_the_task(tmp_path: Path) -> None:
    torch.manual_seed(0)
    asked = distant(tmp_path / "share", model=tiny.network())  # comes trained: nothing is tried beforehand
    with pytest.raises(NetwrightError, match=r"LookupError: the share is not mounted\. .* go on with --resume"):
        run_job(asked)
    before = json.loads((asked.out / "result.json").read_text())
    assert (before["status"], before["evaluations"], before["failed"]) == ("interrupted", 0, 0)
    asked.task.data.train.file.touch()  # type: ignore[union-attr]  # distant() made the dataset
    result = run_job(replace(asked, budget=1.0), resume=True)  # no time for more than the one candidate
    assert result["status"] in ("met", "not_met")
    assert (result["evaluations"], result["failed"]) == (1, 0)


def measured_score(outputs: Any, targets: Any) -> float:
    return 0.5


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"score": measured_score}, "measured_score"),
        ({"score": lambda outputs, targets: 0.5}, "score"),
        ({"evaluate": lambda model, split: 0.5}, "score"),
        ({"evaluate": measured_score}, "score"),
    ],
)
def test_a_score_is_called_by_its_functions_name_where_that_is_one(
    changes: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "make_baseline", cut)
    task = replace(tiny.task(), model=tiny.network(), **changes)
    run_job(replace(job(tmp_path / "run"), task=task))
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["score"] == name
    assert settings["kind"] == "optimization"
