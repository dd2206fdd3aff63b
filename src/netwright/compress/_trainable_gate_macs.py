"""What a network with some gates closed costs, and which gates to close for a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from netwright.core.errors import TransformError
from netwright.core.graph import Graph, Group
from netwright.core.graph.macs import count_macs

__all__ = ["MacModel", "closed_units"]

Units = dict[str, list[int]]
Block = tuple[str, tuple[int, ...]]  # a group and units of it that go together


@dataclass(frozen=True)
class _Weight:
    """A weight whose module computes ``macs``, with what the gates take from its dimensions."""

    macs: float
    shape: tuple[int, ...]
    gated: tuple[tuple[int, str, int], ...]  # dimension, group, entries for each unit


class MacModel:
    """Multiply-accumulates of one item, as a smooth function of the gates.

    An operation with a weight costs in proportion to the entries that remain of each dimension of it; operations
    without one (attention's products) count as they are.

    Args:
        graph: the traced model.
        groups: those with gates.
    """

    def __init__(self, graph: Graph, groups: Sequence[Group]) -> None:
        macs = count_macs(graph.program)
        self.total = float(sum(macs.values()))
        shapes = {name: tuple(value.shape) for name, value in graph.program.state_dict.items() if value.ndim > 1}
        entries: dict[str, int] = {}
        for name, shape in shapes.items():
            module = name.rpartition(".")[0]
            entries[module] = entries.get(module, 0) + prod(shape)
        self._weights = []
        for name, shape in shapes.items():
            module = name.rpartition(".")[0]
            places = [(group.name, place) for group in groups for place in group.places if place.parameter == name]
            if places and macs.get(module):
                gated = tuple((place.dim, group, place.index.shape[1]) for group, place in places)
                self._weights.append(_Weight(macs[module] * prod(shape) / entries[module], shape, gated))

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
        return 1.0 - saved / self.total

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


def closed_units(
    macs: MacModel, values: Mapping[str, Tensor], target: float, blocks: Mapping[str, int] | None = None
) -> Units:
    """The units with the lowest values, as few as bring the operations to at most ``target`` of all.

    Units of a group go in blocks, in the order of their values, blocks by their mean; the block of highest value of
    each group stays. Units that save nothing stay too. Where the last block saved more than was asked for, closed
    blocks that fit into the rest open again, those of highest value first.

    Args:
        macs: what units cost.
        values: ``(size,)`` for each group.
        target: the share of the operations that may remain.
        blocks: units that go together for each group, such that a multiple stays; 1 where it is silent.

    Raises:
        TransformError: what has to stay costs more.
    """
    open_ = {name: torch.ones(len(value), dtype=torch.float64) for name, value in values.items()}
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

    least = share(len(ranked))
    if least > target:
        what = "block" if max((blocks or {}).values(), default=1) > 1 else "unit"
        raise TransformError(
            f"TrainableGate.macs={target:g} is out of reach: with one {what} left in every group {least:.4f} of the "
            "multiply-accumulates remain. Raise macs."
        )
    low, high = 0, len(ranked)  # share(high) meets the target
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
