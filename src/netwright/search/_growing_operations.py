"""The multiply-accumulates of a network as a function of how many units each group has left."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
from torch import fx, nn
from torch.export import ExportedProgram

from netwright.core.graph import Group, Value
from netwright.core.graph.axes import Axis, Factor, IntArray
from netwright.core.graph.macs import count_macs
from netwright.core.graph.solve import solve
from netwright.core.graph.walk import walk

__all__ = ["Work", "works"]

_PRODUCTS = ("mm", "bmm", "mv", "dot", "matmul", "addmm", "addmv", "baddbmm")


class Dimension(NamedTuple):
    """A length, and for groups how many of its entries each of their units holds."""

    size: int
    held: tuple[tuple[str, float], ...]


class Work(NamedTuple):
    """Sums of products that go with the lengths of some dimensions.

    Attributes:
        module: in which they happen.
        fixed: products for one item and one entry of each of ``dims``.
        dims: the dimensions of the loop over all products that groups have a part of.
    """

    module: str
    fixed: int
    dims: tuple[Dimension, ...]

    @property
    def macs(self) -> int:
        """How many there are in the full network."""
        return self.fixed * prod(dim.size for dim in self.dims)

    def left(self, lost: Mapping[str, float]) -> float:
        """How many remain where groups have lost so many units."""
        return self.fixed * prod(dim.size - sum(lost[group] * each for group, each in dim.held) for dim in self.dims)


def works(program: ExportedProgram, model: nn.Module, groups: Sequence[Group]) -> list[Work]:
    """Every sum of products of a trace, with the groups that it goes with.

    A linear layer, a convolution, a product of two matrices and an attention each loop over dimensions of their
    operands; which units these hold is what the trace knows. Together the works are what core counts: what is counted
    there and has no such loop here (recurrent layers, sums over three tensors) goes with no group.

    Args:
        program: the trace.
        model: that was traced.
        groups: of the same trace.
    """
    seen = walk(program, model)
    label = solve(seen.constraints).label
    owner = np.full(seen.constraints.count, -1)
    for place, group in enumerate(groups):
        owner[group.labels] = place
    found = []
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        module = str(next(reversed(stack.values()))[0]) if stack else ""
        for axes in _loops(node, seen.values):
            dims = [_dimension(factor, owner, label, groups) for axis in axes for factor in axis]
            fixed = prod(dim.size for dim in dims if not dim.held)
            found.append(Work(module, fixed, tuple(dim for dim in dims if dim.held)))
    rest = Counter(count_macs(program))
    rest.subtract(_by_module(found))
    return [*found, *(Work(module, count, ()) for module, count in rest.items() if count)]


def _by_module(found: Iterable[Work]) -> Counter[str]:
    total: Counter[str] = Counter()
    for work in found:
        total[work.module] += work.macs
    return total


def _dimension(factor: Factor, owner: IntArray, label: IntArray, groups: Sequence[Group]) -> Dimension:
    if factor.atoms is None:
        return Dimension(factor.size, ())
    places, counts = np.unique(owner[label[factor.atoms]], return_counts=True)
    pairs = zip(places.tolist(), counts.tolist(), strict=True)
    return Dimension(
        factor.size, tuple((groups[place].name, count / groups[place].size) for place, count in pairs if place >= 0)
    )


def _loops(node: fx.Node, values: Mapping[str, object]) -> list[list[Axis]]:
    """The dimensions that an operation loops over, one list for each of its sums; none where that is not known."""
    name = str(node.target).removeprefix("aten.").partition(".")[0] if node.op == "call_function" else ""
    if name == "einsum":
        return _einsum(str(node.args[0]), [values.get(each.name) for each in node.all_input_nodes])
    out, operands = values.get(node.name), [values.get(each.name) for each in node.args if isinstance(each, fx.Node)]
    if not isinstance(out, Value) or not all(isinstance(each, Value) for each in operands):
        return []
    axes = [each.axes for each in operands if isinstance(each, Value)]
    if name == "scaled_dot_product_attention":
        query, key, value = axes[:3]
        return [[*query[:-1], key[-2], last] for last in (query[-1], value[-1])]
    if name == "linear":
        return [[*out.axes, axes[0][-1]]]
    if name in _PRODUCTS:
        return [[*out.axes, axes[-2][-1]]]
    if name.startswith("conv"):
        spread = "transpose" in name or (name == "convolution" and bool(node.args[6]))
        return [[*(axes[0] if spread else out.axes), *axes[1][1:]]]
    return []


def _einsum(equation: str, operands: Sequence[object]) -> list[list[Axis]]:
    """All letters of a sum over two tensors, where each has its own."""
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    axes = [each.axes for each in operands if isinstance(each, Value)]
    if "." in equation or len(terms) != 2 or [*map(len, terms)] != [*map(len, axes)]:
        return []
    return [[*dict(zip("".join(terms), [axis for each in axes for axis in each], strict=True)).values()]]
