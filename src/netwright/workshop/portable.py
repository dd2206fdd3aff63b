"""A task as bytes that another process of this run can read, and what that process answers."""

from collections.abc import Callable
from pathlib import Path

import cloudpickle

from netwright.core.errors import NetwrightError
from netwright.core.portable import packed
from netwright.workshop.evaluation import Evaluator, Outcome, Request, Subject

__all__ = ["evaluator", "outcome_of", "portable"]


def portable(subject: Subject) -> bytes:
    """The import path and the subject as bytes; see :func:`netwright.core.portable.packed`.

    Raises:
        NetwrightError: a task that cannot be handed to another process.
    """
    return packed(subject, f"Task {subject.task.name!r}")


def evaluator(subject: bytes, folder: Path | None = None) -> Callable[[Request], Outcome | NetwrightError]:
    """Evaluates the subject's candidates, or says at every one why the subject cannot be read in this process.

    Args:
        subject: as :func:`netwright.core.portable.unpacked` gives it.
        folder: for the files that are made on the way; see :class:`netwright.workshop.evaluation.Evaluator`.
    """
    try:
        # the user's own task, from the process that started this one
        return Evaluator(cloudpickle.loads(subject), folder=folder)
    except Exception as error:  # reading runs code of the task's own objects
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        found = NetwrightError(
            f"The task cannot be read in a worker process: {reason}. Remove the cause, then go on with --resume."
        )
        return lambda request: found


def outcome_of(answer: bytes) -> Outcome:
    """What a worker process answered.

    Raises:
        NetwrightError: it cannot read the task, so that no candidate is at fault.
    """
    found = cloudpickle.loads(answer)  # bytes of a process of this run
    if isinstance(found, NetwrightError):
        raise found
    assert isinstance(found, Outcome)
    return found
