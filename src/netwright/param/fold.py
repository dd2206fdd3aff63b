"""The way back to a plain model."""

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from netwright.param.backward_modulation import BackwardModulation

__all__ = ["fold"]


def fold(model: nn.Module) -> nn.Module:
    """Turn every parametrized tensor of a model into a plain parameter at its present value.

    Reach for it when training is over, before a model is exported, compressed or given away: parametrizations of any
    kind are folded, ours and those of ``torch.nn.utils``, and a :class:`BackwardModulation` is detached.

    It goes further than ``torch.nn.utils.parametrize.remove_parametrizations``: frozen parameters stay parameters
    (there they become buffers), and copies are safe (there, folding a copy breaks the model it was copied from, since
    both have one class). Cost: every parametrization is computed once.

    Args:
        model: any module. Changed in place; it computes the same as before, up to rounding.

    Returns:
        The model.

    Example:
        >>> from netwright.param.weight_conditioning import weight_conditioning
        >>> layer = weight_conditioning(nn.Linear(2, 2))
        >>> fold(layer), list(layer.state_dict())
        (Linear(in_features=2, out_features=2, bias=True), ['weight', 'bias'])
    """
    for part in list(model.modules()):
        for hook in list(part._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, BackwardModulation):
                owner.remove()
        if parametrize.is_parametrized(part):
            _fold(part)
    return model


def _fold(part: nn.Module) -> None:
    own = type(part)
    part.__class__ = type(own.__name__, own.__bases__, dict(own.__dict__))
    held: Any = part.parametrizations
    for name in list(held):
        wanted = [value.requires_grad for key, value in held[name]._parameters.items() if value is not None]
        parametrize.remove_parametrizations(part, name)
        value = part._buffers.get(name)
        if wanted and value is not None:
            del part._buffers[name]
            part.register_parameter(name, nn.Parameter(value.detach(), requires_grad=any(wanted)))
    if "bias" in part._parameters:  # layers list it behind their weight
        part._parameters["bias"] = part._parameters.pop("bias")
