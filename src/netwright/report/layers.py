"""What was cut where: one row per layer with the shares that are left."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from netwright.report.format import compact
from netwright.report.run import Layer

__all__ = ["LayerRow", "Share", "layer_rows"]


@dataclass(frozen=True)
class Share:
    """How much of something is left: percent for the bar, and the two figures."""

    percent: float
    before: str
    after: str


@dataclass(frozen=True)
class LayerRow:
    """One layer: its name and kind, and what is left of its outputs, MACs (None where it has none) and parameters."""

    layer: str
    kind: str
    removed: bool
    units: Share
    macs: Share | None
    parameters: Share
    precision: str


def layer_rows(layers: Sequence[Layer]) -> list[LayerRow]:
    """Rows of the table of layers, in the order of the network.

    The units of a layer are what it puts out for each item or place: channels of a convolution, features of a linear
    layer, the width of an embedding. Of a transposed convolution without bias, groups are not known, and their outputs
    counted once.

    Example:
        >>> row = layer_rows([Layer("conv1", "Conv2d", (64, 3, 3, 3), (16, 3, 3, 3), 4000, 1000, 1728, 432, "int8")])[0]
        >>> row.units, row.macs
        (Share(percent=25.0, before='64', after='16'), Share(percent=25.0, before='4000', after='1000'))
    """
    return [
        LayerRow(
            layer=layer.layer,
            kind=layer.kind,
            removed=layer.chosen_shape is None,
            units=_share(
                _units(layer.kind, layer.baseline_shape, layer.baseline_parameters),
                _units(layer.kind, layer.chosen_shape, layer.chosen_parameters),
            ),
            macs=_share(layer.baseline_macs, layer.chosen_macs) if layer.baseline_macs else None,
            parameters=_share(layer.baseline_parameters, layer.chosen_parameters),
            precision=layer.precision,
        )
        for layer in layers
    ]


def _units(kind: str, shape: tuple[int, ...] | None, parameters: int) -> int:
    if not shape:
        return 0
    if kind.startswith("ConvTranspose") and len(shape) > 2:  # (in, out / groups, ...), and a bias of length out
        return max(parameters - math.prod(shape), shape[1])
    if kind in ("Embedding", "EmbeddingBag", "Conv1D") and len(shape) == 2:  # (entries, width); GPT-2's (in, out)
        return shape[1]
    return shape[0]


def _share(before: int, after: int) -> Share:
    percent = 100 * after / before if before else 0.0
    return Share(round(min(100.0, percent), 1), _count(before), _count(after))


def _count(value: int) -> str:
    for worth, letter in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if value >= worth:
            return f"{compact(value / min(worth, 10**3) if letter == 'k' else value / worth)} {letter}"
    return str(value)
