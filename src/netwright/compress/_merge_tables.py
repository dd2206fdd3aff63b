"""What choices of layers cost and what they are worth: a table of measured times and one of losses."""

import copy
import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper
from torch import fx

from netwright.compress._batch_norms import drop_unused
from netwright.compress._fold import attribute, op_name
from netwright.compress._merge_chains import Chain, Layer, image_size
from netwright.compress._merge_convolutions import Extent, Pair
from netwright.compress._merge_plan import Choice, apply
from netwright.core.onnx_module import open_session
from netwright.core.timing import percentiles, time_call

__all__ = ["CostKind", "choice_costs", "importance", "with_choices"]

CostKind = Literal["latency", "macs"]

_SECONDS = 0.03
_ACTS = {"leaky_relu": "LeakyRelu", "sigmoid": "Sigmoid", "tanh": "Tanh", "elu": "Elu", "hardswish": "HardSwish"}


@dataclass(frozen=True)
class _Stage:
    """One convolution, if any, with the sum and the activation after it.

    Args:
        inputs, outputs: channels, height and width.
        extent: of the convolution, None for none.
        groups: of the convolution.
        sums: whether something is added.
        act: ONNX name of the activation, or "".
        dilation: of the convolution, whose ``extent`` then has the size of the kernel without its gaps.
    """

    inputs: tuple[int, int, int]
    outputs: tuple[int, int, int]
    extent: Extent | None
    groups: int
    sums: bool
    act: str
    dilation: Pair = (1, 1)


def choice_costs(
    module: fx.GraphModule, chains: Sequence[Chain], found: Sequence[Choice], kind: CostKind
) -> list[float]:
    """Milliseconds at batch size one on one thread, or multiply-accumulates, of every choice."""
    cost: Callable[[_Stage], float] = _milliseconds if kind == "latency" else _macs
    return [math.fsum(map(cost, _stages(module, chains[choice.chain], choice))) for choice in found]


def _stages(module: fx.GraphModule, chain: Chain, choice: Choice) -> list[_Stage]:
    boundary, layer = chain.boundaries[choice.stop - 1], chain.layers[choice.stop - 1]
    inputs, outputs = image_size(chain.value(choice.start)), image_size(layer.conv)
    assert inputs is not None
    assert outputs is not None
    skip = boundary.skip
    open_skip = skip is not None and (choice.original or choice.start > skip.start)
    act = "" if boundary.act is None else _ACTS.get(op_name(boundary.act).rstrip("_"), "Relu")
    if choice.empty and not open_skip and act in ("", "Relu"):
        return []
    if choice.original:
        stages = [_alone(module, layer, open_skip, act)]
    else:
        stages = [_Stage(inputs, outputs, None if choice.empty else choice.extent, choice.groups, open_skip, act)]
    if open_skip and skip is not None and skip.layer is not None:
        stages.append(_alone(module, skip.layer))
    return stages


def _alone(module: fx.GraphModule, layer: Layer, sums: bool = False, act: str = "") -> _Stage:
    """A layer as it is."""
    source = layer.conv.args[0]
    assert isinstance(source, fx.Node)
    inputs, outputs, weight = image_size(source), image_size(layer.conv), attribute(module, layer.conv.args[1])
    assert inputs is not None
    assert outputs is not None
    assert weight is not None
    extent = Extent((weight.shape[2], weight.shape[3]), layer.stride, layer.padding)
    return _Stage(inputs, outputs, extent, layer.groups, sums, act, layer.dilation)


def _macs(stage: _Stage) -> float:
    if stage.extent is None:
        return 0.0
    return math.prod(stage.outputs) * stage.inputs[0] // stage.groups * math.prod(stage.extent.size)


def _milliseconds(stage: _Stage) -> float:
    return max(_measured(stage) - _measured(None), 1e-4)


@functools.cache
def _measured(stage: _Stage | None) -> float:
    """Time of a call in ONNX Runtime, the tenth percentile; of a call that does nothing for None."""
    given = (1, 1, 1) if stage is None else stage.inputs
    feeds = {"x": np.zeros((1, *given), np.float32)}
    if stage is not None and stage.sums:
        feeds["z"] = np.zeros((1, *stage.outputs), np.float32)
    with tempfile.TemporaryDirectory(prefix="netwright-") as folder:
        path = Path(folder) / "stage.onnx"
        path.write_bytes(_graph(stage).SerializeToString())
        session = open_session(path, 1)
        times = time_call(lambda: session.run(None, feeds), seconds=_SECONDS)
    return percentiles(times)[0]


def _graph(stage: _Stage | None) -> onnx.ModelProto:
    """The stage as an ONNX model, written directly: an export takes a hundred times as long as the measurement."""
    stage = stage or _Stage((1, 1, 1), (1, 1, 1), None, 1, False, "")
    nodes, weights, last = [], [], "x"
    if stage.extent is not None:
        shape = (stage.outputs[0], stage.inputs[0] // stage.groups, *stage.extent.size)
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32) / 10
        weights = [
            onnx.numpy_helper.from_array(values, "w"),
            onnx.numpy_helper.from_array(values[:, 0, 0, 0].copy(), "b"),
        ]
        pads: Pair = stage.extent.padding
        attributes: dict[str, Any] = {
            "strides": stage.extent.stride,
            "dilations": stage.dilation,
            "pads": (*pads, *pads),
            "group": stage.groups,
        }
        nodes.append(helper.make_node("Conv", ["x", "w", "b"], ["c"], **attributes))
        last = "c"
    if stage.sums:
        nodes.append(helper.make_node("Add", [last, "z"], ["s"]))
        last = "s"
    nodes.append(helper.make_node(stage.act or "Identity", [last], ["y"]))
    shapes = {"x": stage.inputs, **({"z": stage.outputs} if stage.sums else {}), "y": stage.outputs}
    values_of = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, *shape]) for name, shape in shapes.items()
    }
    output = values_of.pop("y")
    graph = helper.make_graph(nodes, "stage", list(values_of.values()), [output], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return model


def with_choices(module: fx.GraphModule, chosen: Sequence[Choice]) -> fx.GraphModule:
    """A copy of a graph with the segments that are chosen, as layers that can be trained."""
    changed = copy.deepcopy(module)
    apply(changed, chosen)
    drop_unused(changed)
    return changed


def importance(loss: float, base: float) -> float:
    r""":math:`e^{L_0 - L}`: one where nothing changes, zero where the loss is not finite."""
    return math.exp(min(base - loss, 50.0)) if math.isfinite(loss) else 0.0
