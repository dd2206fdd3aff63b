"""Batch norms of a traced graph as modules whose statistics follow the data again."""

import itertools

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from netwright.compress._fold import attribute, epsilon_of, is_fixed_norm, momentum_of, op_name

__all__ = ["drop_unused", "free_name", "norm_of", "thaw"]

_KINDS: dict[int, type[_BatchNorm]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def thaw(module: fx.GraphModule) -> int:
    """Put an ``nn.BatchNorm`` in place of every batch norm with fixed statistics; returns how many.

    Calls that share their statistics share the module.
    """
    made: dict[object, str] = {}
    count = 0
    for node in list(module.graph.nodes):
        if (norm := norm_of(module, node)) is None:
            continue
        mean = node.args[3]
        if mean.target not in made:
            made[mean.target] = free_name(module, f"{node.name}_thawed")
            module.add_submodule(made[mean.target], norm)
        with module.graph.inserting_before(node):
            thawed = module.graph.call_module(made[mean.target], (node.args[0],))
        thawed.meta = dict(node.meta)
        if op_name(node) == "batch_norm":
            node.replace_all_uses_with(thawed)
        else:
            thawed.meta["val"] = node.meta["val"][0]
            for user in list(node.users):
                user.replace_all_uses_with(thawed)
                module.graph.erase_node(user)
        module.graph.erase_node(node)
        count += 1
    drop_unused(module)
    return count


def norm_of(module: fx.GraphModule, node: fx.Node) -> _BatchNorm | None:
    """A module like a batch norm of fixed statistics; None for any other node, and where its tensors are not stored."""
    if not is_fixed_norm(module, node):
        return None
    scale, shift, mean, variance = (attribute(module, argument) for argument in node.args[1:5])
    value = node.meta.get("val")
    value = value[0] if isinstance(value, tuple | list) else value
    if mean is None or variance is None or value is None or (scale is None) != (shift is None):
        return None
    if len(value.shape) not in _KINDS:
        return None
    kind, affine = _KINDS[len(value.shape)], scale is not None
    norm = kind(len(mean), eps=epsilon_of(node), momentum=momentum_of(node), affine=affine, dtype=mean.dtype)
    norm.to(mean.device)
    with torch.no_grad():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        if scale is not None and shift is not None:
            norm.weight.copy_(scale)
            norm.bias.copy_(shift)
            norm.weight.requires_grad_(scale.requires_grad)
            norm.bias.requires_grad_(shift.requires_grad)
    return norm.eval()


def free_name(module: nn.Module, stem: str) -> str:
    """A name that ``module`` does not use yet."""
    names = itertools.chain([stem], (f"{stem}_{count}" for count in itertools.count(1)))
    return next(name for name in names if not hasattr(module, name))


def drop_unused(module: fx.GraphModule) -> None:
    """Remove nodes, modules, parameters and buffers that nothing reads."""
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    called = tuple(f"{node.target}." for node in module.graph.nodes if node.op == "call_module")
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if name in read or name.startswith(called):
            continue
        owner, _, last = name.rpartition(".")
        delattr(module.get_submodule(owner), last)
    module.recompile()
