"""The integer programme that sizes the engines of an accelerator."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from netwright.core.front import non_dominated
from netwright.search._hao_model import Convolution, Device, Engine, Subgraph, UnprovenError, cycles, weight_traffic

__all__ = ["Programme", "unbeaten"]

Array: TypeAlias = NDArray[np.float64]


class Programme:
    """The rows of the integer programme; variables are every option of every kind, then the time of every subgraph."""

    def __init__(self, engines: Sequence[Engine], first: dict[str, int], sizes: dict[str, int]) -> None:
        self._engines, self._first, self._sizes = engines, first, sizes
        self._rows: list[Array] = []
        self._groups: list[int] = []
        self._bounds: list[float] = []
        self._times: list[int] = []
        self._least = 0.0

    def add(self, group: Subgraph, times: int, bytes_per_cycle: float) -> None:
        """A subgraph that runs ``times`` times: ``sum of a_o x_o - T_g <= bound`` for each layer and the traffic."""
        traffic, fastest = np.zeros(len(self._engines)), 0.0
        for layer in group:
            spent = np.zeros(len(self._engines))
            for place in self._places(layer.kind):
                spent[place] = cycles(layer, self._engines[place])
                traffic[place] = weight_traffic(layer, self._engines[place].rows) / bytes_per_cycle
            self._row(spent, 0.0)
            fastest = max(fastest, float(min(spent[place] for place in self._places(layer.kind))))
        self._row(traffic, -(group[0].input_bytes + group[-1].output_bytes) / bytes_per_cycle)
        self._times.append(times)
        self._least += times * fastest

    def solve(self, device: Device, seconds: float) -> list[int]:
        """The places of the chosen engines.

        Raises:
            UnprovenError: not found in so many seconds.
        """
        unit, count = self._least / 100, len(self._times)  # the optimum is at least 100, HiGHS' gap at most 1e-6 of one
        slots = np.zeros((len(self._rows), count))
        slots[np.arange(len(self._rows)), self._groups] = -1.0
        limits = sparse.csr_array(np.hstack([np.array(self._rows) / unit, slots]))
        used = np.zeros((2, len(self._engines) + count))
        used[0, : len(self._engines)] = [engine.dsps / device.dsps for engine in self._engines]
        used[1, : len(self._engines)] = [engine.buffer_kb / device.buffer_kb for engine in self._engines]
        once = np.zeros((len(self._sizes), len(self._engines) + count))
        for row, kind in zip(once, self._sizes, strict=True):
            row[self._places(kind)] = 1.0
        found = optimize.milp(
            np.concatenate([np.zeros(len(self._engines)), np.array(self._times, dtype=float)]),
            integrality=np.repeat([1, 0], [len(self._engines), count]),
            bounds=optimize.Bounds(0, np.repeat([1.0, np.inf], [len(self._engines), count])),
            constraints=[
                optimize.LinearConstraint(limits, ub=np.array(self._bounds) / unit),
                optimize.LinearConstraint(used, ub=1.0),
                optimize.LinearConstraint(once, lb=1.0, ub=1.0),
            ],
            options={"time_limit": seconds, "mip_rel_gap": 0.0},
        )
        if found.status != 0:
            raise UnprovenError(
                f"No proven optimum after {seconds:g} s ({found.message}). "
                "Raise seconds, or give fewer unrolls or rows."
            )
        return [int(place) for place in np.flatnonzero(found.x[: len(self._engines)] > 0.5)]

    def _row(self, spent: Array, bound: float) -> None:
        self._rows.append(spent)
        self._groups.append(len(self._times))
        self._bounds.append(bound)

    def _places(self, kind: str) -> range:
        return range(self._first[kind], self._first[kind] + self._sizes[kind])


def unbeaten(engines: Sequence[Engine], layers: Sequence[Convolution]) -> list[Engine]:
    """The engines that no other beats in resources, cycles and traffic of every layer at once."""
    own = [layer for layer in dict.fromkeys(layers) if layer.kind == engines[0].kind]
    rows = [
        (
            engine.dsps,
            engine.buffer_kb,
            *(cycles(layer, engine) for layer in own),
            *(weight_traffic(layer, engine.rows) for layer in own),
        )
        for engine in engines
    ]
    table, places = np.unique(np.array(rows, dtype=float), axis=0, return_index=True)
    return [engines[int(place)] for place in places[non_dominated(table)]]
