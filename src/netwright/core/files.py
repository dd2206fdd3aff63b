"""Files that are whole or not there."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from netwright.core.errors import NetwrightError, RunDirectoryError

__all__ = ["UNFINISHED", "atomic_write", "remedy"]

UNFINISHED = ".netwright-tmp"
"""What the name of a file ends in while it is written."""
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Make its folder writable"),
    errno.ENOENT: "Put its folder back",
}


def remedy(error: OSError) -> str:
    """What helps where a file could not be written.

    Example:
        >>> remedy(OSError(errno.ENOSPC, "No space left on device"))
        'Free some space'
    """
    return _REMEDIES.get(error.errno or 0, "Mend that")


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
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNFINISHED)
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
            f"Cannot write {path}: {cause.strerror or cause}. {remedy(cause)} or choose another folder."
        ) from cause


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
