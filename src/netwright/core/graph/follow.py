"""Traced graphs that can be moved: tensors that a graph makes are made where its inputs are."""

from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["follow_inputs"]


def follow_inputs(graph: fx.Graph) -> None:
    """Take the device of the first input wherever the trace wrote down the device it was made on.

    A trace of ``torch.arange(n, device=x.device)`` remembers the device, and a module made of it would fail on any
    other. Checks of tensors' devices go.

    Args:
        graph: of aten operations; changed in place.
    """
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    first = next((node for node in inputs if isinstance(node.meta.get("val"), Tensor)), None)
    fixed = [node for node in graph.nodes if node.op == "call_function" and _devices(node)]
    if first is None or not fixed:
        return
    with graph.inserting_after(inputs[-1]):
        where = graph.call_function(getattr, (first, "device"))
    for node in fixed:
        node.args = tuple(where if isinstance(value, torch.device) else value for value in node.args)
        node.kwargs = {name: where if isinstance(value, torch.device) else value for name, value in node.kwargs.items()}


def _devices(node: fx.Node) -> list[Any]:
    return [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.device)]
