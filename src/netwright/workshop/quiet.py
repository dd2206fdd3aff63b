"""A lock of the whole machine, so that latency is measured while nothing else of ours runs.

Work (training, exporting) holds the room together with other work; a measurement holds it alone. A
measurement that waits keeps new work out through a turnstile, so that it is never starved, and work
that runs long calls :meth:`QuietRoom.give_way` often. The locks are the kernel's (``flock``): they go
when their process does, however it ends. A process forked from it opens the files anew, for it would hold the locks
as long as it lives.
"""

import fcntl
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["QuietRoom"]

_rooms: "weakref.WeakSet[QuietRoom]" = weakref.WeakSet()


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
        self._folder = folder or Path(tempfile.gettempdir()) / f"netwright-{os.getuid()}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._open()
        _rooms.add(self)

    def _open(self) -> None:
        self._turnstile = os.open(self._folder / "turnstile.lock", os.O_RDWR | os.O_CREAT, 0o600)
        self._room = os.open(self._folder / "room.lock", os.O_RDWR | os.O_CREAT, 0o600)

    def _close(self) -> None:
        for handle in (self.__dict__.pop("_turnstile", None), self.__dict__.pop("_room", None)):
            if handle is not None:
                os.close(handle)

    def __del__(self) -> None:
        self._close()

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


def _leave_locks_to_parent() -> None:
    """In a process that was just forked."""
    for room in list(_rooms):
        room._close()
        room._open()


os.register_at_fork(after_in_child=_leave_locks_to_parent)
