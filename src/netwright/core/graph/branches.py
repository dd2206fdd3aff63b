"""Residual branches of a traced graph: what is added to a skip, and taking it away."""

import copy
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from netwright.core.data import Inputs
from netwright.core.graph.export import export_model
from netwright.core.graph.rebuild import rebuild
from netwright.core.graph.signature import plain_signature

__all__ = ["Branch", "branch_names", "traced_branches", "without_branches"]

_SUMS = {"add", "add_"}
_RECTIFIERS = {"relu", "relu_"}


@dataclass(frozen=True)
class Branch:
    """One side of a sum that both sides of the same value go into.

    Args:
        name: the module that holds its first parameters.
        sum: the node that adds it.
        skip: which argument of the sum is the skip.
    """

    name: str
    sum: fx.Node
    skip: int


def branch_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """The residual branches of a model by name, in the order of their sums; none where there are none.

    Args:
        model: any module that ``torch.export`` traces.
        inputs: a batch for it.

    Raises:
        TraceError: the model cannot be traced.
    """
    return [branch.name for branch in traced_branches(model, inputs)[1]]


def traced_branches(model: nn.Module, inputs: Inputs) -> tuple[fx.GraphModule, list[Branch]]:
    """The graph of a model, its tensors by reference, and the branches in it.

    Raises:
        TraceError: the model cannot be traced.
    """
    program = export_model(model, inputs)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    plain_signature(module.graph, program)
    module.recompile()
    return module, find_branches(module)


def without_branches(model: nn.Module, traced: fx.GraphModule, names: Collection[str]) -> fx.GraphModule:
    """A copy of a model without some branches: a graph with its parameter names, in eval mode.

    Args:
        model: the module.
        traced: its graph, from :func:`traced_branches`.
        names: what goes.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its own
        module = copy.deepcopy(traced)
    remove(module.graph, [branch for branch in find_branches(module) if branch.name in names])
    made = rebuild(module, copy.deepcopy(model))
    made.eval()
    return made


def find_branches(module: fx.GraphModule) -> list[Branch]:
    """The branches in the order of their sums.

    A sum of two tensors of its own shape has one where both sides come from the same activation, and where one side has
    parameters of its own. A side's own is what nothing else reads, directly or further on: a normalization in front of
    two branches belongs to neither. A side that the common activation reaches without passing a parameter or a product
    is the skip: the stream after an earlier branch, for example. Of two other sides the one with more operations is
    the branch and the other the skip. Names are unique: a branch that begins where another one does is named by its
    last module too.
    """
    found: list[Branch] = []
    before = _ancestors(module.graph)
    weights = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for node in module.graph.nodes:
        if _operation(node) not in _SUMS or node.kwargs or not _same_shapes(node):
            continue
        left, right = (before[each] | {each: None} for each in node.args[:2])
        common = {each for each in left.keys() & right.keys() if _is_activation(each)}
        if left == right or not common:
            continue
        sides = [(_own(all_of, other, node), skip) for all_of, other, skip in ((left, right, 1), (right, left, 0))]
        able = [
            (own, skip)
            for own, skip in sides
            if _owners(own, weights) and not _carried(node.args[1 - skip], common, weights)
        ]
        if able:
            own, skip = max(able, key=lambda side: sum(each.op == "call_function" for each in side[0]))
            owners = _owners(own, weights)
            taken = any(branch.name == owners[0] for branch in found)
            name = f"{owners[0]}...{owners[-1]}" if taken else owners[0]
            found.append(Branch(name, node, skip))
    return found


def remove(graph: fx.Graph, branches: Iterable[Branch]) -> None:
    """Leave the skip in the place of every sum; what only the branches needed goes with them."""
    for branch in branches:
        skip = branch.sum.args[branch.skip]
        assert isinstance(skip, fx.Node)
        branch.sum.replace_all_uses_with(skip)
    for node in list(graph.nodes):
        if _operation(node) in _RECTIFIERS and _operation(node.args[0]) in _RECTIFIERS:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()


def _ancestors(graph: fx.Graph) -> dict[fx.Node, dict[fx.Node, None]]:
    """All that a node depends on, in the order of the graph."""
    found: dict[fx.Node, dict[fx.Node, None]] = {}
    place = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        needed = set(node.all_input_nodes).union(*(found[each] for each in node.all_input_nodes))
        found[node] = dict.fromkeys(sorted(needed, key=place.__getitem__))
    return found


def _same_shapes(node: fx.Node) -> bool:
    sides = node.args[:2]
    values = [each.meta.get("val") for each in (node, *sides) if isinstance(each, fx.Node)]
    shapes = [each.shape for each in values if isinstance(each, Tensor)]
    return len(sides) == 2 and len(shapes) == 3 and shapes.count(shapes[0]) == 3


def _is_activation(node: fx.Node) -> bool:
    """Whether a node is a tensor of real numbers that is computed or given; not a weight, not a length."""
    value = node.meta.get("val")
    return node.op in ("call_function", "placeholder") and isinstance(value, Tensor) and value.is_floating_point()


def _owners(nodes: Iterable[fx.Node], weights: Collection[str]) -> list[str]:
    """The modules whose parameters the operations among ``nodes`` take, in the order of the graph."""
    read = [each for node in nodes if node.op == "call_function" for each in node.all_input_nodes]
    return list(dict.fromkeys(str(each.target).rpartition(".")[0] for each in read if each.target in weights))


def _own(nodes: Iterable[fx.Node], other: Collection[fx.Node], end: fx.Node) -> list[fx.Node]:
    """What of a side neither the other side nor anything outside reads; weights and lengths may be shared.

    Args:
        nodes: the side, in the order of the graph.
        other: the other side.
        end: the sum.
    """
    own: dict[fx.Node, None] = {}
    for node in reversed([each for each in nodes if each not in other]):
        computed = node.op == "call_function" and isinstance(node.meta.get("val"), Tensor | tuple | list)
        if not computed or all(user in own or user is end for user in node.users):
            own[node] = None
    return list(reversed(own))


def _carried(end: object, common: Collection[fx.Node], weights: Collection[str]) -> bool:
    """Whether something common reaches ``end`` through sums and operations on it alone."""
    waiting, seen = [end], set()
    while waiting:
        node = waiting.pop()
        if node in common:
            return True
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        inputs = node.all_input_nodes
        if any(each.target in weights for each in inputs):
            continue
        activations = [each for each in inputs if _is_activation(each)]
        if len(activations) == 1 or _operation(node) in _SUMS:
            waiting.extend(activations)
    return False


def _operation(node: object) -> str:
    """The name of the aten operation that a node calls; empty for anything else."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    name = node.target.overloadpacket.__name__
    return str(name)
