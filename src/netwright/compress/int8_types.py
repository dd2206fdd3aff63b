"""Which 8-bit integers are fastest on this machine: measured, not assumed."""

import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from netwright.compress.quantize import Int8, Kind
from netwright.core.artifact import OnnxModule, export_onnx
from netwright.core.cost import Ratio, compare_onnx
from netwright.core.data import Inputs, beside, call, first_inputs
from netwright.core.errors import ArtifactError, TransformError
from netwright.core.onnx_codebooks import compute_integers
from netwright.core.onnx_quantized import drop_unused
from netwright.core.task import Task

__all__ = ["Int8Types", "PairResult", "fastest_int8"]

_PAIRS: tuple[tuple[Kind, Kind], ...] = (("uint8", "int8"), ("int8", "int8"), ("uint8", "uint8"))
_ITEMS = 32
_TOLERANCE = 0.02  # of the norm of the outputs: what ties in rounding may come to
_SHARE = 0.5  # or this share of what rounding itself changes in them


@dataclass(frozen=True)
class PairResult:
    """What was measured of one pair of operand types.

    Args:
        activation: integers of activations.
        weight: integers of weights.
        reduce_range: whether weights have 7 bits only.
        ratio: its time over that of the float model.
        error: norm of the difference between the runtime's outputs and the simulated ones, over the norm of these.
        right: whether that is small enough to be ties in rounding: at most 0.02, or half of what rounding itself does
            to the outputs.
    """

    activation: Kind
    weight: Kind
    reduce_range: bool
    ratio: Ratio
    error: float
    right: bool


@dataclass(frozen=True)
class Int8Types:
    """The choice, and the table that it was made from.

    Args:
        settings: the given settings with the fastest right pair.
        table: every pair tried.
    """

    settings: Int8
    table: tuple[PairResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def fastest_int8(
    model: nn.Module,
    task: Task,
    *,
    settings: Int8 | None = None,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 0.3,
) -> Int8Types:
    """Measure every pair of integer types on ``model`` and choose the fastest whose numbers are right.

    Reach for it before :class:`netwright.compress.quantize.Int8`: on processors with VNNI, uint8 activations with
    int8 weights are several times faster than int8 with int8, the default of many tools; elsewhere the order differs.
    The pairs stand for the same real numbers, so the model is quantized and exported once, and the integers are
    shifted. Where the runtime's outputs differ from the simulated ones by more than rounding (products of uint8 and
    int8 saturate on x86 without VNNI), weights of 7 bits are tried. A pair that the runtime cannot load is left out.

    Args:
        model: the model to quantize, or a smaller one with the same kinds of layers.
        task: calibrates, and gives the inputs on which numbers are checked.
        settings: the other settings of ``Int8``; its own types do not count.
        batch: items in a timed call.
        threads: threads that one call may use.
        seconds: how long to time each pair.

    Raises:
        TransformError: a model with nothing to quantize, or none of whose integer forms can be loaded by this runtime
            and is right there.
        TraceError, ArtifactError: a model that cannot be traced or exported.

    Example:
        >>> from netwright.core.task import load_task
        >>> task = load_task("breast-cancer")
        >>> model = nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = fastest_int8(model, task, seconds=0.01)
        >>> small = found.settings(model, task)
        >>> any(row.right and row.weight == found.settings.weight for row in found.table)
        True

    Cost: a trace, a calibration, two exports, and the time asked for with each of three pairs.
    """
    base = replace(settings or Int8(), activation="uint8", weight="int8", reduce_range=False)
    inputs = first_inputs(task.data.val, _ITEMS)
    table: list[PairResult] = []
    refused = ""
    with tempfile.TemporaryDirectory(prefix="netwright-") as name:
        folder = Path(name)
        export_onnx(model, inputs, folder / "float.onnx")
        exact = _outputs(OnnxModule(folder / "float.onnx", threads), inputs)
        for reduced in (False, True):
            quantized = replace(base, reduce_range=reduced)(model, task)
            export_onnx(quantized, inputs, folder / "uint8-int8.onnx")
            expected = _outputs(quantized, inputs)
            tolerance = max(_TOLERANCE, _SHARE * _error(expected, exact))
            for activation, weight in _PAIRS:
                path = folder / f"{activation}-{weight}.onnx"
                _retype(folder / "uint8-int8.onnx", path, activation, weight)
                try:
                    runnable = OnnxModule(path, threads)
                except ArtifactError as error:
                    refused = str(error)
                    continue
                ratio = compare_onnx(
                    path, folder / "float.onnx", inputs, batch=batch, threads=threads, seconds=seconds, repeats=10
                )
                difference = _error(_outputs(runnable, inputs), expected)
                table.append(PairResult(activation, weight, reduced, ratio, difference, difference <= tolerance))
            if all(row.right for row in table):
                break
    if not table:
        raise TransformError(f"Int8: no integer form of this model can be loaded. {refused}")
    return Int8Types(_choose(base, table), tuple(table))


def _choose(base: Int8, table: Iterable[PairResult]) -> Int8:
    """The fastest right row; full weights are preferred to reduced ones at the same types."""
    right = [row for row in table if row.right]
    if not right:
        raise TransformError(
            "Int8: on this machine no pair of integer types gives the numbers that it should, so integer inference "
            "cannot be trusted here. Leave this step out, or update ONNX Runtime."
        )
    best = min(right, key=lambda row: row.ratio.median)
    return replace(base, activation=best.activation, weight=best.weight, reduce_range=best.reduce_range)


def _outputs(model: nn.Module, inputs: Inputs) -> Tensor:
    """All outputs as one long vector."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(call(model, beside(inputs, model)))
    return torch.cat([leaf.double().cpu().flatten() for leaf in leaves if isinstance(leaf, Tensor)])


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def _retype(source: Path, target: Path, activation: Kind, weight: Kind) -> None:
    """Write a model of uint8 activations and int8 weights with other types that stand for the same numbers."""
    proto = onnx.load(str(source))
    compute_integers(proto)  # those in few bits or with many zeros are stored in parts
    drop_unused(proto.graph)
    places = {
        name
        for node in proto.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for name in node.input
    }
    for item in proto.graph.initializer:
        if item.name not in places:
            continue
        value = numpy_helper.to_array(item)
        if value.dtype == np.uint8 and activation == "int8":
            item.CopyFrom(numpy_helper.from_array((value.astype(np.int16) - 128).astype(np.int8), item.name))
        elif value.dtype == np.int8 and weight == "uint8":
            item.CopyFrom(numpy_helper.from_array((value.astype(np.int16) + 128).astype(np.uint8), item.name))
    target.write_bytes(proto.SerializeToString())
