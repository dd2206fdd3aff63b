"""Optuna's journal of a study in a file, written whole whatever moment Ctrl-C chooses."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from netwright.core.errors import RunDirectoryError
from netwright.core.files import remedy

__all__ = ["new_journal", "without_interruption"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def new_journal(path: Path) -> JournalStorage:
    """An empty journal; what an earlier run left in its place, a lock included, goes.

    Args:
        path: the file.

    Raises:
        RunDirectoryError: now or whenever the journal grows, it cannot be written, for example on a full disk.
    """
    with _writing(path):
        for stale in (path, path.with_name(path.name + ".lock")):
            stale.unlink(missing_ok=True)
        return JournalStorage(_Backend(str(path)))


class _Backend(JournalFileBackend):
    """Optuna releases its lock in two steps, and fails with an error of its own where Ctrl-C comes between them."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with _writing(Path(self._file_path)), without_interruption():
            super().append_logs(logs)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(
            f"Cannot write {path}: {error.strerror or error}. {remedy(error)}, then go on with --resume."
        ) from error


@contextmanager
def without_interruption() -> Iterator[None]:
    """SIGINT and SIGTERM that come within are answered at the end, as they would have been.

    In other threads than the main one, where no signal is answered, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    held = [number for number, handler in handlers.items() if callable(handler)]
    for number in held:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number in held:
            signal.signal(number, handlers[number])
        for answer in came:
            signal.raise_signal(answer)
