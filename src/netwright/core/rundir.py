"""A run directory: everything a run knows, written so that nothing finished is ever lost.

Whole files are replaced atomically (written beside, flushed to disk, renamed); a log grows by whole
lines, each flushed before the call returns. One process at a time owns the directory.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from netwright.core.errors import CorruptRunError, RunDirectoryError, RunLockedError
from netwright.core.files import atomic_write

__all__ = ["MARK", "RunDirectory", "read_json", "read_lines", "write_json"]

MARK = "run.json"
"""The file that makes a folder a run; it holds the settings."""
_LOCK = ".lock"
_UNFINISHED = f".{MARK}."  # what the name of a settings file begins with while it is written


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, atomically; NaN and infinities are refused."""
    text = json.dumps(value, indent=1, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CorruptRunError: the file is missing, cannot be read, is truncated or not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CorruptRunError(f"{path} is missing, so {path.parent} is not a whole run.") from error
    except OSError as error:
        raise CorruptRunError(
            f"{path} cannot be read: {error.strerror or error}. It must be a file of JSON that you may read."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptRunError(
            f"{path} is not valid JSON ({error}). It was truncated or edited; restore it, or start again in another "
            "folder."
        ) from error


def read_lines(path: Path) -> tuple[list[Any], int]:
    """Read a log of JSON lines.

    A torn last line, as a crash leaves it, is passed over.

    Returns:
        The values, and the number of bytes that hold them (a torn line begins there).

    Raises:
        CorruptRunError: a line that is not JSON and not the last.
    """
    values: list[Any] = []
    sound = 0
    if not path.exists():
        return values, sound
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("line without an end")
            values.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise CorruptRunError(
                f"{path}, line {number}, is not valid JSON. It was damaged after it was written; delete that line "
                "to go on without that evaluation."
            ) from error
        sound += len(line)
    return values, sound


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
        if any(name != _LOCK and not name.startswith(_UNFINISHED) for name in names):
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
        """Own a folder that holds a run, and mend what a crash left of its logs."""
        self.check_old()
        self._own()
        self._drop_stale()
        for log in self.path.glob("*.jsonl"):
            _, sound = read_lines(log)
            with log.open("rb+") as handle:
                handle.truncate(sound)
        return self

    def close(self) -> None:
        """Let others own the folder."""
        self._lock.release()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def settings(self) -> Any:
        """What the run was started with."""
        return self.read(MARK)

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

        Raises:
            RunDirectoryError: the line cannot be written, for example on a full disk.
        """
        path = self.path / name
        line = json.dumps(value, allow_nan=False).encode() + b"\n"
        try:
            with path.open("ab") as log:
                start = log.tell()
                try:
                    log.write(line)
                    log.flush()
                    os.fsync(log.fileno())
                except OSError:
                    os.ftruncate(log.fileno(), start)
                    raise
        except OSError as error:
            raise RunDirectoryError(
                f"Cannot write {path}: {error.strerror or error}. Free some space, then go on with --resume."
            ) from error

    def lines(self, name: str) -> list[Any]:
        """The values in the log ``name``."""
        return read_lines(self.path / name)[0]

    def _drop_stale(self) -> None:
        """Remove what was being written when the last process died."""
        for stale in self.path.glob(".*.*"):
            if stale.name != _LOCK:
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
