"""The way back to a plain model."""

from torch import nn

from netwright.core.parametrized import fold_parametrizations
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
    fold_parametrizations(model)
    return model
