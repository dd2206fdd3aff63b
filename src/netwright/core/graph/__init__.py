"""One trace of a model serves pruning, merging, costs and export.

:func:`trace` finds the groups of coupled channels, heads and hidden units of an arbitrary model;
:meth:`Graph.shrink` takes units out, :meth:`Graph.zero` makes them contribute nothing. For every exact group the two
agree.
"""

from netwright.core.graph.axes import Value
from netwright.core.graph.branches import branch_names, traced_branches, without_branches
from netwright.core.graph.call import Call, UnprovableError
from netwright.core.graph.export import export_model
from netwright.core.graph.graph import Graph, trace
from netwright.core.graph.groups import Blocked, Group, Place
from netwright.core.graph.table import register_rule

__all__ = [
    "Blocked",
    "Call",
    "Graph",
    "Group",
    "Place",
    "UnprovableError",
    "Value",
    "branch_names",
    "export_model",
    "register_rule",
    "trace",
    "traced_branches",
    "without_branches",
]
