"""A model as a graph of aten operations that is a module of its own, and its dropout as modules in that graph."""

import copy
import warnings
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from netwright.compress._batch_norms import free_name
from netwright.compress._fold import op_name
from netwright.core.graph.export import export_model
from netwright.core.graph.follow import follow_inputs
from netwright.core.graph.rebuild import DROPOUTS, dropout
from netwright.core.graph.signature import plain_signature
from netwright.core.task import Task

__all__ = ["trace"]

_NOTE = "netwright.dropout"  # in the notes of a node: the operation and the probability that stood there


def trace(model: nn.Module, task: Task, *, dropouts: bool = False) -> fx.GraphModule:
    """A copy of ``model`` as a graph of aten operations that trains and deep-copies like any module.

    Args:
        model: any module that ``torch.export`` traces.
        task: its first items are the inputs of the trace.
        dropouts: whether the graph has the model's dropout, as modules that are alive in training; without, it is gone
            for good. Dropout within attention and recurrent layers is gone either way.

    Raises:
        TraceError: a model that cannot be traced.
    """
    program = export_model(model, task.example())
    if dropouts:
        _note_dropout(program)
    if any(_is_in_place(node) for node in program.graph.nodes):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its own
            program = program.run_decompositions({})
    exported: Any = program.module()
    for node in list(exported.graph.nodes):
        if node.op == "call_module" or (node.op == "get_attr" and not node.users):  # checks of input shapes, leftovers
            exported.graph.erase_node(node)
    follow_inputs(exported.graph)
    plain_signature(exported.graph, program, as_dict=True)
    if dropouts:
        _call_dropout(exported)
    copied = copy.deepcopy(fx.GraphModule(exported, exported.graph, type(model).__name__))
    trainable = {name for name, value in model.named_parameters(remove_duplicate=False) if value.requires_grad}
    for name, value in copied.named_parameters():
        value.requires_grad_(name in trainable)
    return copied


def _is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _note_dropout(program: ExportedProgram) -> None:
    """Write products with one in place of dropout that evaluation skips, for decompositions leave nothing of it."""
    aten = torch.ops.aten
    for node in program.graph.nodes:
        operation = op_name(node)
        if operation.rstrip("_") in DROPOUTS and node.args[1] > 0 and not node.args[2]:
            node.meta["custom"] = {**node.meta.get("custom", {}), _NOTE: (operation.rstrip("_"), node.args[1])}
            node.target = aten.mul_.Scalar if operation.endswith("_") else aten.mul.Scalar
            node.args = (node.args[0], 1.0)


def _call_dropout(module: fx.GraphModule) -> None:
    """Put the module in the place of every product that stands for it."""
    for node in list(module.graph.nodes):
        if op_name(node) != "mul" or _NOTE not in node.meta.get("custom", {}):
            continue
        operation, share = node.meta["custom"][_NOTE]
        path = free_name(module, "dropout")
        module.add_submodule(path, dropout(operation, share, node.meta["val"].ndim))
        with module.graph.inserting_before(node):
            called = module.graph.call_module(path, (node.args[0],))
        called.meta = {key: value for key, value in node.meta.items() if key != "custom"}
        node.replace_all_uses_with(called)
        module.graph.erase_node(node)
