"""Candidates as rows of numbers: genes, which evolution changes, and features, which predictors see."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from netwright.search.space import Params, SearchSpace, from_unit, to_unit

__all__ = ["Encoding", "restored"]

Array: TypeAlias = NDArray[np.float64]


class Encoding:
    """Turns candidates of a space into rows and back.

    A gene is one number for each decision: the place in the range, in [0, 1], of an ordered one; the index of a
    categorical one's choice. Features are the places of ordered decisions (-1 where one does not count), an
    indicator for each choice of a categorical one, and the space's own.

    Args:
        space: what the candidates belong to.

    Attributes:
        names: of the decisions, in the order of the genes.
        choices: of each decision, 0 for an ordered one.
        nested: whether a choice is a tuple, which a store may give back as a list.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.names = list(space.decisions)
        distributions = list(space.decisions.values())
        self._distributions: list[BaseDistribution] = distributions
        self.choices = np.array(
            [len(d.choices) if isinstance(d, CategoricalDistribution) else 0 for d in distributions]
        )
        self.nested = any(
            isinstance(choice, tuple)
            for d in distributions
            if isinstance(d, CategoricalDistribution)
            for choice in d.choices
        )
        self._grids = [_grid(d) for d in distributions]
        self._known: dict[bytes, tuple[bool, bytes]] = {}
        self._described: dict[bytes, tuple[float, ...]] = {}

    def random(self, rng: np.random.Generator, count: int) -> Array:
        """Genes of random candidates, valid or not, ``(count, d)``."""
        units = rng.random((count, len(self.names)))
        return self.snap(np.where(self.choices > 0, np.floor(units * np.maximum(self.choices, 1)), units))

    def snap(self, genes: Array) -> Array:
        """Every ordered gene moved to the middle of its value's interval, so that equal candidates have equal genes.

        Genes of continuous decisions are rounded to nine digits, since they come back from their values with an error.
        """
        found: Array = np.where(self.choices > 0, genes, np.round(genes, 9))
        for column, count in enumerate(self._grids):
            if count:
                found[:, column] = (np.minimum(np.floor(found[:, column] * count), count - 1) + 0.5) / count
            elif isinstance(self._distributions[column], IntDistribution):
                distribution = self._distributions[column]
                values = [from_unit(distribution, float(gene)) for gene in found[:, column]]
                found[:, column] = np.round([to_unit(distribution, value) for value in values], 9)
        return found

    def genes(self, params: Params) -> Array:
        """The genes ``(d,)`` of a candidate; a decision it lacks is put in the middle, or on the first choice."""
        found: Array = self.rows([params])[0]
        return found

    def rows(self, many: Sequence[Params]) -> Array:
        """The genes of several candidates, ``(n, d)``."""
        decisions = self.space.decisions.items()
        found = [[self._gene(name, distribution, params) for name, distribution in decisions] for params in many]
        return self.snap(np.array(found, dtype=float).reshape(len(many), len(self.names)))

    def params(self, genes: Array) -> dict[str, Any]:
        """The candidate that a row of genes ``(d,)`` stands for."""
        return {
            name: distribution.choices[int(gene)]
            if isinstance(distribution, CategoricalDistribution)
            else from_unit(distribution, float(gene))
            for name, distribution, gene in zip(self.names, self._distributions, genes, strict=True)
        }

    def valid(self, genes: Array) -> NDArray[np.bool_]:
        """Which rows stand for valid candidates, ``(n,)``."""
        if not self.space.rules:
            return np.ones(len(genes), dtype=bool)
        return np.array([self._look(row)[0] for row in genes], dtype=bool)

    def keys(self, genes: Array) -> list[bytes]:
        """The same for two rows exactly where they are the same candidate."""
        rows = np.ascontiguousarray(genes)
        return [row.tobytes() for row in rows] if not self.space.active else [self._look(row)[1] for row in rows]

    def features(self, genes: Array) -> Array:
        """What predictors see, ``(n, f)``; the space's own features may know valid candidates only."""
        columns: list[Array] = []
        counts = self._counted(genes) if self.space.active else np.ones(genes.shape, dtype=bool)
        for column, choices in enumerate(self.choices):
            gene, on = genes[:, column], counts[:, column]
            if choices:
                columns.append((gene[:, None] == np.arange(choices)) & on[:, None])
            else:
                columns.append(np.where(on, gene, -1.0)[:, None])
        if self.space.features is not None:
            columns.append(np.array([self._own(row) for row in genes], dtype=float).reshape(len(genes), -1))
        return np.concatenate(columns, axis=1).astype(float)

    def _counted(self, genes: Array) -> NDArray[np.bool_]:
        rows = [self.space.reduced(self.params(row)) for row in genes]
        return np.array([[name in row for name in self.names] for row in rows], dtype=bool).reshape(genes.shape)

    def describes(self, params: Params) -> bool:
        """Whether the space's own features, where there are some, can be asked about a candidate."""
        if self.space.features is None or not self.space.rules:
            return True
        return bool(self.valid(self.rows([params]))[0])

    def _look(self, row: Array) -> tuple[bool, bytes]:
        """Validity and key of a row; remembered, since evolution meets rows again."""
        mark = row.tobytes()
        if mark not in self._known:
            if len(self._known) > 100_000:
                self._known.clear()
            params = self.params(row)
            valid = self.space.valid(params)
            counted = self.space.reduced(params)
            kept = np.where([name in counted for name in self.names], row, -1.0)
            self._known[mark] = valid, kept.tobytes()
        return self._known[mark]

    def _own(self, row: Array) -> tuple[float, ...]:
        """The space's own features of a row; remembered as well."""
        assert self.space.features is not None
        mark = row.tobytes()
        if mark not in self._described:
            if len(self._described) > 100_000:
                self._described.clear()
            own = self.space.features(self.space.reduced(self.params(row)))
            self._described[mark] = tuple(map(float, own))
        return self._described[mark]

    @staticmethod
    def _gene(name: str, distribution: BaseDistribution, params: Mapping[str, Any]) -> float:
        if isinstance(distribution, CategoricalDistribution):
            return float(distribution.to_internal_repr(params[name])) if name in params else 0.0
        return to_unit(distribution, params[name]) if name in params else 0.5


def _grid(distribution: BaseDistribution) -> int:
    """How many values an evenly stepped distribution has; 0 for another."""
    if (
        not isinstance(distribution, FloatDistribution | IntDistribution)
        or distribution.log
        or distribution.step is None
    ):
        return 0
    return int((distribution.high - distribution.low) / distribution.step + 1e-9) + 1


def restored(params: Params, space: SearchSpace) -> dict[str, Any]:
    """A candidate out of a store, with the space's own choices where JSON made lists of tuples."""
    return {name: _choice(space.decisions.get(name), value) for name, value in params.items()}


def _choice(distribution: BaseDistribution | None, value: Any) -> Any:
    if not isinstance(value, list) or not isinstance(distribution, CategoricalDistribution):
        return value
    same = (choice for choice in distribution.choices if json.loads(json.dumps(choice)) == value)
    return next(same, value)
