"""The convolutions of a module, read off its trace."""

import math
from typing import Any

import torch
from torch import fx, nn

from netwright.core.data import Inputs
from netwright.core.graph.export import export_model
from netwright.search._hao_model import Convolution, MappingError

__all__ = ["convolutions"]

_aten = torch.ops.aten
_PLAIN = (_aten.conv2d.default, _aten.conv2d.padding)


def convolutions(model: nn.Module, inputs: Inputs, *, bits: int = 8) -> list[Convolution]:
    """The convolutions and linear layers of a module in the order in which they run.

    A linear layer is a convolution of one pixel, or of as many, one above the other, as it has places in an item: the
    tokens of a sequence, say.

    Other operations (normalization, activations, pooling, additions) are left out: an accelerator does them in passing.

    Args:
        model: any module that ``torch.export`` traces.
        inputs: a batch of at least one item.
        bits: of all weights and activations.

    Raises:
        TraceError: a model that cannot be traced.
        MappingError: none found, or one that is not square, is dilated, transposed or not two-dimensional.

    Example:
        >>> body = [nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Flatten()]
        >>> for layer in convolutions(nn.Sequential(*body, nn.Linear(32, 5)), torch.zeros(1, 3, 4, 4)):
        ...     print(layer.kind, layer.channels_in, layer.channels_out, layer.height, layer.stride)
        3x3 3 8 2 2
        depthwise 3x3 8 8 2 1
        1x1 32 5 1 1

    Cost: a trace, about a second for a small network.
    """
    found = []
    for node in export_model(model, inputs).graph_module.graph.nodes:
        if node.target in _PLAIN:
            found.append(_convolution(node, bits))
        elif node.target is _aten.linear.default:
            outputs, features = (int(size) for size in _value(node.args[1]).shape)
            places = math.prod(int(size) for size in _value(node).shape[1:-1])
            found.append(Convolution(features, outputs, places, bits=bits))
        elif "conv" in str(node.target) and isinstance(node.target, torch._ops.OpOverload):
            raise MappingError(f"{node.target} cannot be mapped: engines run plain two-dimensional convolutions only.")
    if not found:
        raise MappingError(f"{type(model).__name__} has no convolution or linear layer to map.")
    return found


def _convolution(node: fx.Node, bits: int) -> Convolution:
    outputs, inner, *kernel = (int(size) for size in _value(node.args[1]).shape)
    named = {"stride": 3, "dilation": 5, "groups": 6}
    given = {name: node.args[place] for name, place in named.items() if len(node.args) > place} | dict(node.kwargs)
    stride, dilation, groups = _pair(given.get("stride", 1)), _pair(given.get("dilation", 1)), given.get("groups", 1)
    if kernel[0] != kernel[1] or stride[0] != stride[1] or dilation != [1, 1]:
        raise MappingError(
            f"Convolution {node.name} has kernel {kernel}, stride {stride} and dilation {dilation}; kernel and stride "
            "must be square, without dilation."
        )
    assert isinstance(groups, int)
    height, width = (int(size) for size in _value(node).shape[2:])
    return Convolution(inner * groups, outputs, height, width, kernel[0], stride[0], groups, bits)


def _value(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value


def _pair(value: Any) -> list[int]:
    return [int(entry) for entry in value] if isinstance(value, list | tuple) else [int(value)] * 2
