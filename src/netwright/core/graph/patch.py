"""Lengths that a module's code remembers as plain attributes: a number of heads, the size of a split."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
from torch import fx, nn

from netwright.core.graph.attributes import knows_its_sizes, submodule
from netwright.core.graph.call import Answer
from netwright.core.graph.constraints import Constraints
from netwright.core.graph.resize import Edit

__all__ = ["Lengths", "changed_lengths", "patch"]

Lengths = Mapping[str, Mapping[int, frozenset[int]]]
"""For module names the lengths that have changed in their ``forward``, and what they have become."""

_FEW = 5  # attribute names of which all subsets are tried; each costs a forward pass or two
_MOST = 10  # attribute names that are tried at all


@dataclass(frozen=True, eq=False)
class _Attribute:
    module: nn.Module
    name: str
    old: int
    new: int


def changed_lengths(
    graph: fx.Graph, values: Mapping[str, Answer], constraints: Constraints, removed: npt.NDArray[np.bool_]
) -> Lengths:
    """Which lengths the operations of each module's ``forward`` see change."""
    found: dict[str, dict[int, set[int]]] = {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if node.op != "call_function" or node.name not in values or not stack:
            continue
        edit = Edit(node, values, constraints, removed)
        owner = str(list(stack.values())[-1][0])
        for axis in (axis for value in edit.results for axis in value.axes):
            new = edit.length(axis)
            old = int(np.prod([factor.size for factor in axis]))
            if new is not None and new != old:
                found.setdefault(owner, {}).setdefault(old, set()).add(new)
    return {owner: {old: frozenset(new) for old, new in changes.items()} for owner, changes in found.items()}


def patch(model: nn.Module, lengths: Lengths, works: Callable[[], bool]) -> bool:
    """Try to bring plain integer attributes in line with the new lengths, until the model works.

    Candidates are attributes of the modules in whose ``forward`` a length has changed, with exactly the old value.
    They are tried by name and class, all together first, then fewer; what does not help is undone.

    Args:
        model: changed in place, and only if that helps.
        lengths: from :func:`changed_lengths`.
        works: whether the model computes the right thing now.
    """
    candidates: dict[tuple[type[nn.Module], str], list[_Attribute]] = {}
    for owner, changes in lengths.items():
        module = submodule(model, owner)
        if module is None or knows_its_sizes(module):
            continue
        for name, value in vars(module).items():
            new = changes.get(value, frozenset()) if type(value) is int else frozenset()
            if len(new) == 1:
                attribute = _Attribute(module, name, value, next(iter(new)))
                candidates.setdefault((type(module), name), []).append(attribute)
    if not 0 < len(candidates) <= _MOST:
        return False
    for chosen in _subsets(list(candidates.values())):
        for attribute in chosen:
            setattr(attribute.module, attribute.name, attribute.new)
        if works():
            return True
        for attribute in chosen:
            setattr(attribute.module, attribute.name, attribute.old)
    return False


def _subsets(groups: list[list[_Attribute]]) -> Iterator[list[_Attribute]]:
    """Larger sets first; of many candidates only those that lack one, and single ones."""
    sizes = range(len(groups), 0, -1) if len(groups) <= _FEW else (len(groups), len(groups) - 1, 1)
    for size in sizes:
        for chosen in combinations(groups, size):
            yield [attribute for group in chosen for attribute in group]
