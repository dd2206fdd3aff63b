"""Groups of units that can be removed, read from the solved constraints."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from netwright.core.graph.axes import IntArray
from netwright.core.graph.solve import Solution
from netwright.core.graph.walk import Walk

__all__ = ["Blocked", "Group", "Kind", "Place", "find_blocked", "find_groups"]

Kind: TypeAlias = Literal["channels", "heads", "units"]
"""What the units of a group are."""
_Signature: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Place:
    """Where the units of a group lie in one dimension of one parameter or buffer.

    Args:
        parameter: its name, as in ``model.state_dict()``.
        dim: the dimension.
        index: ``(units, entries)`` the entries of that dimension that belong to each unit.
    """

    parameter: str
    dim: int
    index: IntArray


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can be removed, each on its own, as long as one remains.

    Args:
        name: the module that computes them first, unique in its graph.
        size: how many there are.
        exact: whether the smaller model equals the model whose units are zeroed. False where removal changes
            statistics, as for a residual stream under layer normalization.
        kind: "channels" of a convolution, "heads" of an attention, or "units" of a linear layer or embedding.
        places: every parameter entry that belongs to them.
        labels: ``(units,)`` their numbers in the graph.
    """

    name: str
    size: int
    exact: bool
    kind: Kind
    places: tuple[Place, ...]
    labels: IntArray = field(repr=False)

    def __repr__(self) -> str:
        note = "" if self.exact else ", changes statistics"
        return f"Group({self.name!r}, {self.size} {self.kind}{note}, {len(self.places)} places)"


@dataclass(frozen=True)
class Blocked:
    """What a module computes and has to stay as it is.

    Args:
        name: the module.
        operation: the operation that stopped it.
        reason: why.
    """

    name: str
    operation: str
    reason: str


def find_groups(walk: Walk, solution: Solution) -> tuple[Group, ...]:
    """Units with the same parameters, dimensions and numbers of entries are one group.

    Only what some module computes is a unit: the rows of a table of positions, for example, are not.
    Groups come in the order in which the graph computes them, units in the order of their entries.
    """
    where = [(name, dim) for name, value in walk.parameters.items() for dim, axis in enumerate(value.axes) if axis]
    labels = [_labels(walk, solution, name, dim) for name, dim in where]
    heads = _units(walk.constraints.heads, solution)
    producer = _first_producer(walk, solution)
    alike: dict[tuple[_Signature, bool, bool], list[int]] = defaultdict(list)
    for unit, entries in _signatures(labels, solution).items():
        if unit in producer:
            alike[tuple(entries), bool(solution.inexact[unit]), unit in heads].append(unit)
    ordered = {key: sorted(units, key=lambda unit: producer[unit]) for key, units in alike.items()}
    found = [
        (producer[units[0]], signature, inexact, head, np.array(units, dtype=np.int64))
        for (signature, inexact, head), units in ordered.items()
        if len(units) > 1
    ]
    used: Counter[str] = Counter()
    groups = []
    for first, signature, inexact, head, units in sorted(found, key=lambda item: item[:4]):
        made = walk.constraints.producers[first[0]]
        kind: Kind = "heads" if head else "channels" if made.kind == "channels" else "units"
        used[made.module] += 1
        unique = made.module if used[made.module] == 1 else f"{made.module}:{used[made.module]}"
        places = tuple(Place(*where[at], _index(units, labels[at], count)) for at, count in signature)
        groups.append(Group(unique, units.size, not inexact, kind, places, units))
    return tuple(groups)


def find_blocked(walk: Walk, solution: Solution, groups: tuple[Group, ...]) -> tuple[Blocked, ...]:
    """For every module with outputs that may not be removed, the first operation that keeps them."""
    found: dict[tuple[str, str, str], Blocked] = {}
    grouped = {unit for group in groups for unit in group.labels.tolist()}
    for producer in walk.constraints.producers:
        why = solution.why[solution.label[producer.atoms]]
        for index in np.unique(why[why >= 0])[:1].tolist():
            mark = solution.marks[index]
            blocked = Blocked(producer.module, mark.operation, mark.reason)
            found.setdefault((blocked.name, blocked.operation, blocked.reason), blocked)
        if (why < 0).all() and not grouped.intersection(solution.label[producer.atoms].tolist()):
            blocked = Blocked(producer.module, "coupling", "all that it computes is one unit, or differs in kind")
            found.setdefault((blocked.name, blocked.operation, blocked.reason), blocked)
    return tuple(found.values())


def _labels(walk: Walk, solution: Solution, name: str, dim: int) -> IntArray:
    atoms = walk.parameters[name].axes[dim][0].atoms
    assert atoms is not None, "parameters are static"
    return np.asarray(solution.label[atoms], dtype=np.int64)


def _signatures(labels: list[IntArray], solution: Solution) -> dict[int, list[tuple[int, int]]]:
    signatures: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for place, entries in enumerate(labels):
        units, counts = np.unique(entries[solution.why[entries] < 0], return_counts=True)
        for unit, count in zip(units.tolist(), counts.tolist(), strict=True):
            signatures[unit].append((place, count))
    return signatures


def _units(atoms: Iterable[IntArray], solution: Solution) -> set[int]:
    return {unit for part in atoms for unit in np.unique(solution.label[part]).tolist()}


def _first_producer(walk: Walk, solution: Solution) -> dict[int, tuple[int, int]]:
    """For every unit the producer that comes first, and which of its entries."""
    first: dict[int, tuple[int, int]] = {}
    for position, producer in enumerate(walk.constraints.producers):
        units, entries = np.unique(solution.label[producer.atoms], return_index=True)
        for unit, entry in zip(units.tolist(), entries.tolist(), strict=True):
            first.setdefault(unit, (position, entry))
    return first


def _index(units: IntArray, entries: IntArray, count: int) -> IntArray:
    """``(units, count)`` where each unit's entries are."""
    order = np.argsort(entries, kind="stable")
    starts = np.searchsorted(entries[order], units)
    return np.asarray(order[starts[:, None] + np.arange(count)], dtype=np.int64)
