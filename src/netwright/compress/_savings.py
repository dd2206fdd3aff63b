"""What the removal of a unit saves."""

from collections.abc import Sequence

from netwright.core.graph import Graph, Group
from netwright.core.graph.macs import count_macs

__all__ = ["macs_per_unit"]


def macs_per_unit(graph: Graph, groups: Sequence[Group]) -> dict[str, float]:
    """Multiply-accumulate operations of one item that go when one unit of a group goes, the others staying.

    A module's operations are shared out over the entries of each dimension of its weight, so a convolution counts for
    the group of its outputs and for that of its inputs. Operations without a weight (attention's products) are left
    out.

    Args:
        graph: the traced model.
        groups: some of its groups.

    Returns:
        For each group's name the operations of one unit.
    """
    macs = count_macs(graph.program)
    shapes = {name: tuple(value.shape) for name, value in graph.program.state_dict.items()}
    found = {}
    for group in groups:
        saved = 0.0
        for place in group.places:
            shape = shapes.get(place.parameter, ())
            if len(shape) > 1:
                module = place.parameter.rpartition(".")[0]
                saved += macs.get(module, 0) * place.index.shape[1] / shape[place.dim]
        found[group.name] = saved
    return found
