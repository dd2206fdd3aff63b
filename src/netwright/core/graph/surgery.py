"""Zeroing units in a copy of a model, and slicing them out of its parameters."""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from netwright.core.errors import TransformError

__all__ = ["Keep", "holders", "sliced", "zeroed"]

Keep = Mapping[str, Mapping[int, Tensor]]
"""For each parameter and dimension a ``(size,)`` boolean mask of the entries that remain."""


def holders(model: nn.Module, names: Mapping[str, object] | list[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """For each name, all places in the model that hold that same tensor (tied parameters are held twice).

    Raises:
        TransformError: the model has no parameter or buffer of that name.
    """
    held: dict[int, list[tuple[nn.Module, str]]] = {}
    tensors: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                tensors[f"{prefix}.{name}" if prefix else name] = tensor
                places = held.setdefault(id(tensor), [])
                if (module, name) not in places:
                    places.append((module, name))
    missing = [name for name in names if name not in tensors]
    if missing:
        raise TransformError(
            f"{type(model).__name__} has no parameter {missing[0]!r}: this is not the model that was traced. "
            "Trace it again."
        )
    return {name: held[id(tensors[name])] for name in names}


def zeroed(model: nn.Module, keep: Keep, kept: frozenset[tuple[str, int]]) -> nn.Module:
    """A copy whose removed entries are zero, in parameters and floating-point buffers.

    Args:
        model: the model to copy.
        keep: what remains.
        kept: dimensions of parameters in which nothing is zeroed.
    """
    copy = deepcopy(model)
    with torch.no_grad():
        for parameter, places in holders(copy, keep).items():
            module, name = places[0]
            tensor = getattr(module, name)
            for dim, mask in keep[parameter].items():
                _check(parameter, tensor, dim, mask)
                if (parameter, dim) not in kept and tensor.is_floating_point():
                    tensor.index_fill_(dim, torch.nonzero(~mask).flatten().to(tensor.device), 0)
    return copy


def sliced(model: nn.Module, keep: Keep) -> nn.Module:
    """A copy without the removed entries. Tied parameters stay tied, types and ``requires_grad`` as they were."""
    copy = deepcopy(model)
    for parameter, places in holders(copy, keep).items():
        module, name = places[0]
        tensor = getattr(module, name)
        smaller = tensor.detach()
        for dim, mask in keep[parameter].items():
            _check(parameter, tensor, dim, mask)
            smaller = smaller.index_select(dim, torch.nonzero(mask).flatten().to(tensor.device))
        if isinstance(tensor, nn.Parameter):
            smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
        for module, name in places:
            (module._parameters if name in module._parameters else module._buffers)[name] = smaller
    return copy


def _check(parameter: str, tensor: Tensor, dim: int, mask: Tensor) -> None:
    if tensor.ndim <= dim or tensor.shape[dim] != mask.numel():
        raise TransformError(
            f"{parameter} has the shape {tuple(tensor.shape)}, but {mask.numel()} entries in dimension {dim} when it "
            "was traced: the model has changed since. Trace it again."
        )
