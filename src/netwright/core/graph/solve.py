"""Turns collected constraints into units: connected components of atoms, some of them frozen."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from netwright.core.graph.axes import IntArray
from netwright.core.graph.constraints import Choice, Constraints, Mark

__all__ = ["Solution", "solve"]


@dataclass(frozen=True, eq=False)
class Solution:
    """The units of a graph.

    Args:
        label: ``(atoms,)`` the unit of every atom.
        why: ``(labels,)`` for every unit the index into ``marks`` of what keeps it, -1 where it may be removed.
        inexact: ``(labels,)`` whether removing the unit changes statistics.
        marks: everything that keeps units.
    """

    label: IntArray
    why: IntArray
    inexact: npt.NDArray[np.bool_]
    marks: tuple[Mark, ...]


def solve(constraints: Constraints) -> Solution:
    """Ties first, then the choices one after the other, each seeing what the earlier ones keep.

    Time is linear in the number of atoms for the ties, and atoms times choices (one vectorized pass each) after that.
    """
    label = _components(constraints.count, constraints.ties)
    marks = list(constraints.frozen)
    why = np.full(constraints.count, -1, dtype=np.int64)
    for index in range(len(marks) - 1, -1, -1):
        why[label[marks[index].atoms]] = index
    for choice in constraints.choices:
        label, why = _decide(choice, label, why, marks)
    inexact = np.zeros(constraints.count, dtype=np.bool_)
    for mark in constraints.inexact:
        inexact[label[mark.atoms]] = True
    return Solution(label, why, inexact, tuple(marks))


def _components(count: int, ties: list[tuple[IntArray, IntArray]]) -> IntArray:
    if not ties:
        return np.arange(count, dtype=np.int64)
    rows = np.concatenate([a for a, _ in ties])
    columns = np.concatenate([b for _, b in ties])
    graph = coo_array((np.ones(rows.size, dtype=np.int8), (rows, columns)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _decide(choice: Choice, label: IntArray, why: IntArray, marks: list[Mark]) -> tuple[IntArray, IntArray]:
    free = [bool((why[label[atoms]] < 0).any()) for atoms in choice.factors]
    chosen = choice.prefer if free[choice.prefer] else next((i for i, f in enumerate(free) if f), choice.prefer)
    sizes = "x".join(str(size) for size in choice.elements.shape)
    for position, atoms in enumerate(choice.factors):
        if position != chosen:
            held = label[atoms]
            held = held[why[held] < 0]
            if held.size:
                why[held] = len(marks)
                marks.append(Mark(atoms, choice.operation, f"its shape {sizes} can only lose whole slices"))
    shape = [1] * choice.elements.ndim
    shape[chosen] = -1
    slices = np.broadcast_to(choice.factors[chosen].reshape(shape), choice.elements.shape)
    return _merge(label, why, label[choice.elements.ravel()], label[slices.ravel()])


def _merge(label: IntArray, why: IntArray, a: IntArray, b: IntArray) -> tuple[IntArray, IntArray]:
    """Labels ``a[i]`` and ``b[i]`` become one; what keeps either keeps both."""
    unique, local = np.unique(np.concatenate([a, b]), return_inverse=True)
    component = _components(unique.size, [(local[: a.size], local[a.size :])])
    target = np.full(unique.size, label.size, dtype=np.int64)
    np.minimum.at(target, component, unique)
    target = target[component]
    reason = np.full(why.size, np.iinfo(np.int64).max, dtype=np.int64)
    kept = why[unique] >= 0
    np.minimum.at(reason, target[kept], why[unique][kept])
    renamed = np.arange(why.size, dtype=np.int64)
    renamed[unique] = target
    why = why.copy()
    held = np.unique(target)
    why[held] = np.where(reason[held] < np.iinfo(np.int64).max, reason[held], -1)
    return renamed[label], why
