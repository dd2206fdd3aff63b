"""Facts about atoms, collected while the graph is walked: what is tied, what must stay, what changes statistics."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from netwright.core.graph.axes import Axis, Factor, IntArray

__all__ = ["Choice", "Constraints", "Mark", "Producer"]


@dataclass(frozen=True, eq=False)
class Mark:
    """Atoms that must stay, or whose removal changes statistics, with the operation that says so."""

    atoms: IntArray
    operation: str
    reason: str


@dataclass(frozen=True, eq=False)
class Producer:
    """Atoms that a module computes from its inputs: the output channels of a convolution, for example."""

    atoms: IntArray
    module: str
    kind: str


@dataclass(eq=False)
class Choice:
    """A product of factors whose elements have atoms of their own.

    Only one factor of a product can lose entries: if both did, an element would belong to two units. The factor that
    is chosen is tied to the elements, the others must stay.

    Args:
        elements: ``(size of factor 0, size of factor 1, ...)`` the atoms of the elements.
        factors: the atoms of each factor.
        operation: where the product was met.
        prefer: the factor to choose if it can lose entries at all; else the first that can.
    """

    elements: IntArray
    factors: tuple[IntArray, ...]
    operation: str
    prefer: int = 0


@dataclass(eq=False)
class Constraints:
    """All the facts about one graph. Memory grows with the number of distinct parameter and feature dimensions."""

    count: int = 0
    ties: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    frozen: list[Mark] = field(default_factory=list)
    inexact: list[Mark] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    producers: list[Producer] = field(default_factory=list)
    heads: list[IntArray] = field(default_factory=list)
    kept: set[tuple[str, int]] = field(default_factory=set)
    groups: dict[str, Axis] = field(default_factory=dict)
    _splits: dict[tuple[int, int], tuple[Factor, Factor, Factor, Choice]] = field(default_factory=dict)
    _joined: dict[tuple[int, int], tuple[Factor, Choice]] = field(default_factory=dict)
    _flat: dict[tuple[int, ...], tuple[Axis, IntArray]] = field(default_factory=dict)
    _fixed: set[int] = field(default_factory=set)

    def fresh(self, size: int, symbol: str = "") -> Axis:
        """A new axis of ``size`` entries that nothing is known about; empty for a length of one."""
        if symbol:
            return (Factor(size, None, symbol),)
        return () if size == 1 else (Factor(size, self._atoms(size)),)

    def _atoms(self, size: int) -> IntArray:
        atoms = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return atoms

    def freeze(self, axis: Axis, operation: str, reason: str) -> None:
        """No entry of ``axis`` may be removed."""
        for factor in axis:
            if factor.atoms is not None:
                self._fixed.add(id(factor))
                self.frozen.append(Mark(factor.atoms, operation, reason))

    def is_fixed(self, axis: Axis) -> bool:
        """Whether every static factor of ``axis`` is already known to stay."""
        return all(factor.atoms is None or id(factor) in self._fixed for factor in axis)

    def mark_inexact(self, axis: Axis, operation: str, reason: str) -> None:
        """Removing an entry of ``axis`` changes statistics that other entries see."""
        for factor in axis:
            if factor.atoms is not None:
                self.inexact.append(Mark(factor.atoms, operation, reason))

    def tie(self, a: Axis, b: Axis, operation: str) -> None:
        """Entry ``i`` of ``a`` and entry ``i`` of ``b`` go together; both stay where their products do not match."""
        if a is b:
            return
        if [(f.size, f.symbol) for f in a] == [(f.size, f.symbol) for f in b]:
            for f, g in zip(a, b, strict=True):
                if f is not g and f.atoms is not None and g.atoms is not None:
                    self.ties.append((f.atoms, g.atoms))
            return
        flat_a, flat_b = self.flat(a, operation), self.flat(b, operation)
        if flat_a is None or flat_b is None or flat_a.size != flat_b.size:
            for axis in (a, b):
                self.freeze(axis, operation, "it meets a dimension of another structure")
            return
        self.ties.append((flat_a, flat_b))

    def split(self, factor: Factor, first: int, operation: str) -> tuple[Factor, Factor]:
        """A static factor of size ``first * rest`` as the product of two; asked again, it gives the same."""
        key = (id(factor), first)
        if key not in self._splits:
            assert factor.atoms is not None
            parts = Factor(first, self._atoms(first)), Factor(factor.size // first, self._atoms(factor.size // first))
            assert parts[0].atoms is not None
            assert parts[1].atoms is not None
            choice = Choice(factor.atoms.reshape(first, -1), (parts[0].atoms, parts[1].atoms), operation)
            self.choices.append(choice)
            self._splits[key] = (*parts, factor, choice)
            self._joined[id(parts[0]), id(parts[1])] = (factor, choice)
            if id(factor) in self._fixed:
                self._fixed.update(id(part) for part in parts)
        return self._splits[key][:2]

    def join(self, factors: Sequence[Factor]) -> Axis:
        """The axis that is the product of ``factors``; two that were split from one factor become it again."""
        done: list[Factor] = []
        for factor in factors:
            done.append(factor)
            while len(done) > 1 and (id(done[-2]), id(done[-1])) in self._joined:
                whole, _ = self._joined[id(done[-2]), id(done[-1])]
                done[-2:] = [whole]
        return tuple(done)

    def regroup(self, factors: Sequence[Factor], shape: Sequence[tuple[int, str]], operation: str) -> list[Axis] | None:
        """``factors`` in row-major order, dealt out to dimensions of the given lengths; None where they do not fit."""
        queue = deque(factors)
        axes: list[Axis] = []
        for length, name in shape:
            dealt: list[Factor] = []
            size, symbol = length, name
            while size > 1 or symbol:
                if not queue:
                    return None
                factor = queue.popleft()
                if factor.symbol and (factor.symbol != symbol or size % factor.size):
                    return None
                if factor.symbol or size % factor.size == 0:
                    size, symbol = size // factor.size, "" if factor.symbol else symbol
                    dealt.append(factor)
                elif size > 1 and factor.size % size == 0:
                    first, rest = self.split(factor, size, operation)
                    dealt.append(first)
                    queue.appendleft(rest)
                    size = 1
                else:
                    return None
            axes.append(self.join(dealt))
        return None if queue else axes

    def flat(self, axis: Axis, operation: str) -> IntArray | None:
        """One atom for every entry of ``axis``; None where it is symbolic. Products get elements of their own."""
        if any(factor.atoms is None for factor in axis):
            return None
        if not axis:
            return self._atoms(1)
        if len(axis) == 1:
            return axis[0].atoms
        key = tuple(id(factor) for factor in axis)
        if key not in self._flat:
            sizes = tuple(factor.size for factor in axis)
            elements = self._atoms(prod(sizes))
            factors = tuple(factor.atoms for factor in axis if factor.atoms is not None)
            choice = Choice(elements.reshape(sizes), factors, operation)
            self.choices.append(choice)
            self._prefer_shuffle(axis, choice)
            self._flat[key] = (axis, elements)
        return self._flat[key][1]

    def _prefer_shuffle(self, axis: Axis, merged: Choice) -> None:
        """Two factors of one split that are merged the other way round are a channel shuffle: keep the finer units."""
        if len(axis) == 2 and (id(axis[1]), id(axis[0])) in self._joined:
            larger = int(axis[1].size > axis[0].size)
            merged.prefer = larger
            self._joined[id(axis[1]), id(axis[0])][1].prefer = 1 - larger

    def choose(self, elements: IntArray, factors: Sequence[Axis], prefer: int, operation: str) -> None:
        """``elements`` (a flat axis) are the product of ``factors``, of which only one can lose entries."""
        parts = [self.flat(factor, operation) for factor in factors]
        atoms = tuple(part for part in parts if part is not None)
        assert len(atoms) == len(factors), "factors of a choice are static"
        for part in atoms:
            if part.size == elements.size:  # not really a product: the elements are the one factor longer than one
                self.ties.append((elements, part))
                return
        self.choices.append(Choice(elements.reshape([part.size for part in atoms]), atoms, operation, prefer))
