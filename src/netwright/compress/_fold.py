"""Batch norms folded into the layer before them, in a traced graph."""

from typing import Any

import torch
from torch import Tensor, fx, nn

__all__ = [
    "attribute",
    "epsilon_of",
    "fold_batch_norms",
    "is_fixed_norm",
    "momentum_of",
    "op_name",
    "set_parameter",
    "source_of",
]

_FOLDABLE = {"conv1d", "conv2d", "conv3d", "linear"}
_NORMS = {"batch_norm": 7, "_native_batch_norm_legit_no_training": 6}  # and the position of epsilon
_SOURCE = "folded_from"  # in the meta of nodes: the path of the weight before folding


def fold_batch_norms(module: fx.GraphModule) -> int:
    r"""Fold every batch norm that alone reads a convolution or linear layer into that layer's weight and bias.

    .. math:: w' = w \gamma / \sqrt{\sigma^2 + \epsilon}, \quad b' = (b - \mu) w' / w + \beta

    computed in float64. The model's function in evaluation mode stays the same. Layers that share their weights and
    their batch norm share what becomes of them. Left alone are norms that take their statistics from the batch, and
    those that normalize another dimension than the layer's output channels, as after a linear layer on sequences.

    Returns:
        How many were folded.
    """
    folded = 0
    done: dict[tuple[object, ...], tuple[list[Tensor | None], tuple[str, str]]] = {}
    for node in list(module.graph.nodes):
        if is_fixed_norm(module, node) and _is_foldable(node.args[0], module):
            layer: Any = node.args[0]
            given = [attribute(module, each) for each in (*_weights(layer), *node.args[1:5])]
            key = (*map(id, given), epsilon_of(node))
            if key not in done:
                done[key] = given, _stored(module, layer, given, epsilon_of(node))  # held, so that no id comes again
            _fold(module, layer, node, done[key][1])
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


def is_fixed_norm(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node is a batch norm in evaluation form, all of whose tensors the model stores."""
    if op_name(node) not in _NORMS or (op_name(node) == "batch_norm" and node.args[5] is not False):
        return False
    stored = [argument is None or attribute(module, argument) is not None for argument in node.args[1:5]]
    return all(stored) and None not in node.args[3:5] and isinstance(node.args[_NORMS[op_name(node)]], float)


def epsilon_of(norm: fx.Node) -> float:
    """What a batch norm adds to variances."""
    epsilon = norm.args[_NORMS[op_name(norm)]]
    assert isinstance(epsilon, float)
    return epsilon


def momentum_of(norm: fx.Node) -> float | None:
    """How far a batch norm's statistics follow each batch; None, in a trace 0, where they are a mean of all batches."""
    momentum = norm.args[_NORMS[op_name(norm)] - 1]
    return momentum if isinstance(momentum, float) and momentum > 0 else None


def source_of(node: fx.Node) -> str:
    """The path that the weight which a node reads had before folding."""
    return str(node.meta.get(_SOURCE, node.target))


def _weights(layer: fx.Node) -> tuple[Any, Any]:
    return layer.args[1], layer.args[2] if len(layer.args) > 2 else None


def _is_foldable(layer: Any, module: fx.GraphModule) -> bool:
    """Whether a layer's output is read once, has its channels in dimension 1, and comes of stored weights."""
    if op_name(layer) not in _FOLDABLE or len(layer.users) != 1:
        return False
    source, given = _weights(layer)
    weight, value = attribute(module, source), layer.meta.get("val")
    batched = weight is not None and isinstance(value, Tensor) and value.ndim == weight.ndim
    return batched and (given is None or attribute(module, given) is not None)


def _stored(module: fx.GraphModule, layer: fx.Node, given: list[Tensor | None], epsilon: float) -> tuple[str, str]:
    """Store the folded weight and bias; their paths."""
    weight, bias, gamma, beta, mean, variance = given
    assert weight is not None
    assert mean is not None
    assert variance is not None
    with torch.no_grad():
        factor = (variance.double() + epsilon).rsqrt() * (1.0 if gamma is None else gamma.double())
        shift = (0.0 if beta is None else beta.double()) - mean.double() * factor
        new_weight = weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))
        new_bias = shift + (0.0 if bias is None else bias.double() * factor)
    trainable = any(value is not None and value.requires_grad for value in (weight, bias, gamma, beta))
    paths = _paths(module, *_weights(layer))
    for path, value in zip(paths, (new_weight, new_bias), strict=True):
        set_parameter(module, path, value.to(weight.dtype), trainable=trainable)
    return paths


def _fold(module: fx.GraphModule, layer: fx.Node, norm: fx.Node, paths: tuple[str, str]) -> None:
    source = source_of(_weights(layer)[0])
    with module.graph.inserting_before(layer):
        nodes = [module.graph.get_attr(path) for path in paths]
    nodes[0].meta[_SOURCE] = source
    layer.args = (layer.args[0], *nodes, *layer.args[3:])
    _replace(module.graph, norm, layer)


def _paths(module: fx.GraphModule, weight: fx.Node, bias: Any) -> tuple[str, str]:
    """Where the folded weight and bias go: in place of the old ones, unless another layer reads these too."""
    path = str(weight.target)
    owner, _, name = path.rpartition(".")
    other = f"{owner}.{name.replace('weight', 'bias') if 'weight' in name else name + '_bias'}".lstrip(".")
    if _readers(module.graph, weight) > 1:
        return _free(module, f"{path}_folded"), _free(module, f"{other}_folded")
    own = isinstance(bias, fx.Node) and _readers(module.graph, bias) == 1
    return path, str(bias.target) if own else _free(module, other)


def _readers(graph: fx.Graph, node: fx.Node) -> int:
    """How many times what a ``get_attr`` node names is read."""
    return sum(len(each.users) for each in graph.nodes if each.op == "get_attr" and each.target == node.target)


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
