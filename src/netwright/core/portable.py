"""Objects as bytes that another process of the same run can read."""

import sys
from typing import Any

import cloudpickle

from netwright.core.errors import NetwrightError
from netwright.core.task import FILE_MODULE

__all__ = ["packed", "unpacked"]


def packed(value: object, what: str) -> bytes:
    """The import path and a value as bytes; modules of a user's own files travel whole.

    They go from one process of a run to another and never into a file.

    Args:
        value: what is to be handed over.
        what: how it is called in the message.

    Raises:
        NetwrightError: a value that cannot be handed to another process.

    Example:
        >>> path, inner = unpacked(packed({"width": 8}, "A setting"))
        >>> cloudpickle.loads(inner)
        {'width': 8}
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(FILE_MODULE):
            cloudpickle.register_pickle_by_value(module)
    try:
        payload: bytes = cloudpickle.dumps((list(sys.path), cloudpickle.dumps(value)))
    except Exception as error:  # pickling runs code of the user's own objects: whatever it raises is theirs to know
        raise NetwrightError(
            f"{what} cannot be handed to a worker process: {type(error).__name__}: {error}. "
            "Give the dataset and the model as plain objects without open files, locks or connections."
        ) from error
    return payload


def unpacked(payload: bytes) -> tuple[list[str], bytes]:
    """The import path, and the value as bytes that cloudpickle reads once that path is in use.

    Args:
        payload: of :func:`packed`, straight from the process that packed it.
    """
    found: Any = cloudpickle.loads(payload)  # bytes of the process that started this one, never of a file
    path, inner = found
    return list(path), bytes(inner)
