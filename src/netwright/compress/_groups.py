"""Which groups of a traced model a method works on, in the words that all of them share."""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.graph import Graph, Group, Place

__all__ = ["chosen_groups", "input_dim", "without_excluded"]


def without_excluded(owner: object, graph: Graph, exclude: Sequence[str]) -> list[Group]:
    """The groups of a graph but those that ``exclude`` names.

    Raises:
        TransformError: a name that no group has.
        NothingToPruneError: the graph has no group at all.
    """
    known = graph.require_groups()
    names = [group.name for group in known]
    for name in exclude:
        if name not in names:
            raise TransformError(
                f"{type(owner).__name__}.exclude names no group {name!r}; there are {', '.join(names)}."
            )
    return [group for group in known if group.name not in exclude]


def chosen_groups(owner: object, graph: Graph, exclude: Sequence[str], inexact: bool, what: str) -> list[Group]:
    """The groups that are not excluded and, unless ``inexact``, can go without changing statistics.

    Args:
        owner: the transform, for messages.
        graph: of the model.
        exclude: names of groups to leave whole.
        inexact: also groups whose removal changes statistics.
        what: what is done to them, for the message.

    Raises:
        TransformError: a name that no group has.
        NothingToPruneError: no group is left.
    """
    groups = [group for group in without_excluded(owner, graph, exclude) if group.exact or inexact]
    if not groups:
        raise NothingToPruneError(
            f"Of the {len(graph.groups)} groups of this model exclude={list(exclude)!r} and inexact={inexact} leave "
            f"none to {what}."
        )
    return groups


def input_dim(model: nn.Module, place: Place) -> int:
    """The dimension of a matrix or kernel along which it reads its input; -1 for a table, which reads none."""
    module = model.get_submodule(place.parameter.rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        return -1
    return 0 if isinstance(module, _ConvTransposeNd) or type(module).__name__ == "Conv1D" else 1
