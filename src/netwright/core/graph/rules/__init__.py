"""What each family of operations does to the dimensions of its tensors.

Importing this package fills the table that :func:`netwright.core.graph.register_rule` extends. A rule is a function of
a :class:`~netwright.core.graph.call.Call`; the ones named here are of use for operations of your own.
"""

from netwright.core.graph.rules.attention import attention
from netwright.core.graph.rules.convolution import convolution
from netwright.core.graph.rules.elementwise import follow, pointwise
from netwright.core.graph.rules.linear import linear, matmul
from netwright.core.graph.rules.lookup import constant, embedding
from netwright.core.graph.rules.normalization import batch_norm, group_norm, layer_norm
from netwright.core.graph.rules.pieces import concatenate, pieces
from netwright.core.graph.rules.reduction import reduce, whole
from netwright.core.graph.rules.shape import view
from netwright.core.graph.rules.spatial import spatial

__all__ = [
    "attention",
    "batch_norm",
    "concatenate",
    "constant",
    "convolution",
    "embedding",
    "follow",
    "group_norm",
    "layer_norm",
    "linear",
    "matmul",
    "pieces",
    "pointwise",
    "reduce",
    "spatial",
    "view",
    "whole",
]
