"""The accelerator as arithmetic: what convolutions ask for, what engines cost, and how long a mapping takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

from netwright.core.errors import SettingError

__all__ = ["Convolution", "Device", "Engine", "MappingError", "Subgraph", "cycles", "engine_for", "subgraphs"]

_PACKED = ((4, 4), (8, 2), (16, 1))  # products that one DSP takes a cycle: four of 4 bits, two of 8, one of 16


class MappingError(SettingError):
    """A workload or a device that cannot be mapped."""


class UnprovenError(MappingError):
    """No proven optimum in the time that a programme had; whether there is a configuration is not known."""


@dataclass(frozen=True)
class Device:
    """What an accelerator may use.

    Args:
        dsps: multipliers (DSP slices).
        buffer_kb: on-chip memory, in units of 1024 bytes.
        bandwidth_gbs: to off-chip memory, 10^9 bytes a second.
        clock_mhz: of the engines.

    Raises:
        MappingError: one of them is not positive.
    """

    dsps: int
    buffer_kb: float
    bandwidth_gbs: float
    clock_mhz: float = 200.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise MappingError(f"Device: {field.name} must be positive and finite, got {value}.")

    @property
    def bytes_per_cycle(self) -> float:
        """Off-chip traffic of one cycle."""
        return 1000.0 * self.bandwidth_gbs / self.clock_mhz


@dataclass(frozen=True)
class Convolution:
    """One convolution, square in kernel and stride, or linear layer (one pixel for each place in an item).

    Args:
        channels_in: of the input.
        channels_out: of the output.
        height: of the output, pixels.
        width: of the output, pixels.
        kernel: side of the kernel.
        stride: between output pixels.
        groups: of channels that do not mix; ``channels_in`` makes it depthwise.
        bits: of weights and activations, 1 to 16.

    Raises:
        MappingError: a size below 1 or not whole, groups that do not divide the channels, or bits beyond 16.
    """

    channels_in: int
    channels_out: int
    height: int = 1
    width: int = 1
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    bits: int = 8

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise MappingError(f"{self}: {field.name} must be a whole number of at least 1, got {value!r}.")
        if self.channels_in % self.groups or self.channels_out % self.groups:
            raise MappingError(f"{self}: groups must divide channels_in and channels_out.")
        if self.bits > _PACKED[-1][0]:
            raise MappingError(f"{self}: bits must be at most {_PACKED[-1][0]}, got {self.bits}.")

    @property
    def kind(self) -> str:
        """The engine that runs it, by kernel: ``"3x3"``, ``"1x1"``, ``"depthwise 3x3"``, ``"group 3x3"``."""
        way = "" if self.groups == 1 else "depthwise " if self.groups == self.channels_in else "group "
        return f"{way}{self.kernel}x{self.kernel}"

    @property
    def weight_bytes(self) -> float:
        """Of all weights."""
        return self.channels_out * self.channels_in // self.groups * self.kernel**2 * self.bits / 8

    @property
    def input_bytes(self) -> float:
        """Of the input activations, borders left out."""
        return self.channels_in * self.height * self.width * self.stride**2 * self.bits / 8

    @property
    def output_bytes(self) -> float:
        """Of the output activations."""
        return self.channels_out * self.height * self.width * self.bits / 8


Subgraph: TypeAlias = tuple[Convolution, ...]
"""Convolutions that run at the same time, each in its own engine, activations between them staying on chip."""


@dataclass(frozen=True)
class Engine:
    """The compute engine of one kind of convolution, with its resources.

    Attributes:
        kind: see :attr:`Convolution.kind`.
        unroll_in: input channels taken in a cycle.
        unroll_out: output channels made in a cycle.
        rows: output rows of a tile; weights are read again for each tile.
        bits: of its multipliers, the most that any of its layers asks for.
        dsps: multipliers used.
        buffer_kb: on-chip memory used: the input rows of a tile, twice the weights of a cycle, twice a row of outputs.
    """

    kind: str
    unroll_in: int
    unroll_out: int
    rows: int
    bits: int
    dsps: int
    buffer_kb: float


def engine_for(layers: Sequence[Convolution], unroll_in: int, unroll_out: int, rows: int) -> Engine:
    """The engine with these factors that runs all of ``layers``, which are of one kind."""
    bits = max(layer.bits for layer in layers)
    packed = next(count for most, count in _PACKED if bits <= most)
    kernel = layers[0].kernel
    tile = max(_input_rows(layer, rows) * layer.channels_in * layer.width * layer.stride for layer in layers)
    row = max(layer.channels_out * layer.width for layer in layers)
    stored = tile + 2 * unroll_in * unroll_out * kernel**2 + 2 * row
    dsps = math.ceil(unroll_in * unroll_out / packed)
    return Engine(layers[0].kind, unroll_in, unroll_out, rows, bits, dsps, stored * bits / 8 / 1024)


def cycles(layer: Convolution, engine: Engine) -> int:
    """Cycles of a layer: ``groups * ceil(C_in / (G P_in)) * ceil(C_out / (G P_out)) * height * width * kernel^2``.

    Groups of depthwise layers lie side by side: ``ceil(C_out / P_out) * height * width * kernel^2``.
    """
    pixels = layer.height * layer.width * layer.kernel**2
    if layer.groups == layer.channels_in and layer.groups > 1:
        return math.ceil(layer.channels_out / engine.unroll_out) * pixels
    inputs = math.ceil(layer.channels_in / layer.groups / engine.unroll_in)
    outputs = math.ceil(layer.channels_out / layer.groups / engine.unroll_out)
    return layer.groups * inputs * outputs * pixels


def weight_traffic(layer: Convolution, rows: int) -> float:
    """Bytes of weights read from off-chip memory: all of them for each tile of ``rows`` output rows."""
    return layer.weight_bytes * math.ceil(layer.height / rows)


def subgraphs(layers: Sequence[Convolution]) -> list[Subgraph]:
    """Consecutive layers together while each needs another engine."""
    found: list[list[Convolution]] = []
    for layer in layers:
        if not found or any(layer.kind == other.kind for other in found[-1]):
            found.append([])
        found[-1].append(layer)
    return [tuple(group) for group in found]


def subgraph_cycles(group: Subgraph, engines: dict[str, Engine], bytes_per_cycle: float) -> float:
    """The slowest of the engines and of the traffic: ``max(max_l cycles_l, bytes / bandwidth)``."""
    traffic = group[0].input_bytes + group[-1].output_bytes
    traffic += sum(weight_traffic(layer, engines[layer.kind].rows) for layer in group)
    return max(traffic / bytes_per_cycle, *(cycles(layer, engines[layer.kind]) for layer in group))


def _input_rows(layer: Convolution, rows: int) -> int:
    return (min(rows, layer.height) - 1) * layer.stride + layer.kernel
