"""JSON on disk: files that are replaced whole, logs that grow by whole lines, and what is read from them.

Finished lines are never lost: a reader passes over what a crash left of the last one, and the next writer cuts it off.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from netwright.core.errors import CorruptRunError, RunDirectoryError, SettingError
from netwright.core.files import atomic_write, remedy

__all__ = ["append_line", "read_json", "read_lines", "reading", "reading_line", "write_json"]

_WRONG = (AttributeError, IndexError, KeyError, OverflowError, SettingError, TypeError, ValueError)


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
    except (ValueError, RecursionError) as error:
        raise CorruptRunError(
            f"{path} is not valid JSON ({error}). It was truncated or edited; restore it, or start again in another "
            "folder."
        ) from error


def read_lines(path: Path) -> tuple[list[Any], int]:
    """Read a log of JSON objects, one in each line.

    A torn last line, as a crash leaves it, is passed over. One that only lacks its end, as an editor may leave it, is
    whole. Empty lines at the end count nothing.

    Returns:
        The values, and at which byte the last of them ends.

    Raises:
        CorruptRunError: a line that is not JSON and not torn, or a log that cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise CorruptRunError(f"{path} cannot be read: {error.strerror or error}. It must be a file.") from error
    values: list[Any] = []
    begin = end = 0
    lines = content.rstrip().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        torn = number == len(lines) and b"\n" not in content[begin + len(line) :]
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if torn:
                break
            raise CorruptRunError(
                f"{path}, line {number}, is not valid JSON. It was damaged after it was written; delete that line "
                "to go on without it."
            ) from error
        if torn and not isinstance(value, dict):  # an object that was cut off is no JSON, but a number may be
            break
        values.append(value)
        end = begin + len(line.rstrip())
        begin += len(line)
    return values, end


def append_line(path: Path, value: Any) -> None:
    """Add ``value`` as one line to a log; it is on disk when this returns.

    What a crash left of the line before is cut off; where an editor left that line without its end, it gets one.

    Raises:
        RunDirectoryError: the line cannot be written, for example on a full disk.
        CorruptRunError: the line before has no end, and there is a damaged one.
    """
    line = json.dumps(value, allow_nan=False).encode() + b"\n"
    try:
        with path.open("ab+") as log:
            _mend(path, log)
            start = log.seek(0, os.SEEK_END)
            try:
                log.write(line)
                log.flush()
                os.fsync(log.fileno())
            except OSError:
                os.ftruncate(log.fileno(), start)
                raise
    except OSError as error:
        raise RunDirectoryError(
            f"Cannot write {path}: {error.strerror or error}. {remedy(error)}, then go on with --resume."
        ) from error


def _mend(path: Path, log: BinaryIO) -> None:
    """See that a log ends with a whole line."""
    length = log.seek(0, os.SEEK_END)
    log.seek(max(0, length - 2))
    if log.read(2) in (b"", b"}\n"):
        return
    _, end = read_lines(path)
    log.truncate(end)
    if end:
        log.write(b"\n")


@contextmanager
def reading(where: Path | str, what: str) -> Iterator[None]:
    """Values are taken out of what JSON gave; where they are not as they should be, the error says so.

    Args:
        where: the file, and the place in it.
        what: what it should hold, such as "a plan".

    Raises:
        CorruptRunError: a part that is missing or of the wrong kind.

    Example:
        >>> with reading("plan.json", "a plan"):
        ...     int("many")
        Traceback (most recent call last):
        ...
        netwright.core.errors.CorruptRunError: plan.json does not hold a plan (ValueError: invalid literal for int() \
with base 10: 'many'). It was edited or damaged; restore it, or start again in another folder.
    """
    try:
        yield
    except _WRONG as error:
        raise CorruptRunError(
            f"{where} does not hold {what} ({type(error).__name__}: {error}). It was edited or damaged; restore it, or "
            "start again in another folder."
        ) from error


@contextmanager
def reading_line(log: Path | str, number: int) -> Iterator[None]:
    """The same of a line that tells of an evaluation, without which a run can go on.

    Args:
        log: the file.
        number: of the line, counted from 1.

    Raises:
        CorruptRunError: a part that is missing or of the wrong kind.
    """
    try:
        yield
    except _WRONG as error:
        raise CorruptRunError(
            f"{log}, line {number}, is not an evaluation ({type(error).__name__}: {error}). It was damaged after it "
            "was written; delete that line to go on without it."
        ) from error
