"""The shrunk model as a module of its own, built from the traced graph."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from netwright.core.graph.attributes import LEAVES, submodule
from netwright.core.graph.follow import follow_inputs
from netwright.core.graph.resize import Edit
from netwright.core.graph.signature import plain_signature
from netwright.core.graph.table import resize_rule_for
from netwright.core.graph.walk import Walk

__all__ = ["DROPOUTS", "dropout", "literals", "rebuild", "resized"]

_Dropout = nn.modules.dropout._DropoutNd
DROPOUTS: dict[str, type[_Dropout]] = {
    "dropout": nn.Dropout,
    "feature_dropout": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}
"""The module of every operation that is dropout, of whole channels on images."""
_CHANNEL_DROPOUTS: dict[int, type[_Dropout]] = {3: nn.Dropout1d, 5: nn.Dropout3d}

_LEAF_OPERATIONS = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("batch_norm", "instance_norm", "linear", "layer_norm", "group_norm", "embedding"),
)
_REMEMBERED = ("groups", "num_groups", "normalized_shape")
_CHANNEL_NORMS = ("batch_norm", "instance_norm")


def dropout(operation: str, share: float, rank: int) -> nn.Module:
    """The module of a dropout operation on a tensor of that rank."""
    kind = DROPOUTS[operation]
    return (_CHANNEL_DROPOUTS.get(rank, kind) if kind is nn.Dropout2d else kind)(share)


class RunningNorm(nn.Module):
    """Batch normalization with parameters that live elsewhere; normalizes by the batch while training."""

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None
    ) -> Tensor:
        """``x`` normalized per channel."""
        training = self.training or mean is None
        return nn.functional.batch_norm(x, mean, variance, weight, bias, training, self.momentum, self.eps)


def resized(program: ExportedProgram, walk: Walk, removed: npt.NDArray[np.bool_]) -> fx.GraphModule:
    """The traced graph with every length that stands as a number in it brought up to date."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    values = dict(walk.values)
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target in walk.names:
            values[node.name] = walk.names[node.target]
    for node in module.graph.nodes:
        resize = resize_rule_for(node.target) if node.op == "call_function" else None
        if resize is not None and node.name in values:
            resize(Edit(node, values, walk.constraints, removed))
    plain_signature(module.graph, program)
    return module


def literals(graph: fx.Graph, walk: Walk, removed: npt.NDArray[np.bool_]) -> dict[str, dict[str, object]]:
    """For every module, the lengths that the operation in its ``forward`` takes as arguments, or normalizes."""
    found: dict[str, dict[str, object]] = {}
    for node in graph.nodes:
        if _operation(node) in _CHANNEL_NORMS and node.name in walk.values:
            edit = Edit(node, walk.values, walk.constraints, removed)
            found.setdefault(_owner(node), {})["num_features"] = edit.length(edit.results[0].axes[1])
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            names = [argument.name for argument in node.target._schema.arguments]
            for name in _REMEMBERED:
                if name in names:
                    position = names.index(name)
                    value = node.args[position] if position < len(node.args) else node.kwargs.get(name)
                    if value is not None:
                        found.setdefault(_owner(node), {})[name] = value
    return found


def rebuild(module: fx.GraphModule, source: nn.Module) -> fx.GraphModule:
    """A module that runs ``module``'s graph on the parameters of ``source``, and trains.

    Args:
        module: from :func:`resized`; its graph is changed.
        source: the model with sliced parameters; its leaf modules and tensors are used, not copied.

    Returns:
        A ``GraphModule`` with the parameter names of ``source``, in which leaf modules, batch normalization and
        dropout are modules again.
    """
    graph = module.graph
    device = next(source.parameters(), torch.empty(0)).device
    follow_inputs(graph)
    for node in list(graph.nodes):
        if node.op == "call_function":
            _modularize(module, node, source)
    graph.eliminate_dead_code()
    tensors = _tensors(source)
    attributes: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            attributes[name] = tensors[name] if name in tensors else _attribute(module, name, device)
        elif node.op == "call_module":
            attributes[str(node.target)] = module.get_submodule(str(node.target))
    graph.lint()
    rebuilt = fx.GraphModule(attributes, graph, type(source).__name__)
    own = set(source.modules())
    for made in rebuilt.modules():
        if made not in own:
            made.training = source.training
    return rebuilt


def _modularize(module: fx.GraphModule, node: fx.Node, source: nn.Module) -> None:
    """Put the module back in the place of the operation that was all of its ``forward``.

    One with hooks stays away: what they do is in the graph already.
    """
    operation = _operation(node)
    owner = _owner(node)
    leaf = submodule(source, owner)
    if leaf is not None and (leaf._forward_hooks or leaf._forward_pre_hooks):
        leaf = None
    if leaf is not None and type(leaf) in LEAVES and getattr(leaf, "padding_mode", "zeros") == "zeros":
        data, *rest = reversed(node.args[:2]) if operation == "embedding" else node.args
        if operation in _LEAF_OPERATIONS and _all_held_by(leaf, rest, source):
            _call_module(module, node, owner, leaf, (data,))
    elif operation.rstrip("_") in DROPOUTS:
        share, rank = _float(node.args[1]), node.meta["val"].ndim
        path, made = f"{node.name}_module", dropout(operation.rstrip("_"), share, rank)
        if isinstance(leaf, _Dropout):
            path, made = owner, leaf
        _call_module(module, node, path, made, (node.args[0],))
    elif operation == "batch_norm":
        _, weight, bias, mean, variance, _, momentum, eps, *_ = node.args
        norm = RunningNorm(_float(momentum), _float(eps))
        args = (node.args[0], weight, bias, mean, variance)
        _call_module(module, node, f"{node.name}_module", norm, args)


def _call_module(module: fx.GraphModule, node: fx.Node, path: str, called: nn.Module, args: tuple[Any, ...]) -> None:
    module.add_submodule(path, called)
    with module.graph.inserting_before(node):
        call = module.graph.create_node("call_module", path, args, {}, name=node.name)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    module.graph.erase_node(node)


def _operation(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else str(schema.name).removeprefix("aten::")


def _owner(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _all_held_by(leaf: nn.Module, arguments: Any, source: nn.Module) -> bool:
    """Whether all parameters among ``arguments`` are the leaf's own."""
    own = {id(tensor) for tensor in (*leaf.parameters(), *leaf.buffers())}
    tensors = _tensors(source)
    nodes = [argument for argument in arguments if isinstance(argument, fx.Node)]
    return all(node.op == "get_attr" and id(tensors.get(str(node.target))) in own for node in nodes)


def _tensors(source: nn.Module) -> Mapping[str, Tensor]:
    return dict((*source.named_parameters(remove_duplicate=False), *source.named_buffers(remove_duplicate=False)))


def _attribute(module: nn.Module, name: str, device: torch.device) -> Any:
    owner, _, last = name.rpartition(".")
    found = getattr(module.get_submodule(owner), last)
    return found.to(device) if isinstance(found, Tensor) else found


def _float(value: Any) -> float:
    return float(value)
