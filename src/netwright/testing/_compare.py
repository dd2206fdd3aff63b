"""What models are and return, compared."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from netwright.core.data import Inputs, call
from netwright.testing._property import expect

__all__ = ["described", "equal", "facts", "gap", "outputs"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def facts(model: nn.Module) -> dict[str, Any]:
    """What a transform must leave alone in the model that it is given, as copies."""
    return {
        "modules": {name: type(module) for name, module in model.named_modules()},
        "weights or buffers": {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in model.state_dict().items()
        },
        "training modes": [module.training for module in model.modules()],
        "requires_grad flags": [param.requires_grad for param in model.parameters()],
        "gradients": [None if param.grad is None else param.grad.clone() for param in model.parameters()],
        "hooks": [[list(getattr(module, kind)) for kind in _HOOKS] for module in model.modules()],
    }


def equal(left: Any, right: Any) -> bool:
    """Whether two nested structures agree, tensors to the last bit."""
    left_leaves, left_form = pytree.tree_flatten(left)
    right_leaves, right_form = pytree.tree_flatten(right)
    return left_form == right_form and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(left_leaves, right_leaves, strict=True)
    )


def outputs(model: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """The tensors that a model, or a function of inputs, returns."""
    with torch.no_grad():
        found = call(model, inputs) if isinstance(model, nn.Module) else model(inputs)
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def described(outputs: list[Tensor]) -> str:
    """Types and shapes, for a message."""
    return ", ".join(f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}" for value in outputs)


def gap(wanted: list[Tensor], got: list[Tensor]) -> float:
    """Largest difference, relative to the largest output."""
    expect(len(wanted) == len(got), f"{len(got)} outputs where {len(wanted)} are wanted.")
    worst = 0.0
    for a, b in zip(wanted, got, strict=True):
        expect(a.shape == b.shape, f"an output of shape {tuple(b.shape)} where {tuple(a.shape)} is wanted.")
        apart = ((a.double() - b.double()).abs().max() / a.double().abs().max().clamp_min(1e-6)).item()
        worst = max(worst, apart if apart == apart else float("inf"))
    return worst
