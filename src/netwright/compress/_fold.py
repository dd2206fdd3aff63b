"""Batch norms folded into the layer before them, in a traced graph."""

from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = ["attribute", "fold_batch_norms", "op_name", "set_parameter"]

_FOLDABLE = {"conv1d", "conv2d", "conv3d", "linear"}
_NORMS = {"batch_norm": 7, "_native_batch_norm_legit_no_training": 6}  # and the position of epsilon


def fold_batch_norms(module: fx.GraphModule) -> int:
    r"""Fold every batch norm that alone reads a convolution or linear layer into that layer's weight and bias.

    .. math:: w' = w \gamma / \sqrt{\sigma^2 + \epsilon}, \quad b' = (b - \mu) w' / w + \beta

    computed in float64. The model's function in evaluation mode stays the same.

    Returns:
        How many were folded.
    """
    folded = 0
    for node in list(module.graph.nodes):
        if op_name(node) in _NORMS and _is_foldable(node.args[0], module):
            _fold(module, node.args[0], node)
            folded += 1
    module.graph.eliminate_dead_code()
    return folded


def op_name(node: Any) -> str:
    """The name of the aten operation that a node calls, without overload: ``conv2d``; ``""`` for anything else."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    name = node.target.overloadpacket.__name__
    return str(name)


def attribute(module: nn.Module, node: Any) -> Tensor | None:
    """The tensor that a ``get_attr`` node reads; None for any other node."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    value = getattr(module.get_submodule(owner), name)
    return value if isinstance(value, Tensor) else None


def set_parameter(module: nn.Module, path: str, value: Tensor, *, trainable: bool = True) -> None:
    """Put a parameter at a dotted path whose owner exists."""
    owner, _, name = path.rpartition(".")
    place = module.get_submodule(owner)
    if name in place._buffers:
        del place._buffers[name]
    setattr(place, name, nn.Parameter(value, requires_grad=trainable))


def _is_foldable(layer: Any, module: fx.GraphModule) -> bool:
    if op_name(layer) not in _FOLDABLE or len(layer.users) != 1:
        return False
    return attribute(module, layer.args[1]) is not None and (
        len(layer.args) < 3 or layer.args[2] is None or attribute(module, layer.args[2]) is not None
    )


def _fold(module: fx.GraphModule, layer: fx.Node, norm: fx.Node) -> None:
    source, given = layer.args[1], layer.args[2] if len(layer.args) > 2 else None
    weight, bias = attribute(module, source), attribute(module, given)
    gamma, beta, mean, variance = (attribute(module, argument) for argument in norm.args[1:5])
    epsilon = norm.args[_NORMS[op_name(norm)]]
    assert isinstance(source, fx.Node)
    assert isinstance(epsilon, float)
    assert weight is not None
    assert mean is not None
    assert variance is not None
    with torch.no_grad():
        factor = (variance.double() + epsilon).rsqrt() * (1.0 if gamma is None else gamma.double())
        shift = (0.0 if beta is None else beta.double()) - mean.double() * factor
        new_weight = weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
        new_bias = shift + (0.0 if bias is None else bias.double() * factor)
    paths = _paths(module, source, given)
    with module.graph.inserting_before(layer):
        nodes = []
        for path, value in zip(paths, (new_weight, new_bias), strict=True):
            set_parameter(module, path, value.to(weight.dtype))
            nodes.append(module.graph.get_attr(path))
    layer.args = (layer.args[0], *nodes, *layer.args[3:])
    _replace(module.graph, norm, layer)


def _paths(module: nn.Module, weight: fx.Node, bias: object) -> tuple[str, str]:
    """Where the folded weight and bias go: in place of the old ones, unless another layer reads these too."""
    path = str(weight.target)
    owner, _, name = path.rpartition(".")
    other = f"{owner}.{name.replace('weight', 'bias') if 'weight' in name else name + '_bias'}".lstrip(".")
    if len(weight.users) > 1:
        return _free(module, f"{path}_folded"), _free(module, f"{other}_folded")
    own = isinstance(bias, fx.Node) and len(bias.users) == 1
    return path, str(bias.target) if own and isinstance(bias, fx.Node) else _free(module, other)


def _replace(graph: fx.Graph, norm: fx.Node, layer: fx.Node) -> None:
    """Read ``layer`` where the result of ``norm``, or the first of its results, was read."""
    if op_name(norm) == "batch_norm":
        norm.replace_all_uses_with(layer)
    for user in list(norm.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(layer)
        graph.erase_node(user)
    graph.erase_node(norm)


def _free(module: nn.Module, path: str) -> str:
    owner, _, name = path.rpartition(".")
    place, count, free = module.get_submodule(owner), 0, name
    while hasattr(place, free) and getattr(place, free) is not None:
        count += 1
        free = f"{name}_{count}"
    return f"{owner}.{free}".lstrip(".")
