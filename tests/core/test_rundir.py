"""Run directories: atomic, locked, mended after a crash."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from netwright.core.errors import CorruptRunError, RunDirectoryError, RunLockedError
from netwright.core.files import UNFINISHED, atomic_write
from netwright.core.records import append_line, read_json, read_lines, write_json
from netwright.core.rundir import RunDirectory

HALF = f".run.json.{UNFINISHED}"


def test_settings_and_logs_come_back(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").create({"task": "digits"}) as run:
        run.append("log.jsonl", {"trial": 0})
        run.append("log.jsonl", {"trial": 1})
    with RunDirectory(tmp_path / "run").open() as again:
        assert again.settings == {"task": "digits"}
        assert again.lines("log.jsonl") == [{"trial": 0}, {"trial": 1}]


@given(cut=st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_a_log_cut_anywhere_keeps_every_whole_line(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("run") / "run"
    with RunDirectory(folder).create({}) as run:
        for number in range(8):
            run.append("log.jsonl", {"trial": number, "text": "é" * number})
    whole = (folder / "log.jsonl").read_bytes()
    (folder / "log.jsonl").write_bytes(whole[:cut])
    kept = whole[:cut].count(b"}")  # the last one may lack its end
    with RunDirectory(folder).open() as run:
        assert [line["trial"] for line in run.lines("log.jsonl")] == list(range(kept))
        run.append("log.jsonl", {"trial": 99})
        assert [line["trial"] for line in run.lines("log.jsonl")] == [*range(kept), 99]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(CorruptRunError, match="line 2"):
        read_lines(tmp_path / "log.jsonl")


def test_a_last_line_that_only_lacks_its_end_is_whole(tmp_path: Path) -> None:
    log, notes = tmp_path / "run" / "log.jsonl", tmp_path / "run" / "notes.jsonl"
    with RunDirectory(tmp_path / "run").create({}) as run:
        for trial in range(2):
            run.append(log.name, {"trial": trial})
    log.write_bytes(log.read_bytes().rstrip(b"\n"))
    notes.write_text('{"mine": 1')
    with RunDirectory(tmp_path / "run").open() as run:
        assert run.lines(log.name) == [{"trial": 0}, {"trial": 1}]
        run.append(log.name, {"trial": 2})
        assert run.lines(log.name) == [{"trial": 0}, {"trial": 1}, {"trial": 2}]
    assert notes.read_text() == '{"mine": 1', "a log that nobody asked for is left alone"


@pytest.mark.parametrize("rest", ["", "\n", "\r\n", "\n\n \n", "\n  ", '\n{"a": 2'])
def test_whatever_an_editor_or_a_crash_leaves_at_the_end(rest: str, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"a": 1}' + rest.encode())
    assert read_lines(log) == ([{"a": 1}], 8)
    append_line(log, {"a": 3})
    assert log.read_text() == '{"a": 1}\n{"a": 3}\n'


def test_a_damaged_last_line_is_not_lost_without_a_word(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    for damage in ("xx\n", '{"a": 2\n', "[" * 100_000 + "\n"):
        log.write_text('{"a": 1}\n' + damage)
        with pytest.raises(CorruptRunError, match="line 2, is not valid JSON"):
            read_lines(log)
    log.write_text('{"a": 1}\n12')
    assert read_lines(log) == ([{"a": 1}], 8), "cut off from 123, say"
    with pytest.raises(CorruptRunError, match="Is a directory"):
        read_lines(tmp_path)


def test_what_lies_in_the_folder_beside_the_run_stays(tmp_path: Path) -> None:
    place = tmp_path / "run"
    RunDirectory(place).create({}).close()
    for name in (".env.local", ".notes.md"):
        (place / name).write_text("mine")
    for name in (".a.b", "x.jsonl", f".b{UNFINISHED}"):
        (place / name).mkdir()
    (place / f".model.onnx.abc{UNFINISHED}").write_text("half")
    before = set(os.listdir(place))
    RunDirectory(place).open().close()
    assert set(os.listdir(place)) == before - {f".model.onnx.abc{UNFINISHED}"}


def test_a_resume_that_fails_lets_go_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunDirectory(tmp_path / "run").create({}).close()
    kept = RunDirectory(tmp_path / "run")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "glob", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kept.open()
    monkeypatch.undo()
    RunDirectory(tmp_path / "run").open().close()


def test_the_remedy_fits_the_cause(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").create({}) as run:
        shutil.rmtree(run.path)
        for write in (lambda: run.append("log.jsonl", {}), lambda: run.write("a.json", {})):
            with pytest.raises(RunDirectoryError, match=r"No such file or directory\. Put its folder back"):
                write()


def test_settings_that_are_no_object_are_named(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").create([]) as run, pytest.raises(CorruptRunError, match="holds no object"):
        _ = run.settings


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").create({}) as run:
        assert run.content("run.json") == b"{}\n"
        with pytest.raises(CorruptRunError, match=r"model\.onnx cannot be read: No such file"):
            run.content("model.onnx")


def test_truncated_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"schema": 1, "sta')
    with pytest.raises(CorruptRunError, match=r"result\.json is not valid JSON"):
        read_json(tmp_path / "result.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(CorruptRunError, match=r"deep\.json is not valid JSON"):
        read_json(tmp_path / "deep.json")
    with pytest.raises(CorruptRunError, match="missing"):
        read_json(tmp_path / "other.json")


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptRunError, match=f"{tmp_path} cannot be read: Is a directory"):
        read_json(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CorruptRunError, match=r"recipe\.json cannot be read: Not a directory"):
        read_json(tmp_path / "file" / "recipe.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": True})
    with pytest.raises(TypeError), atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text(42)  # as a serializer that fails half-way
    assert read_json(tmp_path / "a.json") == {"old": True}
    assert os.listdir(tmp_path) == ["a.json"]


def test_nan_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunDirectoryError, match="not empty"):
        RunDirectory(tmp_path).create({})
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="is a file"):
        RunDirectory(tmp_path / "file").check_new()
    with pytest.raises(RunDirectoryError, match="file is a file"):
        RunDirectory(tmp_path / "file" / "run").check_new()


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that every user may enter, as those of pytest are not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@contextmanager
def without_rights(folder: Path, mode: int = 0o555) -> Iterator[None]:
    """Inside, nothing can be written into a folder, also where the tests run as root."""
    folder.chmod(mode)
    root = os.geteuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)
        folder.chmod(0o755)


def test_a_folder_that_is_not_writable_is_refused(open_folder: Path) -> None:
    empty = RunDirectory(open_folder / "empty")
    empty.path.mkdir()
    with without_rights(empty.path):
        for new in (empty, RunDirectory(empty.path / "a"), RunDirectory(empty.path / "a" / "b")):
            with pytest.raises(RunDirectoryError, match=f"Cannot write {new.path}: {empty.path} is not writable"):
                new.check_new()
    with without_rights(open_folder, 0o700), pytest.raises(RunDirectoryError, match=f"{open_folder} is not writable"):
        RunDirectory(open_folder / "unseen" / "run").check_new()
    assert os.listdir(open_folder) == ["empty"]


def test_a_run_that_is_not_writable_is_refused(open_folder: Path) -> None:
    run = RunDirectory(open_folder / "run").create({})
    run.close()
    with without_rights(run.path):
        with pytest.raises(RunDirectoryError, match="run is not writable"):
            run.check_new()
        for begin in (run.check_old, run.open):
            with pytest.raises(RunDirectoryError, match=f"Cannot write {run.path}: Permission denied"):
                begin()
    with run.open():
        assert run.settings == {}


def test_an_old_run_is_not_overwritten_and_a_missing_one_not_resumed(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run").create({}).close()
    with pytest.raises(RunDirectoryError, match="--resume"):
        RunDirectory(tmp_path / "run").check_new()
    with pytest.raises(RunDirectoryError, match="no run to resume"):
        RunDirectory(tmp_path / "nothing").check_old()
    assert not (tmp_path / "nothing").exists()


_HOLD = """
import sys, time
from pathlib import Path
from netwright.core.rundir import RunDirectory
run = RunDirectory(Path(sys.argv[1])).create({})
print("held", flush=True)
time.sleep(60)
"""


def test_a_living_owner_locks_and_a_killed_one_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    owner = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"held\n"
    with pytest.raises(RunLockedError, match="another running process"):
        RunDirectory(folder).open()
    owner.kill()
    owner.wait()
    RunDirectory(folder).open().close()


_FULL = """
import resource, signal, sys
from pathlib import Path
from netwright.core.errors import RunDirectoryError
from netwright.core.rundir import RunDirectory
run = RunDirectory(Path(sys.argv[1])).create({})
run.append("log.jsonl", {"trial": 0})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (lambda: run.append("log.jsonl", {"text": "x" * 9000}), lambda: run.write("a.json", "y" * 9000)):
    try:
        write()
    except RunDirectoryError as error:
        print(error)
"""


def test_a_disk_that_takes_no_more_is_a_clear_error_and_tears_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("Cannot write") == 2
    assert read_lines(tmp_path / "run" / "log.jsonl") == ([{"trial": 0}], len(json.dumps({"trial": 0})))
    assert not (tmp_path / "run" / "a.json").exists()


def test_a_write_that_is_killed_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    program = (
        "import sys, itertools\nfrom pathlib import Path\nfrom netwright.core.records import write_json\n"
        "for n in itertools.count():\n    write_json(Path(sys.argv[1]), [n] * 5000)\n    print(n, flush=True)\n"
    )
    for wait in (0.0, 0.003, 0.011, 0.02):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "a.json")], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(wait)
        child.kill()
        child.wait()
        values = read_json(tmp_path / "a.json")
        assert len(values) == 5000
        assert len(set(values)) == 1


def test_limits_of_this_process_are_untouched() -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_file_that_lacks_a_field_is_named(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").create({"task": "digits"}) as run:
        run.write("plan.json", {"workers": 2})
        assert run.read("plan.json", "workers") == {"workers": 2}
        with pytest.raises(CorruptRunError, match=r"plan\.json lacks int8"):
            run.read("plan.json", "workers", "int8")


_INTERRUPTED = """
import os, sys
from pathlib import Path
from netwright.core import rundir
from netwright.core.files import UNFINISHED
rundir.write_json = lambda path, value: (path.parent / f".{path.name}.{UNFINISHED}").write_text("{") and os._exit(9)
rundir.RunDirectory(Path(sys.argv[1])).create({})
"""


def test_a_start_that_failed_can_be_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="JSON compliant"):
        RunDirectory(folder).create({"x": float("nan")})
    RunDirectory(folder).create({"x": 1}).close()
    killed = tmp_path / "killed"
    assert subprocess.run([sys.executable, "-c", _INTERRUPTED, str(killed)], check=False).returncode == 9
    assert sorted(os.listdir(killed)) == [".lock", HALF]
    with RunDirectory(killed).create({"x": 2}) as run:
        assert run.settings == {"x": 2}
        assert sorted(os.listdir(killed)) == [".lock", "run.json"]


def test_a_start_that_goes_on_elsewhere_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / HALF).write_text("{")
    with FileLock(tmp_path / ".lock"), pytest.raises(RunLockedError, match="another running process"):
        RunDirectory(tmp_path).create({})
    assert sorted(os.listdir(tmp_path)) == [".lock", HALF]
    (tmp_path / ".bashrc").write_text("")
    with pytest.raises(RunDirectoryError, match="not empty"):
        RunDirectory(tmp_path).create({})
    assert (tmp_path / HALF).exists()
