"""A task as bytes that another process of this run can read."""

from netwright.core.portable import packed
from netwright.workshop.evaluation import Subject

__all__ = ["portable"]


def portable(subject: Subject) -> bytes:
    """The import path and the subject as bytes; see :func:`netwright.core.portable.packed`.

    Raises:
        NetwrightError: a task that cannot be handed to another process.
    """
    return packed(subject, f"Task {subject.task.name!r}")
