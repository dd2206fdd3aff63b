"""Ctrl-C and a journal: what is being written is written, then the interruption comes."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from netwright.core.errors import RunDirectoryError
from netwright.core.journal import new_journal, without_interruption


@pytest.fixture(autouse=True)
def _interrupts(monkeypatch: pytest.MonkeyPatch):
    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    yield
    signal.signal(signal.SIGINT, old)


def interrupted_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Ctrl-C right after the ``moment``-th removal of a file, as when the journal releases its lock."""
    unlink, seen = os.unlink, []

    def then_interrupt(*args, **more):
        unlink(*args, **more)
        seen.append(args)
        if len(seen) == moment:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "unlink", then_interrupt)


def trial(storage: JournalStorage) -> optuna.Study:
    study = optuna.create_study(storage=storage, study_name="s")
    study.tell(study.ask(), 1.0)
    return study


def test_an_interruption_comes_after_the_block() -> None:
    done = []

    def work() -> None:
        with without_interruption():
            signal.raise_signal(signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_one_nothing_comes_and_errors_pass() -> None:
    with without_interruption():
        pass
    with pytest.raises(ValueError, match="mine"), without_interruption():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_nothing_changes() -> None:
    found = []

    def work() -> None:
        with without_interruption():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_ctrl_c_while_the_lock_is_released(moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.journal"
    storage = new_journal(path)
    interrupted_at(monkeypatch, moment)
    with pytest.raises(KeyboardInterrupt):
        trial(storage)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["study.journal"], "no lock is left"
    optuna.delete_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(path))))


def test_optuna_alone_fails_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for all this: should it end, the wrapper can go."""
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
    interrupted_at(monkeypatch, 2)
    with pytest.raises(OSError, match=r"study\.journal"):
        trial(storage)


def test_what_an_earlier_run_left_goes(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    path.write_text("torn")
    path.with_name("study.journal.lock").symlink_to(path)
    assert trial(new_journal(path)).best_value == 1.0


_FULL = """
import resource, signal, sys
from pathlib import Path
import optuna
from netwright.core.errors import RunDirectoryError
from netwright.core.journal import new_journal
optuna.logging.disable_default_handler()
study = optuna.create_study(storage=new_journal(Path(sys.argv[1])))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    while True:
        study.tell(study.ask(), 1.0)
except RunDirectoryError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    command = [sys.executable, "-c", _FULL, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert not done.returncode, done.stderr
    assert done.stdout.startswith(f"Cannot write {path}: ")
    assert done.stdout.endswith("Free some space, then go on with --resume.\n")
    assert os.listdir(tmp_path) == ["study.journal"], "no lock is left"
    assert trial(new_journal(path)).best_value == 1.0


def test_a_place_where_no_journal_can_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"Cannot write .*gone/study\.journal: No such file"):
        new_journal(tmp_path / "gone" / "study.journal")
