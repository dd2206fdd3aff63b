"""What a network with some gates closed costs, and which gates to close for a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from netwright.core.graph import Graph, Group
from netwright.core.graph.macs import count_macs, total_macs

__all__ = ["MacModel", "Units", "closed_units", "opened"]

Units = dict[str, list[int]]
Block = tuple[str, tuple[int, ...]]  # a group and units of it that go together


@dataclass(frozen=True)
class _Weight:
    """A weight, or what stands for it, of ``macs`` operations, and what the gates take from its dimensions."""

    macs: float
    shape: tuple[int, ...]
    gated: tuple[tuple[int, str, int], ...]  # dimension, group, entries for each unit


class MacModel:
    """Multiply-accumulates of one item, as a smooth function of the gates.

    An operation with a weight costs in proportion to the entries that remain of each dimension of it, in each of the
    weight's uses; one without (attention's products) in proportion to the units that remain of each group in what it
    reads. What is still missing is spread over all by :meth:`calibrate`.

    Args:
        graph: the traced model.
        groups: those with gates.
    """

    def __init__(self, graph: Graph, groups: Sequence[Group]) -> None:
        program, sizes = graph.program, {group.name: group.size for group in groups}
        shapes = {name: tuple(value.shape) for name, value in program.state_dict.items() if value.ndim > 1}
        holder = {value.data_ptr(): name for name, value in program.state_dict.items()}  # one name for tied weights
        gated: dict[str, dict[tuple[int, str], int]] = {}
        for group in groups:
            for place in group.places:
                if place.parameter in shapes:
                    name = holder[program.state_dict[place.parameter].data_ptr()]
                    gated.setdefault(name, {})[place.dim, group.name] = place.index.shape[1]
        self.total, self._scale, self._weights = float(total_macs(program)), 1.0, list[_Weight]()
        carried: dict[fx.Node, set[str]] = {}  # the groups whose units are in what a node gives
        for node, macs, names in _operations(program):
            used = {holder[program.state_dict[name].data_ptr()] for name in names if name in shapes}
            met = [group for name in used for _, group in gated.get(name, {})]
            read = set[str]().union(*(carried.get(source, ()) for source in node.all_input_nodes))
            if macs and used:  # a group that is read goes on only where the weight puts it out again
                carried[node] = {group for group in met if group not in read or met.count(group) > 1}
                entries = sum(prod(shapes[name]) for name in used)
                for name in used & gated.keys():
                    dims = tuple((dim, group, each) for (dim, group), each in gated[name].items())
                    self._weights.append(_Weight(macs * prod(shapes[name]) / entries, shapes[name], dims))
                continue
            carried[node] = read.union(met)
            if macs and read:
                dims = tuple((dim, group, 1) for dim, group in enumerate(sorted(read)))
                self._weights.append(_Weight(macs, tuple(sizes[group] for _, group, _ in dims), dims))

    def calibrate(self, gates: Mapping[str, Tensor], share: float) -> None:
        """Scale what closed gates save such that ``share`` is what remains with ``gates``, as counted on that model."""
        saved = 1.0 - self.share(gates).item()
        if saved > 0:
            self._scale *= (1.0 - share) / saved

    def share(self, gates: Mapping[str, Tensor]) -> Tensor:
        """The share of all operations that remains, a differentiable scalar; ``gates`` are ``(size,)`` in [0, 1]."""
        saved = torch.zeros((), dtype=torch.float64)
        for weight in self._weights:
            lost: dict[int, Tensor] = {}
            for dim, group, entries in weight.gated:
                gone = (1.0 - gates[group].double()).sum() * (entries / weight.shape[dim])
                lost[dim] = lost.get(dim, torch.zeros((), dtype=torch.float64)) + gone
            left = torch.ones((), dtype=torch.float64)
            for part in lost.values():
                left = left * (1.0 - part)
            saved = saved + weight.macs * (1.0 - left)
        return 1.0 - self._scale * saved / self.total

    def slopes(self, gates: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """:meth:`share` and its derivative with respect to each gate, ``(size,)`` for each group."""
        leaves = {name: gate.detach().double().requires_grad_() for name, gate in gates.items()}
        with torch.enable_grad():
            share = self.share(leaves)
        if not share.requires_grad:
            return share.item(), {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        found = torch.autograd.grad(share, list(leaves.values()), allow_unused=True)
        return share.item(), {
            name: torch.zeros_like(leaf) if slope is None else slope
            for (name, leaf), slope in zip(leaves.items(), found, strict=True)
        }


def opened(values: Mapping[str, Tensor], units: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The gates ``(size,)`` of each group when ``units`` are closed and all others open."""
    gates = {name: torch.ones(len(value), dtype=torch.float64) for name, value in values.items()}
    for name, closed in units.items():
        gates[name][list(closed)] = 0.0
    return gates


def closed_units(
    macs: MacModel, values: Mapping[str, Tensor], target: float, blocks: Mapping[str, int] | None = None
) -> Units:
    """The units with the lowest values, as few as bring the operations to at most ``target`` of all.

    Units of a group go in blocks, in the order of their values, blocks by their mean; the block of highest value of
    each group stays. Units that save nothing stay too. Where the last block saved more than was asked for, closed
    blocks that fit into the rest open again, those of highest value first. Where what has to stay costs more than
    ``target``, everything else goes.

    Args:
        macs: what units cost.
        values: ``(size,)`` for each group.
        target: the share of the operations that may remain.
        blocks: units that go together for each group, such that a multiple stays; 1 where it is silent.
    """
    open_ = opened(values, {})
    _, slopes = macs.slopes(open_)
    ranked: list[Block] = []
    for name, scores in values.items():
        block, costs = (blocks or {}).get(name, 1), slopes[name].tolist()
        ordered = [unit for unit in scores.argsort(stable=True).tolist() if costs[unit] > 0]
        ends = range(len(ordered), 0, -block)[1:]  # without the block of highest value
        ranked += [(name, tuple(ordered[max(0, end - block) : end])) for end in ends]
    ranked.sort(key=lambda entry: float(values[entry[0]][list(entry[1])].mean()))

    def share(count: int) -> float:
        gates = {name: gate.clone() for name, gate in open_.items()}
        for name, units in ranked[:count]:
            gates[name][list(units)] = 0.0
        return macs.share(gates).item()

    low, high = 0, len(ranked)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) <= target else (middle + 1, high)
    found: Units = {}
    for name, units in _reopened(macs, open_, ranked[:high], target):
        found.setdefault(name, []).extend(units)
    return {name: sorted(units) for name, units in found.items()}


def _reopened(macs: MacModel, gates: dict[str, Tensor], closed: list[Block], target: float) -> list[Block]:
    """``closed`` without the blocks that fit into what is left of the target; from the last, of highest value, on."""
    gates = {name: value.clone() for name, value in gates.items()}
    for name, units in closed:
        gates[name][list(units)] = 0.0
    left, full = list(closed), set[str]()
    for name, units in reversed(closed):
        if name in full:
            continue
        gates[name][list(units)] = 1.0
        if macs.share(gates).item() > target:
            gates[name][list(units)] = 0.0
            full.add(name)
        else:
            left.remove((name, units))
    return left


def _operations(program: ExportedProgram) -> list[tuple[fx.Node, int, list[str]]]:
    """Every operation, with its multiply-accumulates and the parameters that it reads, as they are or rewritten."""
    nodes = list(program.graph.nodes)
    stacks = [node.meta.get("nn_module_stack") for node in nodes]
    try:
        for node in nodes:
            node.meta["nn_module_stack"] = {"": (node.name, None)}  # to have each counted by itself
        macs = count_macs(program)
    finally:
        for node, stack in zip(nodes, stacks, strict=True):
            node.meta["nn_module_stack"] = stack
    names = program.graph_signature.inputs_to_parameters
    read = {node: [names[node.name]] for node in nodes if node.name in names}
    found = []
    for node in nodes:
        if node.op in ("placeholder", "output"):
            continue
        weights = [name for source in node.all_input_nodes for name in read.get(source, [])]
        if weights and all(source in read for source in node.all_input_nodes):
            read[node] = weights
        found.append((node, macs.get(node.name, 0), weights))
    return found
