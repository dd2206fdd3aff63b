"""HAO: the accelerator that suits a network best, by an integer programme; what is left to search is the network."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from netwright.search._hao_model import (
    Convolution,
    Device,
    Engine,
    MappingError,
    Subgraph,
    UnprovenError,
    engine_for,
    subgraph_cycles,
    subgraphs,
)
from netwright.search._hao_programme import Programme, unbeaten
from netwright.search._hao_trace import convolutions
from netwright.search.space import Params, Rule, SearchSpace

__all__ = [
    "ZU3EG",
    "Convolution",
    "Device",
    "Engine",
    "HAOMapper",
    "HardwareMapping",
    "MappingError",
    "UnprovenError",
    "convolutions",
]

ZU3EG = Device(dsps=360, buffer_kb=972.0, bandwidth_gbs=4.3)
"""The Zynq UltraScale+ of the paper: 360 DSP slices, 216 memory blocks of 36 kbit, 32 bits of LPDDR4."""

Workload: TypeAlias = Callable[[Params], Sequence[Convolution]]
"""The convolutions of a candidate, in the order in which they run."""


@dataclass(frozen=True)
class HardwareMapping:
    """An accelerator configuration and how fast it runs the network that it was made for.

    Attributes:
        latency_ms: of one image.
        engines: by kind of convolution.
        subgraphs: what runs at the same time, in the order of execution.
        subgraph_ms: time of each.
        dsps: multipliers used.
        buffer_kb: on-chip memory used.
    """

    latency_ms: float
    engines: dict[str, Engine]
    subgraphs: tuple[Subgraph, ...]
    subgraph_ms: tuple[float, ...]
    dsps: int
    buffer_kb: float


@dataclass(frozen=True)
class HAOMapper:
    r"""Finds the fastest accelerator for a network under a device's resources.

    Reach for it to search networks for an FPGA or the like, where each network deserves hardware of its own: the joint
    search over networks and hardware becomes a search over networks alone (:meth:`restrict`).

    The accelerator has one engine for each kind of convolution ``k``. Consecutive layers of different kinds form a
    subgraph ``g`` and run at the same time, rows streaming from engine to engine; subgraphs run one after the other.
    Options ``o`` of an engine are its parallelism ``P_in x P_out`` and the rows ``R`` of a tile; ``x_ko = 1`` chooses
    one. The programme is

    ``minimize    sum over g of T_g``

    ``subject to  T_g >= sum over o of cycles(l, o) x_ko``   for each layer ``l`` of ``g``, ``k`` its kind,

    ``            T_g >= (in_g + out_g + sum over l, o of weights(l, o) x_ko) / B``

    ``            sum over o of x_ko = 1``,   ``x_ko`` 0 or 1,

    ``            sum over k, o of dsps(k, o) x_ko <= D``,   ``sum over k, o of buffer(k, o) x_ko <= M``,

    with ``B`` the bytes of bandwidth a cycle, ``in_g`` and ``out_g`` the bytes of a subgraph's first input and last
    output, ``weights`` the bytes of a layer's weights times its number of tiles. HiGHS solves it to proven optimality.
    An engine has the bits of the widest of its layers; one DSP takes 1, 2 or 4 products a cycle at 16, 8 or 4 bits.

    Args:
        device: the resources.
        unrolls: what ``P_in`` and ``P_out`` are chosen from.
        rows: what ``R`` is chosen from.
        seconds: limit of one programme's time.

    Raises:
        MappingError: choices that are not positive whole numbers, or a time that is not positive.

    Example:
        >>> block = [Convolution(16, 64, 28, 28), Convolution(64, 64, 28, 28, kernel=3, groups=64)]
        >>> mapper = HAOMapper(Device(dsps=64, buffer_kb=200, bandwidth_gbs=4))
        >>> found = mapper.map([*block, Convolution(64, 16, 28, 28)])
        >>> {kind: engine.dsps for kind, engine in found.engines.items()}
        {'1x1': 32, 'depthwise 3x3': 32}
        >>> found.dsps, round(found.latency_ms, 3)
        (64, 0.125)

    Source: paper 109: Dong, Gao, Huang, Wawrzynek, So and Keutzer, "HAO: Hardware-aware neural Architecture
        Optimization for Efficient Inference", 2021, arXiv 2104.12766.

    Differs: the model of latency and resources is this module's own; multipliers are DSPs only, never logic cells, and
        the bits of a layer belong to the network, not to the hardware. Residual additions cost nothing. Options that
        another one beats in every respect are left out beforehand, which changes no optimum.

    Cost: with ``n`` options of each engine, ``O(n^2)`` to leave out the beaten ones; then the programme, usually well
        below a second, at worst exponential in the options that are left.
    """

    device: Device
    unrolls: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("unrolls", "rows"):
            choices = getattr(self, name)
            if not choices or any(not isinstance(choice, int) or choice < 1 for choice in choices):
                raise MappingError(f"{name} must be whole numbers of at least 1, got {choices!r}.")
        if not self.seconds > 0:
            raise MappingError(f"seconds must be positive, got {self.seconds}.")

    def options(self, layers: Sequence[Convolution]) -> dict[str, list[Engine]]:
        """Every engine that could run the layers of each kind.

        Raises:
            MappingError: no layers.
        """
        if not layers:
            raise MappingError("The network is empty: it has no convolution. Give at least one Convolution.")
        kinds: dict[str, list[Convolution]] = {}
        for layer in layers:
            kinds.setdefault(layer.kind, []).append(layer)
        return {
            kind: [
                engine_for(members, unroll_in, unroll_out, rows)
                for unroll_in in ((1,) if kind.startswith("depthwise") else self.unrolls)
                for unroll_out in self.unrolls
                for rows in self.rows
            ]
            for kind, members in kinds.items()
        }

    def configurations(self, layers: Sequence[Convolution]) -> int:
        """How many hardware configurations there are for a network, those that do not fit the device included."""
        return math.prod(len(engines) for engines in self.options(layers).values())

    def latency_ms(self, layers: Sequence[Convolution], engines: dict[str, Engine]) -> float:
        """What the model says of a network on given engines, one for each kind."""
        rate = self.device.bytes_per_cycle
        return sum(subgraph_cycles(group, engines, rate) for group in subgraphs(layers)) / self._cycles_per_ms

    def map(self, layers: Sequence[Convolution]) -> HardwareMapping:
        """The configuration with the least latency.

        Args:
            layers: in the order in which they run; of a module: :func:`convolutions`.

        Raises:
            MappingError: no layers, or a device on which not even the smallest engines fit, with what they need.
            UnprovenError: no proven optimum within ``seconds``.
        """
        options = self.options(layers)
        self._check_fit(options)
        options = {kind: unbeaten(engines, layers) for kind, engines in options.items()}
        groups = subgraphs(layers)
        engines = self._solve(options, Counter(groups))
        times = tuple(
            subgraph_cycles(group, engines, self.device.bytes_per_cycle) / self._cycles_per_ms for group in groups
        )
        return HardwareMapping(
            sum(times),
            engines,
            tuple(groups),
            times,
            sum(engine.dsps for engine in engines.values()),
            sum(engine.buffer_kb for engine in engines.values()),
        )

    def restrict(self, space: SearchSpace, workload: Workload, latency_ms: float) -> SearchSpace:
        """The space of networks that some configuration runs within ``latency_ms``, their latency a feature.

        Hardware is no decision of it any more: each candidate comes with its best, :meth:`map`'s.

        Args:
            space: of networks.
            workload: from a candidate, the decisions that count, to its convolutions.
            latency_ms: the limit.

        Raises:
            MappingError: a limit that is not positive.
            UnprovenError: when a rule or the feature of the space is asked about a network without a proven optimum
                within ``seconds``: it may be a good one.
        """
        if not 0 < latency_ms < math.inf:
            raise MappingError(f"latency_ms must be positive and finite, got {latency_ms}.")
        known: dict[tuple[Convolution, ...], float] = {}

        def least(params: Params) -> float:
            layers = tuple(workload(params))
            if layers not in known:
                try:
                    known[layers] = self.map(layers).latency_ms
                except UnprovenError:
                    raise
                except MappingError:
                    known[layers] = math.inf
            return known[layers]

        def features(params: Params) -> list[float]:
            own = [] if space.features is None else list(space.features(params))
            return [*own, min(least(params), 1e3 * latency_ms)]

        words = f"its latency on the best hardware must be at most {latency_ms:g} ms"
        # a rule is asked only where the decision that it blames counts
        always = [name for name in space.decisions if name not in space.active]
        blamed = always[:1] or list(space.decisions)
        limits = [Rule(name, lambda params: least(params) <= latency_ms, words) for name in blamed]
        return SearchSpace(space.decisions, [*space.rules, *limits], space.active, features, space.graph)

    @property
    def _cycles_per_ms(self) -> float:
        return 1000.0 * self.device.clock_mhz

    def _check_fit(self, options: dict[str, list[Engine]]) -> None:
        """Raise where the smallest engines, which are smallest in both resources, do not fit."""
        dsps = sum(min(engine.dsps for engine in engines) for engines in options.values())
        buffer_kb = sum(min(engine.buffer_kb for engine in engines) for engines in options.values())
        if dsps > self.device.dsps or buffer_kb > self.device.buffer_kb:
            least = max(dsps, self.device.dsps), max(math.ceil(10 * buffer_kb) / 10, self.device.buffer_kb)
            raise MappingError(
                f"No configuration fits the device: the smallest engines ({', '.join(options)}) need {dsps} DSPs and "
                f"{buffer_kb:.1f} KB of buffer, it has {self.device.dsps} and {self.device.buffer_kb:.1f}. "
                f"The smallest device that would do: dsps={least[0]}, buffer_kb={least[1]:g}."
            )

    def _solve(self, options: dict[str, list[Engine]], groups: Counter[Subgraph]) -> dict[str, Engine]:
        engines = [engine for entries in options.values() for engine in entries]
        first = dict(zip(options, np.cumsum([0, *map(len, options.values())])[:-1].tolist(), strict=True))
        programme = Programme(engines, first, {kind: len(entries) for kind, entries in options.items()})
        for group, times in groups.items():
            programme.add(group, times, self.device.bytes_per_cycle)
        chosen = programme.solve(self.device, self.seconds)
        return {engine.kind: engine for engine in (engines[place] for place in chosen)}
