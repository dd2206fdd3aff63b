"""One pass over memory for many tensors: which tensors the compiled kernels take, and how they are handed over.

An optimizer offers three forms of one equation: ``fused`` (the kernels of ``_fused.cpp``), ``foreach`` (torch's
operations on lists) and the same operations tensor by tensor. :func:`split` decides for each parameter.
"""

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from netwright.core.errors import SettingError
from netwright.optim import _compiled

__all__ = [
    "ADD",
    "ADD_AND_LOOK",
    "ADD_SQUARES",
    "APPROACH",
    "DIFFGRAD",
    "DISTANCE",
    "LERP",
    "LION",
    "SCALE",
    "SQUARES",
    "Kernel",
    "Row",
    "check_form",
    "gathered",
    "run",
    "split",
    "unfit",
    "update",
]

Row: TypeAlias = tuple[Tensor, ...]
"""The tensors that are read and written side by side, of one shape: a parameter, its gradient, its state, ..."""


class Kernel(NamedTuple):
    """A kernel of ``_fused.cpp``.

    Args:
        number: its place in the table there.
        arrays: tensors in a row.
        written: which of them it writes.
        scalars: numbers it takes.
    """

    number: int
    arrays: int
    written: tuple[int, ...]
    scalars: int


LION = Kernel(0, 3, (0, 2), 6)
DIFFGRAD = Kernel(1, 5, (0, 2, 3, 4), 7)
LERP = Kernel(2, 2, (0,), 1)
ADD = Kernel(3, 2, (0,), 1)
SCALE = Kernel(4, 1, (0,), 1)
SQUARES = Kernel(5, 1, (), 0)
DISTANCE = Kernel(6, 2, (), 0)
APPROACH = Kernel(7, 3, (0,), 1)
ADD_AND_LOOK = Kernel(8, 3, (0,), 2)
ADD_SQUARES = Kernel(9, 2, (0,), 1)

_PLAIN = (Tensor, torch.nn.Parameter)
_WIDE = {torch.float32: 0, torch.float64: 1}


def check_form(owner: object, group: dict[str, Any]) -> None:
    """Check the settings ``foreach`` and ``fused`` of a group.

    Raises:
        SettingError: neither None nor a bool, both True, or ``fused=True`` where that is not possible.
    """
    name = type(owner).__name__
    for setting in ("foreach", "fused"):
        if group[setting] is not None and not isinstance(group[setting], bool):
            raise SettingError(f"{name}: {setting} must be None, True or False, got {group[setting]!r}.")
    if group["foreach"] and group["fused"]:
        raise SettingError(f"{name}: foreach=True and fused=True exclude each other. Leave one of them None.")
    if group["fused"]:
        why = _compiled.missing() or next(filter(None, (unfit((_real(param),)) for param in group["params"])), "")
        if why:
            _refuse(name, why)


def split(owner: object, group: dict[str, Any], rows: Sequence[Row], kernel: Kernel) -> tuple[list[Row], list[Row]]:
    """The rows that the kernel takes, and those that are left for torch's operations.

    With ``fused=None`` the kernel takes what it can, unless ``foreach`` is set; under ``torch.compile``, which fuses by
    itself, it takes nothing. Tensors that are only read are copied where their layout is not that of the first.

    Args:
        owner: the optimizer, for messages.
        group: the parameter group.
        rows: parameter, gradient and state of each parameter.
        kernel: what would run.

    Raises:
        SettingError: the group says ``fused=True`` and the kernel cannot take some row.
    """
    wanted = group["fused"] or (group["fused"] is None and group["foreach"] is None)
    elsewhere = not group["fused"] and not any(row[0].is_cpu for row in rows)
    if not wanted or elsewhere or torch.compiler.is_compiling():
        return [], list(rows)
    taken: list[Row] = []
    left: list[Row] = []
    for row in rows:
        why = unfit(row, kernel.written)
        if why is None:
            taken.append(row)
        elif why == _LAYOUT:
            taken.append(tuple(_laid_out(entry, row[0]) for entry in row))
        elif group["fused"]:
            _refuse(type(owner).__name__, why)
        else:
            left.append(row)
    if taken and _compiled.load() is None:
        if group["fused"]:
            _refuse(type(owner).__name__, _compiled.missing())
        return [], list(rows)
    return taken, left


def update(group: dict[str, Any], rows: Sequence[Row], step: Callable[..., None], *scalars: float) -> None:
    """Call ``step(*lists, *scalars)`` on the rows that :func:`split` left.

    All at once with ``foreach=True`` and by default away from the CPU; else row by row, which is faster on a CPU as the
    tensors of a row stay in its caches.
    """
    for together in gathered(group, rows):
        step(*map(list, zip(*together, strict=True)), *scalars)


def gathered(group: dict[str, Any], rows: Sequence[Row]) -> list[list[Row]]:
    """The rows that one call is to take together, as :func:`update` has it."""
    return rows_of(rows) if _foreach(group, rows) else [[row] for row in rows]


def rows_of(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows by device and type."""
    found: dict[tuple[torch.device, torch.dtype], list[Row]] = {}
    for row in rows:
        found.setdefault((row[0].device, row[0].dtype), []).append(row)
    return list(found.values())


def _foreach(group: dict[str, Any], rows: Sequence[Row]) -> bool:
    if group["foreach"] is None:
        return all(not row[0].is_cpu and type(row[0]) in _PLAIN for row in rows)
    return bool(group["foreach"])


def run(kernel: Kernel, rows: Sequence[Row], *scalars: float) -> float:
    """Run a kernel over rows that it takes; the sum that it computes, if any.

    Args:
        kernel: what to run.
        rows: tensors of float32 or float64, without those that :func:`unfit` refuses.
        scalars: what the kernel takes.
    """
    if not rows:
        return 0.0
    library = _compiled.load()
    assert library is not None
    assert len(scalars) == kernel.scalars
    numbers = array("d", scalars)
    total = 0.0
    for together in rows_of(rows):
        lists = list(zip(*together, strict=True))
        assert len(lists) == kernel.arrays
        table = array("Q", [entry.data_ptr() for entries in lists for entry in entries])
        starts = array("q", [0])
        end = 0
        for entry in lists[0]:
            end += entry.numel()
            starts.append(end)
        part = library.netwright_run(
            kernel.number,
            _WIDE[together[0][0].dtype],
            kernel.arrays,
            len(together),
            table.buffer_info()[0],
            starts.buffer_info()[0],
            numbers.buffer_info()[0],
            torch.get_num_threads(),
        )
        if part < 0:
            raise MemoryError("No memory for a step of an optimizer.")
        total += part
        if kernel.written:
            increment_version([entry for place in kernel.written for entry in lists[place]])
    return total


_LAYOUT = "a tensor that is only read has another layout"


def unfit(row: Row, written: Sequence[int] = ()) -> str | None:
    """Why the kernels cannot take a row; None where they can."""
    first = row[0]
    dtype, shape = first.dtype, first.shape
    plain = True
    for entry in row:
        if type(entry) not in _PLAIN:
            return f"a tensor is a {type(entry).__name__}, not a plain tensor."
        if not entry.is_cpu:
            return f"a tensor is on {entry.device}, not on the CPU. On other devices use foreach=True."
        if entry.dtype is not dtype or dtype not in _WIDE:
            return f"a tensor is of type {entry.dtype}, and kernels are for float32 or float64 throughout."
        if entry.shape != shape:
            return f"tensors that belong together have the shapes {tuple(shape)} and {tuple(entry.shape)}."
        plain = plain and entry.is_contiguous() and not entry.is_neg()
    if plain:
        return None
    if any(entry.layout != torch.strided for entry in row):
        return "a tensor is not dense."
    if not _fills(first):
        return f"a tensor of shape {tuple(shape)} has gaps or repeats in memory: strides {first.stride()}."
    other = [place for place, entry in enumerate(row) if not _alike(entry, first)]
    if not other:
        return None
    return _LAYOUT if not set(other) & set(written) else "the state of a tensor has another layout than the tensor."


def _order(entry: Tensor) -> list[tuple[int, int]]:
    """Stride and length of the axes along which something lies."""
    return [(stride, count) for stride, count in zip(entry.stride(), entry.shape, strict=True) if count != 1]


def _fills(entry: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, in any order of the axes."""
    size = 1
    for stride, count in sorted(_order(entry)):
        if stride != size:
            return False
        size *= count
    return True


def _alike(entry: Tensor, like: Tensor) -> bool:
    """Whether memory holds the elements themselves, not their negatives, in the order of ``like``."""
    return _order(entry) == _order(like) and not entry.is_neg()


def _laid_out(entry: Tensor, like: Tensor) -> Tensor:
    if _alike(entry, like):
        return entry
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(entry)


def _real(param: Tensor) -> Tensor:
    return torch.view_as_real(param) if param.is_complex() else param


def _refuse(name: str, why: str) -> None:
    raise SettingError(f"{name}: fused=True is not possible here: {why} With fused=None it is used where it can be.")
