"""What is elastic in a network: the order of its units, and its residual branches with what goes with each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from netwright.core.data import Inputs
from netwright.core.graph import Graph, traced_branches, without_branches
from netwright.core.graph.groups import Group

__all__ = ["Part", "branch_parts", "unit_order"]


@dataclass(frozen=True)
class Part:
    """A residual branch: its name, its decision's, and what goes with it."""

    name: str
    decision: str
    groups: frozenset[str]
    parameters: frozenset[str]


def unit_order(model: nn.Module, group: Group) -> list[int]:
    """The units of a group, the longest first; of equal ones the first."""
    values = dict(model.named_parameters(remove_duplicate=False))
    lengths = torch.zeros(group.size, dtype=torch.float64)
    for place in group.places:
        if place.parameter in values:
            squares = values[place.parameter].detach().double().square().movedim(place.dim, 0)
            entries = squares.reshape(len(squares), -1).sum(1).cpu()
            lengths += entries[torch.from_numpy(place.index)].sum(1)
    return sorted(range(group.size), key=lambda unit: -float(lengths[unit]))


def branch_parts(model: nn.Module, graph: Graph, inputs: Inputs) -> Sequence[Part]:
    """The residual branches, with the groups and parameters that go with each."""
    traced, found = traced_branches(model, inputs)
    parts = []
    for branch in found:
        left = {name for name, _ in without_branches(model, traced, [branch.name]).named_parameters()}
        lost = {name for name, _ in model.named_parameters()} - left
        groups = [each.name for each in graph.groups if not any(place.parameter in left for place in each.places)]
        parts.append(Part(branch.name, f"branch/{branch.name}", frozenset(groups), frozenset(lost)))
    return tuple(parts)
