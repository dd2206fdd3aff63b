"""The weight layers of a traced model: how many paths lead through how many of them, and what each one sums up."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from netwright.core.errors import SettingError

__all__ = ["LayerGraph", "WeightLayer", "layer_graph"]

_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution"}
_TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "matmul": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_SUMS = {"add", "add_", "sub", "sub_"}
_SCALINGS = {"mul", "mul_", "div", "div_", "neg", "clone", "_to_copy", "to", "alias", "detach"}
_CURVED = {"prelu", "hardswish", "glu", "log_sigmoid", "softmax", "log_softmax", "scaled_dot_product_attention"}
_REFUSED = {"lstm", "gru", "rnn_tanh", "rnn_relu", "einsum", "bilinear"}


@dataclass(frozen=True)
class WeightLayer:
    """One use of a weight.

    Args:
        weight: the name of the parameter.
        bias: the name of the parameter that is added, "" where there is none.
        fan_in: terms that each result is a sum of.
        kernel: side of the convolution kernel, the geometric mean of its sides; 0 for other layers.
        in_degree: summands at the vertex of the graph that the layer belongs to.
        last: whether no other weight layer comes after it.
    """

    weight: str
    bias: str
    fan_in: float
    kernel: float
    in_degree: int
    last: bool


@dataclass(frozen=True)
class LayerGraph:
    """What :func:`layer_graph` returns.

    Args:
        layers: in the order of the computation.
        depths: how many paths from an input to an output there are with each number of weight layers.
    """

    layers: tuple[WeightLayer, ...]
    depths: dict[int, int]


def layer_graph(program: ExportedProgram) -> LayerGraph:
    """Read the weight layers off a trace.

    Paths are counted by their depth and not listed, so that the cost grows with the number of operations times the
    greatest depth and not with the number of paths.

    Raises:
        SettingError: a layer that the count does not describe.
    """
    return _Reader(program).read()


class _Reader:
    def __init__(self, program: ExportedProgram) -> None:
        self.nodes = list(program.graph.nodes)
        self.names = dict(program.graph_signature.inputs_to_parameters)
        specs = program.graph_signature.input_specs
        fed = {spec.arg.name for spec in specs if spec.kind == InputKind.USER_INPUT}
        outputs = self.nodes[-1].args[0]
        kinds = [spec.kind for spec in program.graph_signature.output_specs]
        self.outputs = [
            node
            for node, kind in zip(outputs, kinds, strict=True)
            if isinstance(node, fx.Node) and kind in (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT)
        ]
        self.paths: dict[fx.Node, Counter[int]] = {}
        self.weights: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}  # of each layer: its weight and its input
        for node in self.nodes:
            if node.op == "placeholder":
                self.paths[node] = Counter({0: 1} if node.name in fed and _tensor(node) else {})
            elif node.op == "call_function":
                self.paths[node] = self._through(node)
            else:
                self.paths[node] = Counter()

    def read(self) -> LayerGraph:
        before, after = self._degrees(), self._followed()
        layers = []
        for node, (weight, _) in self.weights.items():
            shape = [int(size) for size in weight.meta["val"].shape]
            layers.append(
                WeightLayer(
                    weight=self._parameter(weight, node),
                    bias=self._bias(node),
                    fan_in=_fan_in(node, weight, shape),
                    kernel=prod(shape[2:]) ** (1 / len(shape[2:])) if "conv" in _name(node) else 0.0,
                    in_degree=before[node],
                    last=not after[node],
                )
            )
        depths: Counter[int] = Counter()
        for node in self.outputs:
            depths.update(self.paths[node])
        return LayerGraph(tuple(layers), {depth: depths[depth] for depth in sorted(depths)})

    def _through(self, node: fx.Node) -> Counter[int]:
        """The paths from an input to ``node``, one for each way through the operands; a weight layer adds one."""
        found: Counter[int] = Counter()
        if not _tensor(node):
            return found
        operands = list(_operands(node))
        for operand in operands:
            found.update(self.paths[operand])
        if not found:
            return found
        if any(operand.op == "get_attr" for operand in operands):
            raise SettingError(
                f"architecture_scaling: {node.name} runs a part of the model of its own (a branch or a loop), and the "
                "rule does not look inside."
            )
        layer = self._layer(node)
        if layer is None:
            return found
        self.weights[node] = layer
        return Counter({depth + 1: count for depth, count in self.paths[layer[1]].items()})

    def _layer(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The weight and the input of a weight layer; None where ``node`` is none."""
        name = _name(node)
        fixed = [operand for operand in _operands(node) if not self.paths[operand]]
        if name in _REFUSED and any(map(self._learned, fixed)):
            raise SettingError(
                f"architecture_scaling: the rule says nothing of {name} with weights, which this model calls at "
                f"{node.name}. It is for linear and convolutional layers."
            )
        if name == "linear" or name in _CONVOLUTIONS | _TRANSPOSED:
            pair = node.args[1], node.args[0]
        elif name == "embedding":
            pair = node.args[0], node.args[1]
        elif name in _PRODUCTS:
            left, right = (node.args[place] for place in _PRODUCTS[name])
            pair = (left, right) if isinstance(left, fx.Node) and not self.paths[left] else (right, left)
        else:
            return None
        weight, source = pair
        assert isinstance(weight, fx.Node)
        assert isinstance(source, fx.Node)
        return (weight, source) if not self.paths[weight] and self._learned(weight) else None

    def _learned(self, node: fx.Node) -> bool:
        """Whether ``node`` is computed from parameters."""
        return node.name in self.names or any(self._learned(operand) for operand in _operands(node))

    def _parameter(self, node: fx.Node, layer: fx.Node) -> str:
        """The name of the parameter that ``node`` is, seen another way perhaps."""
        while node.name not in self.names:
            operands = list(_operands(node))
            if len(operands) != 1:
                raise SettingError(
                    f"architecture_scaling: the weight of {layer.name} is computed from several tensors, so its "
                    "initial variance cannot be set. Remove its parametrization first."
                )
            node = operands[0]
        return str(self.names[node.name])

    def _bias(self, node: fx.Node) -> str:
        place = 0 if _name(node) in ("addmm", "baddbmm") else 2
        bias = node.args[place] if len(node.args) > place and _name(node) not in ("matmul", "embedding") else None
        return self.names.get(bias.name, "") if isinstance(bias, fx.Node) else ""

    def _terms(self, node: fx.Node) -> list[fx.Node]:
        """The summands of a sum, those of partial sums that nothing else reads included; [] for anything else."""
        if _name(node) not in _SUMS:
            return []
        carrying = [operand for operand in _operands(node) if self.paths[operand]]
        if len(carrying) < 2:
            return []
        found: list[fx.Node] = []
        for operand in carrying:
            inner = self._terms(operand) if len(operand.users) == 1 else []
            found += inner or [operand]
        return found

    def _origin(self, node: fx.Node, *, only: bool = False) -> fx.Node | None:
        """The sum, layer, nonlinearity or input that ``node`` is a linear function of.

        With ``only``, None where something else reads it too.
        """
        while True:
            if only and len(node.users) != 1:
                return None
            carrying = [operand for operand in _operands(node) if self.paths[operand]]
            if node in self.weights or len(carrying) != 1 or _curved(node):
                return node
            node = carrying[0]

    def _degrees(self) -> dict[fx.Node, int]:
        """Summands by which a layer's variance is divided.

        A sum of what layers put out is charged to those layers, any other sum to the layers that read it.
        """
        degree = dict.fromkeys(self.weights, 1)
        charged: set[fx.Node] = set()
        for node in self.nodes:
            terms = self._terms(node) if node.op == "call_function" else []
            layers = [origin for term in terms if (origin := self._origin(term, only=True)) in self.weights]
            outer = len(node.users) != 1 or not self._terms(next(iter(node.users)))
            if layers and outer:
                charged.add(node)
                for layer in layers:
                    degree[layer] = max(degree[layer], len(terms))
        for node, (_, source) in self.weights.items():
            vertex = self._origin(source)
            if vertex is not None and vertex not in charged:
                degree[node] *= max(1, len(self._terms(vertex)))
        return degree

    def _followed(self) -> dict[fx.Node, bool]:
        """For every node whether some weight layer comes after it."""
        after: dict[fx.Node, bool] = {}
        for node in reversed(self.nodes):
            after[node] = any(after[user] or user in self.weights for user in node.users)
        return after


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).partition("::")[2] if schema else ""


def _operands(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that ``node`` reads, as often as it reads them."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda operand: found.append(operand))
    return iter(found)


def _tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value))


def _curved(node: fx.Node) -> bool:
    """Whether an operation on one tensor bends it."""
    name = _name(node)
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return name in _CURVED or (pointwise and name not in _SUMS | _SCALINGS)


def _fan_in(node: fx.Node, weight: fx.Node, shape: list[int]) -> float:
    name = _name(node)
    if name == "embedding":
        return 1.0
    if name in _TRANSPOSED:
        stride, groups = _argument(node, 3, "stride", 1), _argument(node, 6, "groups", 1)
        steps = prod(stride) if isinstance(stride, list | tuple) else stride ** (len(shape) - 2)
        return float(shape[0] * prod(shape[2:]) / (groups * (steps or 1)))
    if name in _PRODUCTS:
        return float(shape[-1] if node.args[_PRODUCTS[name][0]] is weight else shape[-2 if len(shape) > 1 else -1])
    return float(prod(shape[1:]))


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)
