"""A model whose inputs a small learned network changes while it trains."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from netwright.core.data import Inputs, call

__all__ = ["Augmented", "Change", "can_change", "kind_of", "parts", "whole_of"]


class Change(nn.Module):
    """Two layers from one input tensor and noise of its shape to a change of at most ``strength`` spreads."""

    spread: Tensor

    def __init__(self, sample: Tensor, hidden: int, strength: float) -> None:
        super().__init__()
        self.images, self.strength = sample.ndim > 3, strength
        channels = sample.shape[1 if self.images else -1]
        if self.images:
            kind = {4: nn.Conv2d, 5: nn.Conv3d}[sample.ndim]
            self.first: nn.Module = kind(2 * channels, hidden, 3, padding=1)
            self.last: nn.Module = kind(hidden, channels, 3, padding=1)
        else:
            self.first, self.last = nn.Linear(2 * channels, hidden), nn.Linear(hidden, channels)
        self.register_buffer("spread", sample.std().clamp_min(1e-6))
        self.to(torch.promote_types(sample.dtype, torch.float32))  # in half precision Adam's epsilon is zero

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """The change in units of the spread, of the shape of ``x``."""
        both = torch.cat([x / self.spread, noise], 1 if self.images else -1).to(self.spread.dtype)
        change: Tensor = self.strength * torch.tanh(self.last(functional.relu(self.first(both))))
        return change


class Augmented(nn.Module):
    """The quantized model, which in training reads inputs that the transformation has changed.

    Args:
        model: the quantized model.
        whole: the model in full precision; it stays as it is.
        inputs: all calibration inputs.
        hidden: channels within the transformation.
        strength: the largest change, in units of the inputs' spread; 0 for none.
        share: how likely an item is changed when the quantized model reads it in training.
    """

    def __init__(
        self, model: nn.Module, whole: nn.Module, inputs: Inputs, hidden: int, strength: float, share: float = 1.0
    ) -> None:
        super().__init__()
        self.share = share
        self.model, self.whole = model, whole.requires_grad_(False)
        self.changes = nn.ModuleDict(
            {
                key: Change(value, hidden, strength)
                for key, value in parts(inputs).items()
                if strength > 0 and can_change(value)
            }
        )
        self.changes.requires_grad_(False)  # so that the training loop's optimizer leaves it alone
        self.seen: Inputs = inputs

    def train(self, mode: bool = True) -> "Augmented":
        """Set the mode; the whole model evaluates in either."""
        super().train(mode)
        self.whole.eval()
        return self

    def vary(self, inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
        """Changed inputs, and the changes in units of the spread."""
        varied, moved = parts(inputs), []
        for key, change in self.changes.items():
            value = varied[key]
            moved.append(change(value, torch.randn_like(value)))
            varied[key] = (value + change.spread * moved[-1]).to(value.dtype)
        return whole_of(inputs, varied), moved

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The quantized model's answer to varied inputs, which stay readable as ``seen``."""
        inputs: Inputs = kwargs or (args[0] if len(args) == 1 else args)
        with torch.no_grad():
            self.seen = self._mixed(inputs, self.vary(inputs)[0])
        return call(self.model, self.seen)

    def _mixed(self, inputs: Inputs, varied: Inputs) -> Inputs:
        """Items drawn from ``varied``, the others as they are."""
        plain, changed = parts(inputs), parts(varied)
        if self.share < 1 and self.changes:
            picked = torch.rand(len(plain[next(iter(self.changes))])) < self.share
            for key in self.changes:
                value = plain[key]
                mask = picked.to(value.device).view(-1, *(1,) * (value.ndim - 1))
                changed[key] = torch.where(mask, changed[key], value)
        return whole_of(inputs, changed)


def parts(inputs: Inputs) -> dict[str, Any]:
    """What inputs hold, also in nested tuples and dicts, by position."""
    return {str(position): value for position, value in enumerate(pytree.tree_leaves(_plain(inputs)))}


def whole_of(inputs: Inputs, parts: dict[str, Any]) -> Inputs:
    """Inputs of the form of ``inputs`` out of its parts."""
    made: Inputs = pytree.tree_unflatten(list(parts.values()), pytree.tree_structure(_plain(inputs)))
    return made


def _plain(inputs: Inputs) -> Inputs:
    """Mappings of other classes, of which pytrees know nothing, as dicts."""
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


def can_change(value: Any) -> bool:
    """Whether a part is a tensor of a type and a rank that the transformation takes."""
    return isinstance(value, Tensor) and value.is_floating_point() and 2 <= value.ndim <= 5


def kind_of(value: Any) -> str:
    """What a part is, for messages."""
    return f"{value.dtype} in {value.ndim} dimensions" if isinstance(value, Tensor) else type(value).__name__
