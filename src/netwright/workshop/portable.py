"""A task as bytes that another process of this run can read."""

import sys

import cloudpickle

from netwright.core.errors import NetwrightError
from netwright.core.task import FILE_MODULE
from netwright.workshop.evaluation import Subject

__all__ = ["portable"]


def portable(subject: Subject) -> bytes:
    """The import path and the subject as bytes; modules of task files travel whole.

    They go from one process of a run to another and never into a file.

    Raises:
        NetwrightError: a task that cannot be handed to another process.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(FILE_MODULE):
            cloudpickle.register_pickle_by_value(module)
    try:
        payload: bytes = cloudpickle.dumps((list(sys.path), cloudpickle.dumps(subject)))
    except Exception as error:  # pickling runs code of the task's own objects: whatever it raises is the user's to know
        raise NetwrightError(
            f"Task {subject.task.name!r} cannot be handed to a worker process: {type(error).__name__}: {error}. "
            "Give the dataset and the model as plain objects without open files, locks or connections."
        ) from error
    return payload
