"""Every mistake of a user: one clear message, exit code 2, nothing written."""

import sys
from pathlib import Path

import pytest
from filelock import FileLock

from netwright.cli import main

TASKS = Path(__file__).with_name("bad_tasks.py")


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["netwright", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    place: Path,
    *words: str,
    out: bool = True,
) -> str:
    """The message of a command that must fail and leave ``place`` as it is."""
    monkeypatch.chdir(place)
    before = sorted((path, path.stat().st_mtime_ns) for path in place.rglob("*"))
    code = run(monkeypatch, *words, *(["--out", "run"] if out else []))
    captured = capsys.readouterr()
    assert code == 2, captured
    said = captured.err
    assert 1 <= len(said.strip().splitlines()) <= 2, captured.err
    assert said.startswith("Error: ")
    assert "Traceback" not in captured.err + captured.out
    assert sorted((path, path.stat().st_mtime_ns) for path in place.rglob("*")) == before, "nothing was written"
    return captured.err


def optimize(task: str, target: str = "latency<=0.5x", *more: str) -> tuple[str, ...]:
    return ("optimize", task, "--target", target, "--budget", "20s", *more)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raising", ["raised RuntimeError", "the disk of the data is not mounted"]),
        ("wrong_type", ["is a dict, not a netwright.Task"]),
        ("not_callable", ["is a int, not a netwright.Task"]),
        ("missing", ["defines no 'missing'"]),
        ("empty_split", ["Data.val is empty"]),
        ("same_split", ["Two of train, val and test are the same"]),
        ("overlapping", ["Data.train and Data.val overlap", "of 20 items"]),
        ("wrong_shape", ["Data.train[5] is", "5 float32", "4 float32"]),
        ("not_a_number", ["Data.train[7]", "NaN or infinite"]),
        ("vector_loss", ["loss", "scalar"]),
        ("nothing_to_do", ["Nothing in this network can be pruned or quantized"]),
        ("wrong_inputs", ["Linear does not accept a batch of inputs"]),
        ("broken_builder", ["building the model failed: TypeError"]),
        ("no_score", ["give score="]),
    ],
)
def test_a_wrong_task_is_named(
    name: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    message = refused(monkeypatch, capsys, tmp_path, *optimize(f"{TASKS}:{name}"))
    for word in words:
        assert word in message


def test_a_model_that_does_not_trace_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    # torch.export prints the graph that it had so far before it raises
    message = refused(monkeypatch, capsys, tmp_path, *optimize(f"{TASKS}:untraceable"))
    assert "Branching cannot be traced by torch.export" in message


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nowhere_to_be_found\n", "raised ModuleNotFoundError while it was imported"),
        ("1 / 0\n", "raised ZeroDivisionError while it was imported: division by zero"),
        ("def task(:\n", "raised SyntaxError while it was imported"),
        ("", "defines no 'task'"),
    ],
)
def test_a_task_file_that_cannot_be_imported_is_named(
    source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "mine.py").write_text(source)
    message = refused(monkeypatch, capsys, tmp_path, *optimize("mine.py:task"))
    assert "mine.py" in message
    assert words in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (optimize("nowhere"), "No task 'nowhere'. Built in are breast-cancer, digits"),
        (optimize("gone.py:task"), "No file gone.py"),
        (optimize("no.such.module:task"), "Module no.such.module cannot be imported"),
        (optimize("breast-cancer", "speed<=0.5x"), "Unknown metric 'speed'"),
        (optimize("breast-cancer", "accuracy<=0.5x"), "Unknown metric 'accuracy'"),
        (optimize("breast-cancer", "score>=0.9"), "Unknown metric 'score'"),
        (optimize("breast-cancer", "latency<=0.5parsec"), "Unknown unit 'parsec' for latency"),
        (optimize("breast-cancer", "size<=5ms"), "Unknown unit 'ms' for size"),
        (optimize("breast-cancer", "latency>=0.5x"), "needs the operator <="),
        (optimize("breast-cancer", "latency<=0x"), "must be positive"),
        (optimize("breast-cancer", "[bold]"), "'[bold]' is not a target"),
        (optimize("breast-cancer", "latency<=0.5x", "--keep", "latency>=1"), "--keep speaks of the score"),
        (optimize("breast-cancer", "latency<=0.5x", "--keep", "score<=1"), "--keep needs the operator >="),
        (optimize("breast-cancer", "latency<=0.5x", "--budget", "soon"), "'soon' is not a length of time"),
        (optimize("breast-cancer", "latency<=0.5x", "--resume"), "run holds no run to resume"),
    ],
)
def test_a_wrong_word_is_named(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert said in refused(monkeypatch, capsys, tmp_path, *words)


def test_a_dry_run_refuses_what_the_run_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = optimize(f"{TASKS}:empty_split", "latency<=0.5x", "--dry-run")
    assert "Data.val is empty" in refused(monkeypatch, capsys, tmp_path, *words)
    (tmp_path / "run").write_text("a file")
    words = optimize(f"{TASKS}:good", "latency<=0.5x", "--dry-run")
    assert "run is a file" in refused(monkeypatch, capsys, tmp_path, *words)


def test_an_output_folder_that_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run").write_text("precious")
    assert "run is a file" in refused(monkeypatch, capsys, tmp_path, *optimize(f"{TASKS}:good"))


def test_an_output_folder_with_other_things_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    assert "not empty and not a Netwright run" in refused(monkeypatch, capsys, tmp_path, *optimize(f"{TASKS}:good"))


def test_an_output_folder_that_a_live_run_owns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with FileLock(tmp_path / "run" / ".lock"):
        for more in ((), ("--resume",)):
            words = optimize(f"{TASKS}:good", "latency<=0.5x", *more)
            assert "another running process" in refused(monkeypatch, capsys, tmp_path, *words)


def test_an_old_run_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / ".lock").write_text("")
    assert "already holds a run" in refused(monkeypatch, capsys, tmp_path, *optimize(f"{TASKS}:good"))


def test_an_optimization_does_not_go_on_with_the_folder_of_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("")
    (tmp_path / "run" / "run.json").write_text('{"schema": 1, "kind": "training", "task": "breast-cancer", "seed": 0}')
    (tmp_path / "run" / "model.safetensors").write_text("precious")
    for more in (("--resume",), ("--resume", "--dry-run")):
        words = optimize("breast-cancer", "latency<=0.5x", *more)
        assert "run holds a training, not an optimization" in refused(monkeypatch, capsys, tmp_path, *words)


def test_replay_of_a_folder_without_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "old").mkdir()
    message = refused(monkeypatch, capsys, tmp_path, "replay", "old")
    assert "old holds no recipe.json" in message
    assert "--resume" in message


def test_report_of_what_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for more in ((), ("--json",)):
        message = refused(monkeypatch, capsys, tmp_path, "report", "nowhere", *more, out=False)
        assert "nowhere" in message
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"schema": 1')
    assert "run.json" in refused(monkeypatch, capsys, tmp_path, "report", "run", out=False)


def test_measure_names_missing_and_wrong_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ("measure", "breast-cancer", "--weights")
    assert "gone.safetensors" in refused(monkeypatch, capsys, tmp_path, *words, "gone.safetensors", out=False)
    (tmp_path / "bad.safetensors").write_text("not weights")
    assert "bad.safetensors" in refused(monkeypatch, capsys, tmp_path, *words, "bad.safetensors", out=False)
    assert "No task 'nowhere'" in refused(monkeypatch, capsys, tmp_path, "measure", "nowhere", out=False)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"schema": 1}'])
def test_replay_of_what_is_no_recipe(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if content is not None:
        (tmp_path / "recipe.json").write_text(content)
    assert "recipe.json" in refused(monkeypatch, capsys, tmp_path, "replay", "recipe.json")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--compare", "sgd,sdg"], "Did you mean sgd"),
        (["--compare", ","], "different optimizers"),
        (["--set", "epoch=3"], "Did you mean epochs"),
        (["--set", "lr"], "key=value"),
        (["--lrs", "1e-3;1e-2"], "must be numbers"),
        (["--recipe", "nowhere.json"], "cannot be read"),
        (["--resume"], "no run to resume"),
        (["--set", "optimizer=torch.optim:Nothing"], "cannot be imported"),
        (["--set", "optimizer.beta=0.9"], "refuses the settings"),
    ],
)
def test_train(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path, words, said) -> None:
    assert said in refused(monkeypatch, capsys, tmp_path, "train", "breast-cancer", *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "Prun"], "Did you mean Prune"),
        (["--method", "compare"], "has no method 'compare'"),
        (["--method", "Prune", "--set", "ratios=1.5"], "must lie in [0, 1), got 1.5"),
        (["--method", "Prune", "--set", "ratio=0.5"], "Prune refuses the settings {'ratio': 0.5}"),
        (["--method", "Prune", "--set", "ratios"], "key=value"),
        (["--method", "Prune", "--set", "Int8.weight=int8"], "'Int8' is not among the methods Prune"),
        (["--method", "Prune", "--method", "Int8", "--set", "ratios=0.5"], "whose? Write Prune.ratios=0.5"),
        (["--method", "Prune", "--method", "Prune"], "names one method twice"),
        (["--method", "torch.nn:ReLU"], "ReLU"),
        (["--method", "Prune", "--resume"], "no run to resume"),
    ],
)
def test_compress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path, words, said) -> None:
    assert said in refused(monkeypatch, capsys, tmp_path, "compress", "breast-cancer", *words)
