"""The ReLUs of a traced graph: how many there are, in which stages, and the graph without some of them."""

import copy
import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from netwright.compress._fold import op_name
from netwright.core.data import beside
from netwright.core.graph.export import arguments
from netwright.core.task import Task

__all__ = ["ReluLayer", "find_relus", "thinned", "without_relus"]


@dataclass(frozen=True)
class ReluLayer:
    """One ReLU layer.

    Args:
        name: of its node.
        count: ReLUs that one item meets there, the elements of its output.
        stage: number of its stage; layers in a row whose outputs have the same height and width are one.
    """

    name: str
    count: int
    stage: int


class _Shapes(fx.Interpreter):
    """Runs a graph and remembers the shapes of what its ReLUs give."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The node's value."""
        value = super().run_node(n)
        if _is_relu(n) and isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value


def _is_relu(node: fx.Node) -> bool:
    """Whether a node is a ReLU, or one with an upper limit."""
    name = op_name(node).rstrip("_")
    return name in ("relu", "relu6") or (name == "hardtanh" and len(node.args) > 1 and bool(node.args[1] == 0))


def find_relus(module: fx.GraphModule, task: Task) -> list[ReluLayer]:
    """The ReLU layers of a graph in their order."""
    inputs = beside(task.example(), module)
    args, kwargs = arguments(inputs)
    items = next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    walker = _Shapes(module)
    names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        walker.run(*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))
    found: list[ReluLayer] = []
    for stage, (_, group) in enumerate(itertools.groupby(walker.shapes.items(), lambda entry: entry[1][2:])):
        found += [ReluLayer(name, math.prod(shape) // items, stage) for name, shape in group]
    return found


def without_relus(module: fx.GraphModule, names: Collection[str]) -> fx.GraphModule:
    """A copy of a graph in which the ReLU layers of these names give back what they get."""
    changed = copy.deepcopy(module)
    for node in list(changed.graph.nodes):
        if node.name in names:
            (source, *_) = node.all_input_nodes
            node.replace_all_uses_with(source)
            changed.graph.erase_node(node)
    changed.recompile()
    return changed


def thinned(layers: Sequence[ReluLayer]) -> list[ReluLayer]:
    """Every other layer of each stage, counted from its last."""
    kept = []
    for _, group in itertools.groupby(layers, lambda layer: layer.stage):
        kept += list(group)[::-1][::2][::-1]
    return kept
