"""A run directory: everything a run knows, written so that nothing finished is ever lost.

Whole files are replaced atomically (written beside, flushed to disk, renamed); a log grows by whole
lines, each flushed before the call returns. One process at a time owns the directory.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from netwright.core.errors import CorruptRunError, RunDirectoryError, RunLockedError
from netwright.core.files import UNFINISHED, atomic_write
from netwright.core.records import append_line, read_json, read_lines, write_json

__all__ = ["MARK", "RunDirectory"]

MARK = "run.json"
"""The file that makes a folder a run; it holds the settings."""
_LOCK = ".lock"


class RunDirectory:
    """A folder that one process owns while a run goes on.

    Args:
        path: the folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with RunDirectory(Path(folder) / "run").create({"task": "digits"}) as run:
        ...         run.append("log.jsonl", {"trial": 0})
        ...         run.lines("log.jsonl")
        [{'trial': 0}]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / _LOCK)

    def check_new(self) -> None:
        """Assure that a run can begin here; what a start that failed left behind does not count.

        Raises:
            RunDirectoryError: the path is a file, or a folder that is not empty or not writable.
            RunLockedError: a live process writes there.
        """
        nearest = next(folder for folder in (self.path, *self.path.absolute().parents) if os.path.exists(folder))
        if not nearest.is_dir():
            raise RunDirectoryError(f"{nearest} is a file. Give a folder with --out.")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise RunDirectoryError(f"Cannot write {self.path}: {nearest} is not writable. Give another with --out.")
        if nearest != self.path:
            return
        if (self.path / MARK).exists():
            self._check_unlocked()
            raise RunDirectoryError(
                f"{self.path} already holds a run. Go on with it by --resume, or give another folder with --out."
            )
        names = {entry.name for entry in self.path.iterdir()}
        if any(name != _LOCK and not (name.startswith(f".{MARK}.") and name.endswith(UNFINISHED)) for name in names):
            raise RunDirectoryError(
                f"{self.path} is not empty and not a Netwright run. Give an empty or a new folder with --out."
            )
        if _LOCK in names:
            self._check_unlocked()

    def check_old(self) -> None:
        """Assure that a run lies here and nobody else is writing it.

        Raises:
            RunDirectoryError: no run lies here, or it cannot be written.
            RunLockedError: a live process writes there.
        """
        if not os.path.exists(self.path / MARK):
            raise RunDirectoryError(f"{self.path} holds no run to resume: there is no {MARK} in it.")
        self._check_unlocked()

    def create(self, settings: Any) -> "RunDirectory":
        """Make the folder, own it, and write the run's settings into it."""
        self.check_new()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(f"Cannot make {self.path}: {error.strerror}.") from error
        self._own()
        try:
            self._drop_stale()
            write_json(self.path / MARK, settings)
        except BaseException:
            self.close()
            raise
        return self

    def open(self) -> "RunDirectory":
        """Own a folder that holds a run."""
        self.check_old()
        self._own()
        try:
            self._drop_stale()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Let others own the folder."""
        self._lock.release()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def settings(self) -> dict[str, Any]:
        """What the run was started with.

        Raises:
            CorruptRunError: the file is damaged, or holds no object.
        """
        found: Any = self.read(MARK)
        if not isinstance(found, dict):
            raise CorruptRunError(f"{self.path / MARK} lacks the settings of a run: it holds no object. Restore it.")
        return found

    def has(self, name: str) -> bool:
        """Whether a file of that name was written."""
        return (self.path / name).exists()

    def read(self, name: str, *fields: str) -> Any:
        """The JSON file ``name``, an object that has these ``fields``.

        Raises:
            CorruptRunError: the file is missing, truncated, not JSON, or lacks a field.
        """
        value = read_json(self.path / name)
        missing = [field for field in fields if not isinstance(value, dict) or field not in value]
        if missing:
            raise CorruptRunError(
                f"{self.path / name} lacks {', '.join(missing)}. It was edited, or another version wrote it; start "
                "again in another folder."
            )
        return value

    def content(self, name: str) -> bytes:
        """The bytes of the file ``name``.

        Raises:
            CorruptRunError: the file is missing or cannot be read.
        """
        path = self.path / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise CorruptRunError(
                f"{path} cannot be read: {error.strerror or error}. It belongs to the run; restore it, or start again "
                "in another folder."
            ) from error

    def write(self, name: str, value: Any) -> None:
        """Replace the JSON file ``name`` atomically."""
        write_json(self.path / name, value)

    def save(self, name: str, save: Callable[[Path], object]) -> Path:
        """Write any file atomically: ``save`` is called with a temporary path."""
        with atomic_write(self.path / name) as temporary:
            save(temporary)
        return self.path / name

    def append(self, name: str, value: Any) -> None:
        """Add one line to the log ``name``; it is on disk when this returns.

        What a crash left of the line before is cut off; where an editor left that line without its end, it gets one.

        Raises:
            RunDirectoryError: the line cannot be written, for example on a full disk.
            CorruptRunError: the line before has no end, and there is a damaged one.
        """
        append_line(self.path / name, value)

    def lines(self, name: str) -> list[Any]:
        """The values in the log ``name``."""
        return read_lines(self.path / name)[0]

    def _drop_stale(self) -> None:
        """Remove what was being written when the last process died."""
        for stale in self.path.glob(f".*{UNFINISHED}"):
            if stale.is_file() and not stale.is_symlink():
                stale.unlink(missing_ok=True)

    def _own(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise RunLockedError(
                f"{self.path} is being written by another running process. Wait for it, or stop it first."
            ) from error
        except OSError as error:
            raise RunDirectoryError(
                f"Cannot write {self.path}: {error.strerror or error}. Mend that, or give another folder with --out."
            ) from error

    def _check_unlocked(self) -> None:
        self._own()
        self.close()
