"""A process that reads a task from its standard input as a worker of the run will, and ends with 1 where it cannot.

Started by :func:`netwright.workshop.rehearsal.rehearse`; not for use by hand.
"""

import sys

import cloudpickle

from netwright.core.portable import unpacked

__all__ = ["main"]


def main() -> None:
    """Read, and say in the last line of standard error why that fails."""
    try:
        path, task = unpacked(sys.stdin.buffer.read())
        sys.path[:] = path
        cloudpickle.loads(task)  # the user's own, from the process that started this one
    except Exception as error:  # reading runs code of the task's own objects
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split()))


if __name__ == "__main__":
    main()
