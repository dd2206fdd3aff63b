"""Parametrized tensors turned back into plain parameters."""

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

__all__ = ["fold_parametrizations", "parametrized_names"]


def parametrized_names(model: nn.Module) -> set[tuple[nn.Module, str]]:
    """Each module of ``model`` with the name of each of its parametrized tensors."""
    parts = [part for part in model.modules() if parametrize.is_parametrized(part)]
    return {(part, name) for part in parts for name in _held(part)}


def fold_parametrizations(model: nn.Module, keep: Collection[tuple[nn.Module, str]] = ()) -> None:
    """Turn parametrized tensors into plain parameters at their present value, in place.

    Beyond ``torch.nn.utils.parametrize.remove_parametrizations``, frozen parameters stay parameters (there they become
    buffers), and copies are safe (there, folding a copy breaks the model it was copied from, since both have one
    class).

    Args:
        model: any module; it computes the same as before, up to rounding.
        keep: what is left as it is, as :func:`parametrized_names` gives it.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> fold_parametrizations(layer)
        >>> list(layer.state_dict())
        ['weight', 'bias']
    """
    for part in list(model.modules()):
        if parametrize.is_parametrized(part):
            _fold(part, [name for name in _held(part) if (part, name) not in keep])


def _held(part: nn.Module) -> list[str]:
    held: Any = part.parametrizations
    return list(held)


def _fold(part: nn.Module, names: Collection[str]) -> None:
    own = type(part)
    part.__class__ = type(own.__name__, own.__bases__, dict(own.__dict__))
    held: Any = part.parametrizations
    for name in names:
        wanted = [value.requires_grad for key, value in held[name]._parameters.items() if value is not None]
        parametrize.remove_parametrizations(part, name)
        value = part._buffers.get(name)
        if wanted and value is not None:
            del part._buffers[name]
            part.register_parameter(name, nn.Parameter(value.detach(), requires_grad=any(wanted)))
    if names and "bias" in part._parameters:  # layers list it behind their weight
        part._parameters["bias"] = part._parameters.pop("bias")
