"""Reading run directories: whole, unfinished, torn and damaged ones."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_run import write_example
from hypothesis import given, settings
from hypothesis import strategies as st

from netwright.core.errors import CorruptRunError
from netwright.report import read_run, write_report
from netwright.report.fields import Fields


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_example(tmp_path / "run", evaluations=12)


def change(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


def test_everything_comes_back(whole: Path) -> None:
    run = read_run(whole)
    raw = json.loads((whole / "result.json").read_text())
    assert run.remarks == ()
    assert run.result is not None
    assert run.result.chosen is not None
    assert run.result.status == "met"
    assert run.result.chosen.latency_ms.median == raw["chosen"]["latency_ms"]["median"]
    assert run.result.chosen.score.test_ci95 == tuple(raw["chosen"]["score"]["test_ci95"])
    assert [step.method for step in run.result.chosen.steps] == [step["method"] for step in raw["chosen"]["steps"]]
    assert run.result.chosen.cost("size") == raw["chosen"]["size_bytes"]
    assert len(run.result.front) == len(raw["front"])
    assert len(run.evaluations) == 60
    assert len(run.points) + len(run.failures) == 60
    assert len(run.failures) == raw["failed"]
    assert len(run.history["baseline"]) == 30
    assert run.layers[0].baseline_shape == (32, 1, 3, 3)
    assert run.state() == {**raw, "remarks": []}


def test_a_share_is_the_ratio_measured_in_turns(whole: Path) -> None:
    result = read_run(whole).result
    assert result is not None
    assert result.chosen is not None
    assert result.chosen.latency_ratio is not None
    assert result.chosen.share("latency", result.baseline) == result.chosen.latency_ratio.median
    assert result.chosen.share("size", result.baseline) == pytest.approx(result.ratios["size"])
    assert result.baseline.share("latency", result.baseline) == 1.0


@pytest.mark.parametrize("folder", ["missing", "a_file"])
def test_not_a_run(tmp_path: Path, folder: str) -> None:
    (tmp_path / "a_file").write_text("hello")
    with pytest.raises(CorruptRunError, match=r"not a run directory.*--out"):
        read_run(tmp_path / folder)


@pytest.mark.parametrize(("kind", "page"), [("search", "report.html"), ("comparison", "comparison.html")])
def test_the_folder_of_another_command_says_where_its_page_is(run: Path, kind: str, page: str) -> None:
    change(run / "run.json", kind=kind)
    with pytest.raises(CorruptRunError, match=rf"holds a {kind}, not an optimization\. {re.escape(page)}"):
        read_run(run)


@pytest.mark.parametrize("settings", [{"kind": "replay", "replay_of": {}}, {"replay_of": {"task": "digits"}}])
def test_the_folder_of_a_replay_is_no_run(run: Path, settings: dict) -> None:
    (run / "run.json").write_text(json.dumps({"schema": 1, **settings}))
    with pytest.raises(CorruptRunError, match=r"holds a replay, not an optimization\. Give the folder"):
        read_run(run)


def test_an_optimization_may_say_that_it_is_one(run: Path) -> None:
    change(run / "run.json", kind="optimization")
    assert read_run(run).settings.task == "digits"


@pytest.mark.parametrize("name", ["run.json", "result.json"])
@pytest.mark.parametrize("content", ["", '{"schema": 1, "task": "dig', "[1, 2]", '"text"', b"\xff\xfe\x00"])
def test_a_damaged_file_is_named_with_its_remedy(run: Path, name: str, content: str | bytes) -> None:
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CorruptRunError, match=rf"{name}.*--resume"):
        read_run(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "great"}, "'status' should be 'met', 'not_met' or 'interrupted', got \"great\""),
        ({"baseline": None}, "'baseline' should be an object, got null"),
        ({"evaluations": "many"}, "'evaluations' should be a finite number"),
        ({"evaluations": 1.5}, "'evaluations' should be a whole number"),
        ({"front": {}}, "'front' should be a list of objects"),
        ({"wall_s": float("nan")}, "'wall_s' should be a finite number"),
        ({"seed": True}, "'seed' should be a finite number, got true"),
        ({"chosen": {"steps": []}}, "chosen: 'score' should be an object, it is missing"),
        ({"score_drop": {"test": -0.1, "ci95": [1, 0]}}, "'ci95' should be a lower and an upper end"),
        ({"score_drop": {"test": -0.1, "ci95": [1]}}, "'ci95' should be a list of two numbers"),
        ({"latency_ratio": {"median": 1, "low": 1, "high": 1, "noisy": "no"}}, "'noisy' should be true or false"),
        ({"target": {"latency": 3}}, "'latency' should be text, got 3"),
    ],
)
def test_a_wrong_field_is_named(run: Path, changes: dict[str, Any], message: str) -> None:
    change(run / "result.json", **changes)
    with pytest.raises(CorruptRunError) as caught:
        read_run(run)
    assert message in str(caught.value)
    assert str(run / "result.json") in str(caught.value)


def test_a_run_without_a_result_is_unfinished(run: Path) -> None:
    (run / "result.json").unlink()
    found = read_run(run)
    assert found.result is None
    assert "still going, or was killed" in found.remarks[0]
    state = found.state()
    assert state["status"] == "unfinished"
    assert state["evaluations"] == 12
    assert state["target"] == {"latency": "<=0.2x"}
    json.dumps(state, allow_nan=False)


def test_optional_parts_are_left_out_with_a_sentence(run: Path) -> None:
    (run / "history.json").unlink()
    (run / "layers.json").write_text('[{"layer": 3}]')
    (run / "evaluations.jsonl").unlink()
    found = read_run(run)
    assert found.history == {}
    assert found.layers == ()
    assert found.evaluations == ()
    said = " ".join(found.remarks)
    assert "training curves are left out: there is no history.json" in said
    assert "table of layers is left out: layers.json is damaged" in said
    assert "no evaluations.jsonl" in said


@settings(max_examples=30)
@given(cut=st.integers(2, 400))
def test_a_torn_last_line_costs_only_itself(whole: Path, cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    torn = tmp_path_factory.mktemp("torn")
    for name in ("run.json", "result.json", "history.json", "layers.json"):
        (torn / name).write_bytes((whole / name).read_bytes())
    log = (whole / "evaluations.jsonl").read_bytes()
    last = len(log) - log.rstrip(b"\n").rfind(b"\n") - 1
    (torn / "evaluations.jsonl").write_bytes(log[: -min(cut, last - 1)])
    found = read_run(torn)
    assert [entry.trial for entry in found.evaluations] == list(range(59))
    assert found.remarks == ("The last line of evaluations.jsonl (line 60) was torn off, so it is not counted.",)


def test_a_last_line_that_only_lacks_its_end_counts(run: Path) -> None:
    log = run / "evaluations.jsonl"
    log.write_text(log.read_text().rstrip("\n"))
    assert len(read_run(run).evaluations) == 12
    log.write_text(log.read_text() + "\n}{\n")
    assert read_run(run).remarks == ("1 damaged lines of evaluations.jsonl are not counted (lines 13).",)


DEEP = "[" * 100_000


@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_a_file_nested_too_deep_is_named(run: Path, name: str) -> None:
    (run / name).write_text(DEEP)
    with pytest.raises(CorruptRunError, match=rf"{name} is not valid JSON"):
        read_run(run)
    with pytest.raises(CorruptRunError, match=rf"{name} is not valid JSON"):
        write_report(run)


def test_parts_nested_too_deep_are_left_out(run: Path) -> None:
    for name in ("history.json", "layers.json"):
        (run / name).write_text(DEEP)
    with (run / "evaluations.jsonl").open("a") as log:
        log.write(DEEP + "\n")
    found = read_run(run)
    assert (found.history, found.layers, len(found.evaluations), len(found.remarks)) == ({}, (), 12, 3)


def test_figures_that_cannot_be_are_named(run: Path) -> None:
    whole = json.loads((run / "result.json").read_text())["baseline"]
    times = {**whole["latency_ms"], "median": 0.0}
    for damage, words in (({"size_bytes": 10**400}, "'size_bytes' should be a"), ({"latency_ms": times}, "above 0")):
        change(run / "result.json", baseline={**whole, **damage})
        with pytest.raises(CorruptRunError, match=words):
            read_run(run)


def test_a_damaged_line_in_the_middle_is_counted_out(run: Path) -> None:
    lines = (run / "evaluations.jsonl").read_text().splitlines(keepends=True)
    lines[3] = "}{\n"
    lines[5] = '{"trial": 5, "state": "maybe"}\n'
    (run / "evaluations.jsonl").write_text("".join(lines))
    found = read_run(run)
    assert len(found.evaluations) == 10
    assert found.remarks == ("2 damaged lines of evaluations.jsonl are not counted (lines 4, 6).",)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(value=json_values)
def test_any_value_is_read_or_refused_by_name(value: Any) -> None:
    fields = Fields("result.json", {"key": value}, "Run it again.")
    for read in (fields.text, fields.number, fields.integer, fields.flag, fields.interval, fields.inner, fields.sizes):
        said = refusal(read)
        assert said is None or re.match(r"result.json: 'key(\[1\])?' should be", said)


def refusal(read: Callable[[str], object]) -> str | None:
    try:
        read("key")
    except CorruptRunError as error:
        return str(error)
    return None
