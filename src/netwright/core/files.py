"""Files that are whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from netwright.core.errors import NetwrightError, RunDirectoryError

__all__ = ["atomic_write"]


@contextmanager
def atomic_write(path: Path, error: type[NetwrightError] = RunDirectoryError) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it to ``path`` when the block ends well.

    A reader, or a process started after a crash, sees the old file or the new one, never a part.

    Args:
        path: the file to write.
        error: what is raised where it cannot be written.

    Raises:
        NetwrightError: of the type ``error``: no such folder, no right to write there, or a full disk.

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_write(folder / "a.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> os.listdir(folder)
        ['a.txt']
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as cause:
        raise error(
            f"Cannot write {path}: {cause.strerror or cause}. Free some space or choose another folder."
        ) from cause


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
