"""Where in a traced graph tensors are rounded to integers.

The patterns follow what integer kernels exist for: a convolution computes integers from integers, its activation
included; sums, products, concatenations and average pools of integers are integers; reshapes and maximum pools move
integers about; a linear layer takes integers and gives floats, unless an integer operation reads them. Everything
else stays float.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from netwright.compress._fold import attribute, op_name

__all__ = ["Plan", "Weighted", "plan"]


@dataclass(frozen=True)
class Weighted:
    """An operation whose weight becomes integers.

    Args:
        data: position of the argument that is the activation.
        weight: position of the argument that is the weight.
        axis: dimension of the weight's output channels.
    """

    data: int
    weight: int
    axis: int


@dataclass
class Plan:
    """Where quantizers go.

    Args:
        weights: operations whose weight is rounded.
        outputs: nodes whose result is rounded on a grid of its own.
        shared: nodes whose result is rounded on the grid of another node.
    """

    weights: dict[fx.Node, Weighted] = field(default_factory=dict)
    outputs: list[fx.Node] = field(default_factory=list)
    shared: dict[fx.Node, fx.Node] = field(default_factory=dict)


_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
_WEIGHTED = {
    **dict.fromkeys(_CONVOLUTIONS, Weighted(0, 1, 0)),
    "linear": Weighted(0, 1, 0),
    "addmm": Weighted(1, 2, 1),
    "mm": Weighted(0, 1, 1),
}
_FUSED = {"relu": 0.0, "relu6": 0.0, "hardtanh": -1.0, "clamp_min": 0.0}  # and the least value by default
_PADDING = {"constant_pad_nd": 2, "pad": 3}  # and the position of the value
_MOVING = {
    *(
        "max_pool2d",
        "view",
        "reshape",
        "flatten",
        "permute",
        "transpose",
        "squeeze",
        "unsqueeze",
        "contiguous",
        "clone",
    ),
    *("dropout", "pixel_shuffle", "upsample_nearest2d", "slice", "select", "_unsafe_view", "unflatten"),
}
_COMPUTING = {
    *("add", "mul", "cat", "avg_pool2d", "adaptive_avg_pool2d", "mean", "sigmoid", "leaky_relu"),
    *("relu", "relu6", "hardtanh", "clamp_min"),
}


def plan(module: fx.GraphModule, skip: Sequence[str] = ()) -> Plan:
    """Decide where quantizers go; the graph is left as it is.

    Args:
        module: a traced model.
        skip: modules, by name, whose weights stay as they are.
    """
    found = Plan()
    for node in module.graph.nodes:
        rule = _WEIGHTED.get(op_name(node))
        if (
            rule is not None
            and _has_weight_of_its_own(module, node, rule)
            and not _within(node.args[rule.weight], skip)
        ):
            found.weights[node] = rule
    wanted = _wanted(module.graph, found)
    grids: dict[fx.Node, fx.Node] = {}  # a node that holds integers -> the node whose grid they are on
    for node in module.graph.nodes:
        if node in found.weights and (op_name(node) in _CONVOLUTIONS or node in wanted):
            _own(found, grids, _after_activation(node))
        elif node in grids:
            continue
        elif node in wanted and (op_name(node) in _MOVING or _is_zero_padding(node)) and node.args[0] in grids:
            found.shared[node] = grids[node] = grids[node.args[0]]
        elif node in wanted and _computes_integers(node, grids):
            _own(found, grids, _after_activation(node))
    for node, rule in found.weights.items():
        source = node.args[rule.data]
        if isinstance(source, fx.Node) and source not in grids:
            _own_source(found, grids, source)
    return found


def _within(source: object, names: Sequence[str]) -> bool:
    """Whether the attribute that a node reads belongs to one of the modules, or to a part of one."""
    return isinstance(source, fx.Node) and any(f"{source.target}".startswith(f"{name}.") for name in names)


def _own_source(found: Plan, grids: dict[fx.Node, fx.Node], source: fx.Node) -> None:
    """Round what a layer reads; before it is padded, so that the padding can become the layer's own."""
    if _is_zero_padding(source) and isinstance(source.args[0], fx.Node):
        inner = source.args[0]
        if inner not in grids:
            _own(found, grids, inner)
        found.shared[source] = grids[source] = grids[inner]
    else:
        _own(found, grids, source)


def _own(found: Plan, grids: dict[fx.Node, fx.Node], node: fx.Node) -> None:
    found.outputs.append(node)
    grids[node] = node


def _after_activation(node: fx.Node) -> fx.Node:
    """The activation that alone reads ``node`` and is computed with it; else ``node``."""
    if len(node.users) == 1:
        (user,) = node.users
        name = op_name(user)
        if name in _FUSED and (user.args[1] if len(user.args) > 1 else _FUSED[name]) == 0:
            return user
    return node


def _computes_integers(node: fx.Node, grids: dict[fx.Node, fx.Node]) -> bool:
    name = op_name(node)
    if name not in _COMPUTING or len(node.kwargs) > 0:
        return False
    if name in ("adaptive_avg_pool2d", "mean") and not _is_global_pool(node):
        return False
    count = 2 if name in ("add", "mul") else 1
    operands = node.args[0] if name == "cat" else node.args[:count]
    assert isinstance(operands, list | tuple)
    return len(operands) >= count and all(isinstance(each, fx.Node) and each in grids for each in operands)


def _is_global_pool(node: fx.Node) -> bool:
    shape = node.args[1] if len(node.args) > 1 else ()
    size = list(shape) if isinstance(shape, list | tuple) else [shape]
    if op_name(node) == "adaptive_avg_pool2d":
        return all(extent == 1 for extent in size)
    return (
        _rank(node.args[0]) == 4
        and {axis % 4 for axis in size if isinstance(axis, int)} == {2, 3}
        and len(node.args) > 2
        and bool(node.args[2])
    )


def _is_zero_padding(node: fx.Node) -> bool:
    """Zero is on every grid; another value might not be."""
    name = op_name(node)
    if name == "pad" and len(node.args) > 2 and node.args[2] != "constant":
        return False
    return name in _PADDING and not any(node.args[_PADDING[name] :])


def _rank(node: object) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.ndim if isinstance(value, Tensor) else -1


def _has_weight_of_its_own(module: fx.GraphModule, node: fx.Node, rule: Weighted) -> bool:
    """Whether the weight is a stored matrix or kernel that only such operations read (an embedding may share it)."""
    source = node.args[rule.weight]
    value = attribute(module, source)
    if value is None or value.ndim < 2 or not value.is_floating_point():
        return False
    owner = value.data_ptr()
    readers = [
        user
        for other in module.graph.nodes
        if (tensor := attribute(module, other)) is not None and tensor.data_ptr() == owner
        for user in other.users
    ]
    return all(op_name(user) in _WEIGHTED for user in readers)


def _wanted(graph: fx.Graph, found: Plan) -> set[fx.Node]:
    """Nodes whose result an integer operation reads, through operations that can work on integers."""
    wanted: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for user in node.users:
            rule = found.weights.get(user)
            through = user in wanted and (op_name(user) in _MOVING | _COMPUTING or _is_zero_padding(user))
            if (rule is not None and user.args[rule.data] is node) or through:
                wanted.add(node)
    return wanted
