"""A network as the graph that a hypernetwork reads: a node for each operation, with the shapes of its parameters."""

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from torch import fx, nn
from torch.nn import functional

from netwright.core.errors import SettingError, TraceError

__all__ = ["OPERATIONS", "NetworkGraph", "Node", "network_graph", "path_lengths"]

OPERATIONS = (
    "input",
    "convolution",
    "depthwise",
    "grouped",
    "linear",
    "classifier",
    "bias",
    "norm",
    "rectifier",
    "activation",
    "max_pool",
    "average_pool",
    "global_pool",
    "sum",
    "product",
    "concat",
)
"""What a node may be; its place in this tuple is what is embedded."""

_RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU)
_MODULES: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    (_RECTIFIERS, "rectifier"),
    ((nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Softmax, nn.LogSoftmax), "activation"),
    ((nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool2d), "max_pool"),
    ((nn.AvgPool1d, nn.AvgPool2d), "average_pool"),
    ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), "global_pool"),
    ((nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d), "through"),
)
_CALLS: dict[Any, str] = {
    **dict.fromkeys(("relu", "relu_", torch.relu, functional.relu, functional.gelu, functional.silu), "rectifier"),
    **dict.fromkeys((functional.relu6, functional.leaky_relu, functional.elu, functional.hardswish), "rectifier"),
    **dict.fromkeys(("sigmoid", "tanh", "softmax", torch.sigmoid, torch.tanh, functional.softmax), "activation"),
    **dict.fromkeys((torch.softmax, functional.log_softmax, torch.log_softmax), "activation"),
    **dict.fromkeys((functional.max_pool2d, functional.adaptive_max_pool2d, torch.max_pool2d), "max_pool"),
    functional.avg_pool2d: "average_pool",
    **dict.fromkeys((functional.adaptive_avg_pool2d, "mean", torch.mean), "global_pool"),
    **dict.fromkeys(("add", "add_", torch.add, operator.add, operator.iadd), "sum"),
    **dict.fromkeys(("mul", "mul_", torch.mul, operator.mul, operator.imul), "product"),
    **dict.fromkeys((torch.cat, torch.concat), "concat"),
    **dict.fromkeys(("flatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze", "size"), "through"),
    **dict.fromkeys((torch.flatten, torch.reshape, torch.squeeze, getattr, operator.getitem), "through"),
    functional.dropout: "through",
}


@dataclass(frozen=True)
class Node:
    """An operation.

    Args:
        operation: one of :data:`OPERATIONS`.
        weight: name of the parameter that it holds, or None.
        shift: name of the second parameter of a norm, or None.
        shape: ``(outputs, inputs, height, width)`` of ``weight``, ones where it has fewer dimensions; None without.
        gain: 2 where only biases and norms lie between a weight and a rectifier that follows it, 1 elsewhere.
    """

    operation: str
    weight: str | None = None
    shift: str | None = None
    shape: tuple[int, int, int, int] | None = None
    gain: float = 1.0


@dataclass(frozen=True)
class NetworkGraph:
    """Nodes in an order in which they can be computed, and the edges ``(from, to)`` between them."""

    nodes: tuple[Node, ...]
    edges: tuple[tuple[int, int], ...]


def network_graph(model: nn.Module) -> NetworkGraph:
    """The graph of ``model``, traced by ``torch.fx``.

    A bias is a node of its own behind its weight. What only reshapes or drops out is no node. The classifier is the
    linear layer that gives the output.

    Raises:
        TraceError: control flow that depends on data.
        SettingError: an operation or a parameter that a hypernetwork cannot predict for; the message names it.
    """
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise TraceError(
            f"{type(model).__name__} cannot be traced by torch.fx: {type(error).__name__}: {reason[:300]} "
            "Control flow that depends on data is the usual cause."
        ) from error
    return _Reader(model, traced).read()


def path_lengths(graph: NetworkGraph, cutoff: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """``(n, n)`` the number of edges on the shortest path from row to column; infinite beyond ``cutoff``."""
    size = len(graph.nodes)
    tails, heads = np.array(graph.edges, dtype=int).reshape(-1, 2).T
    matrix = csr_matrix((np.ones(len(tails)), (tails, heads)), shape=(size, size))
    found: np.ndarray[tuple[int, int], np.dtype[np.float64]] = dijkstra(matrix, unweighted=True, limit=cutoff)
    return found


class _Reader:
    """Walks a traced module once."""

    def __init__(self, model: nn.Module, traced: fx.GraphModule) -> None:
        self._model, self._traced = model, traced
        self._nodes: list[Node] = []
        self._edges: dict[tuple[int, int], None] = {}
        self._place: dict[fx.Node, int] = {}  # the node whose output a value is
        self._parameters = {name: value.shape for name, value in model.named_parameters()}

    def read(self) -> NetworkGraph:
        for node in self._traced.graph.nodes:
            if node.op == "placeholder":
                self._place[node] = self._add(Node("input"), [])
            elif node.op == "get_attr":
                raise SettingError(
                    f"The network reads the parameter or buffer {node.target!r} outside of a layer; weights of "
                    "convolutions, linear layers and batch norms are predicted. Put it into such a layer."
                )
            elif node.op != "output":
                self._operation(node)
        held = {name for node in self._nodes for name in (node.weight, node.shift) if name is not None}
        left = sorted(set(self._parameters) - held)
        if left:
            raise SettingError(f"No layer on the way to the output uses the parameter {left[0]!r}. Remove it.")
        if not held:
            raise SettingError("The network has no parameter to predict.")
        return NetworkGraph(tuple(self._with_gains()), tuple(self._edges))

    def _operation(self, node: fx.Node) -> None:
        sources = list(dict.fromkeys(self._place[part] for part in node.all_input_nodes if part in self._place))
        if node.op == "call_module":
            self._place[node] = self._module(str(node.target), sources)
            return
        kind = _CALLS.get(node.target)
        if kind is None:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
            raise SettingError(f"A hypernetwork knows no operation {name!r} ({node.name}); known are {_known()}.")
        if not sources:
            raise SettingError(f"Operation {node.name!r} has no input that depends on the network's input.")
        self._place[node] = self._plain(kind, sources)

    def _plain(self, kind: str, sources: list[int]) -> int:
        if kind == "through" or (kind in ("sum", "product") and len(sources) == 1):  # x + 1 adds no node either
            return sources[0]
        return self._add(Node(kind), sources)

    def _module(self, name: str, sources: list[int]) -> int:
        module = self._model.get_submodule(name)
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            depthwise = module.groups == module.in_channels and module.groups > 1
            kind = "depthwise" if depthwise else "grouped" if module.groups > 1 else "convolution"
            return self._layer(name, module, kind, sources)
        if isinstance(module, nn.Linear):
            kind = "classifier" if self._gives_output(name) else "linear"
            return self._layer(name, module, kind, sources)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            if not module.affine:
                return self._add(Node("norm"), sources)
            size = module.num_features
            weight, shift = self._parameter(name, "weight"), self._parameter(name, "bias")
            return self._add(Node("norm", weight, shift, (size, 1, 1, 1)), sources)
        for kinds, operation in _MODULES:
            if isinstance(module, kinds):
                return self._plain(operation, sources)
        raise SettingError(
            f"Layer {name!r} is a {type(module).__name__}, for which a hypernetwork predicts nothing; known are "
            f"{_known()}."
        )

    def _layer(self, name: str, module: nn.Conv1d | nn.Conv2d | nn.Linear, kind: str, sources: list[int]) -> int:
        size = (*module.weight.shape, 1, 1)[:4]
        place = self._add(Node(kind, self._parameter(name, "weight"), shape=size), sources)
        if module.bias is None:
            return place
        shape = (module.bias.shape[0], 1, 1, 1)
        return self._add(Node("bias", self._parameter(name, "bias"), shape=shape), [place])

    def _parameter(self, module: str, name: str) -> str:
        full = f"{module}.{name}"
        if full not in self._parameters:
            raise SettingError(
                f"{full!r} is no parameter of its own: it is shared or written in another parameterization. Fold it "
                "into a plain one first."
            )
        return full

    def _gives_output(self, name: str) -> bool:
        """Whether nothing but reshaping lies between a module and the output."""
        for node in self._traced.graph.nodes:
            if node.op == "call_module" and node.target == name:
                users = list(node.users)
                while users and users[0].op != "output" and _CALLS.get(users[0].target) == "through":
                    users = list(users[0].users)
                return bool(users) and users[0].op == "output"
        return False

    def _add(self, node: Node, sources: list[int]) -> int:
        place = len(self._nodes)
        self._nodes.append(node)
        self._edges.update(dict.fromkeys((source, place) for source in sources))
        return place

    def _with_gains(self) -> list[Node]:
        after: dict[int, list[int]] = {}
        for tail, head in self._edges:
            after.setdefault(tail, []).append(head)
        found = []
        for place, node in enumerate(self._nodes):
            if node.operation in ("convolution", "depthwise", "grouped", "linear"):
                following = after.get(place, [])
                while following and self._nodes[following[0]].operation in ("bias", "norm"):
                    following = after.get(following[0], [])
                gain = 2.0 if following and self._nodes[following[0]].operation == "rectifier" else 1.0
                node = Node(node.operation, node.weight, node.shift, node.shape, gain)
            found.append(node)
        return found


def _known() -> str:
    return "convolutions, linear layers, batch norm, activations, pooling, sums, products and concatenation"
