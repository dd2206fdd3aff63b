"""A training state on disk: whole or not at all.

The file is a magic line, the SHA-256 of what follows, and a ``torch.save`` of tensors and plain values, read back
with ``weights_only=True``: nothing is unpickled, and a file that was cut short or damaged is told from a whole one.
"""

import copy
import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from netwright.core.errors import CorruptRunError, RunDirectoryError
from netwright.core.files import atomic_write

__all__ = ["load_checkpoint", "require_same", "save_checkpoint"]

_MAGIC = b"netwright checkpoint 1\n"
_DIGEST = hashlib.sha256().digest_size


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that at every moment ``path`` holds the old file or the new one.

    Memory: the state twice.

    Args:
        path: where; its folder must exist.
        state: tensors, numbers, strings, and dicts, lists and tuples of them; NumPy's numbers are written as Python's.

    Raises:
        RunDirectoryError: the disk is full or the folder cannot be written; the old file is left as it was.
    """
    buffer = io.BytesIO()
    torch.save(_plain(state), buffer)
    payload = buffer.getbuffer()
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(_MAGIC + hashlib.sha256(payload).digest())
        file.write(payload)


def _plain(state: Any) -> Any:
    """``state`` with Python's numbers in place of NumPy's, which ``weights_only`` would not read."""
    if isinstance(state, np.generic):
        return state.item()
    if isinstance(state, dict):
        found = copy.copy(state)  # a module's state has attributes
        found.update({name: _plain(value) for name, value in state.items()})
        return found
    return type(state)(map(_plain, state)) if type(state) in (list, tuple) else state


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state that :func:`save_checkpoint` wrote.

    Raises:
        CorruptRunError: a file that is truncated, damaged, or something else.
    """
    remedy = "Delete it to start the training anew."
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CorruptRunError(f"The checkpoint {path} cannot be read: {error.strerror or error}. {remedy}") from error
    start = len(_MAGIC) + _DIGEST
    if not content.startswith(_MAGIC):
        raise CorruptRunError(f"{path} is not a checkpoint of Netwright. {remedy}")
    if hashlib.sha256(content[start:]).digest() != content[len(_MAGIC) : start]:
        raise CorruptRunError(f"The checkpoint {path} is truncated or damaged. {remedy}")
    try:
        state = torch.load(io.BytesIO(content[start:]), map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise CorruptRunError(f"The checkpoint {path} holds what may not be loaded: {reason} {remedy}") from error
    if not isinstance(state, dict):
        raise CorruptRunError(f"{path} is not a checkpoint of a training. {remedy}")
    return state


def require_same(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Make sure that a checkpoint belongs to this training.

    Args:
        path: named in the message.
        saved: what the checkpoint says about its training, one value per aspect.
        wanted: the same of this training.

    Raises:
        RunDirectoryError: an aspect that differs, with both values.
    """
    for aspect in sorted(saved.keys() | wanted.keys()):
        before, now = saved.get(aspect), wanted.get(aspect)
        if before != now:
            raise RunDirectoryError(
                f"The checkpoint {path} belongs to another training: its {aspect} was {_brief(before)}, now it is "
                f"{_brief(now)}. Delete it, or name another file."
            )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
