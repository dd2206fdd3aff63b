"""Traced graphs that are called, copied and pickled like any module."""

from collections.abc import Mapping

from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

__all__ = ["plain_signature"]


def plain_signature(graph: fx.Graph, program: ExportedProgram, *, as_dict: bool = False) -> bool:
    """Let a graph take its tensors as ordinary arguments and return an ordinary tensor, tuple or dict.

    Inputs that were given by name keep their names, which the trace has written in lower case. Torch's own way
    describes nested inputs and outputs by objects whose copies print a warning each. They stay where an input is
    nested, or where the model returns a class of its own.

    Args:
        graph: of ``program.module()``, changed in place; the module has to be recompiled.
        program: what it comes from.
        as_dict: turn other mappings, as of Transformers, into a dict.

    Returns:
        Whether it was done.
    """
    spec = program.call_spec
    assert spec.in_spec is not None
    assert spec.out_spec is not None
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    args, kwargs = pytree.tree_unflatten(list(inputs), spec.in_spec)
    if not all(isinstance(value, fx.Node) for value in (*args, *kwargs.values())):
        return False  # nested inputs: torch's own signature unpacks them
    output = graph.output_node()
    (leaves,) = output.args
    assert isinstance(leaves, list | tuple)
    result = pytree.tree_unflatten(list(leaves), spec.out_spec)
    if isinstance(result, Mapping) and (as_dict or type(result) is dict):
        result = dict(result)
    elif not isinstance(result, fx.Node | tuple | list):
        return False
    output.args = (result,)
    for key, node in kwargs.items():
        if node.target != key:
            node.target = key
            node._rename(key)  # so that no input is written over before it is read: those of X and x are x and x_1
    graph.set_codegen(fx.graph.CodeGen())
    return True
