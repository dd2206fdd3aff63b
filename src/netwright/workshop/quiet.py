"""A lock of the whole machine, so that latency is measured while nothing else of ours runs.

Work (training, exporting) holds the room together with other work; a measurement holds it alone. A
measurement that waits keeps new work out through a turnstile, so that it is never starved, and work
that runs long calls :meth:`QuietRoom.give_way` often. The locks are the kernel's (``flock``): they go
when their process does, however it ends.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["QuietRoom"]


class QuietRoom:
    """Many may work in it, or one may measure.

    Args:
        folder: where the lock files lie; by default one place for each user of the machine, so that
            two runs of Netwright do not disturb each other either.

    Example:
        >>> import tempfile
        >>> room = QuietRoom(Path(tempfile.mkdtemp()))
        >>> with room.work():
        ...     room.give_way()
        >>> with room.measure():
        ...     pass
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or Path(tempfile.gettempdir()) / f"netwright-{os.getuid()}"
        folder.mkdir(parents=True, exist_ok=True)
        self._turnstile = os.open(folder / "turnstile.lock", os.O_RDWR | os.O_CREAT, 0o600)
        self._room = os.open(folder / "room.lock", os.O_RDWR | os.O_CREAT, 0o600)

    def __del__(self) -> None:
        for handle in (self.__dict__.get("_turnstile"), self.__dict__.get("_room")):
            if handle is not None:
                os.close(handle)

    @contextmanager
    def work(self) -> Iterator[None]:
        """Hold the room together with others."""
        self._enter()
        try:
            yield
        finally:
            fcntl.flock(self._room, fcntl.LOCK_UN)

    def give_way(self) -> None:
        """Within :meth:`work`: let a waiting measurement pass. Costs microseconds when none waits."""
        fcntl.flock(self._room, fcntl.LOCK_UN)
        self._enter()

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Hold the room alone, once all work in it has given way. Not within :meth:`work`."""
        fcntl.flock(self._turnstile, fcntl.LOCK_EX)
        try:
            fcntl.flock(self._room, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._room, fcntl.LOCK_UN)
        finally:
            fcntl.flock(self._turnstile, fcntl.LOCK_UN)

    def _enter(self) -> None:
        fcntl.flock(self._turnstile, fcntl.LOCK_SH)
        fcntl.flock(self._room, fcntl.LOCK_SH)
        fcntl.flock(self._turnstile, fcntl.LOCK_UN)
