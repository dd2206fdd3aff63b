"""Whether two modules compute the same function, asked with examples."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from netwright.core.data import Inputs, beside
from netwright.core.graph.export import arguments
from netwright.core.graph.inference import inference

__all__ = ["batch_of", "difference", "example", "first_parameter", "like", "outputs"]


def example(inputs: Inputs) -> Inputs:
    """At most two items of a batch, where all its tensors agree on what the batch is."""
    lengths = {tensor.shape[0] for tensor in _leaves(inputs) if tensor.ndim}
    if len(lengths) != 1:
        return inputs
    first: Inputs = _map(inputs, lambda tensor: tensor[:2].clone() if tensor.ndim else tensor)
    return first


def batch_of(inputs: Inputs, count: int) -> Inputs:
    """``count`` items, taken from ``inputs`` in turn."""
    taken: Inputs = _map(inputs, lambda t: t[torch.arange(count, device=t.device) % t.shape[0]] if t.ndim else t)
    return taken


def first_parameter(model: nn.Module) -> Tensor:
    """The model's first parameter, which stands for its device and type; an empty tensor if it has none."""
    return next(iter(model.parameters()), torch.empty(0))


def like(inputs: Inputs, model: nn.Module, dtype: torch.dtype) -> Inputs:
    """``inputs`` on the model's device, their numbers of its type where that is no longer ``dtype``."""
    first = first_parameter(model)
    recast = first.dtype != dtype
    moved: Inputs = _map(
        inputs, lambda t: t.to(first.device, first.dtype if recast and t.is_floating_point() else t.dtype)
    )
    return moved


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors that the model returns, in evaluation mode."""
    args, kwargs = arguments(beside(inputs, model))
    with inference(model):
        return list(_leaves(model(*args, **kwargs)))


def difference(a: nn.Module, b: nn.Module, inputs: Inputs, tolerance: float) -> str:
    """Why two modules do not compute the same on batches of two and three; "" if they do.

    Args:
        a: the reference.
        b: the module in question.
        inputs: an example batch.
        tolerance: how far outputs may differ, relative to the largest output where that is above one; at least 64
            rounding errors of their type.
    """
    for count in (2, 3):
        batch = batch_of(inputs, count)
        try:
            expected, found = outputs(a, batch), outputs(b, batch)
        except Exception as error:  # whatever a user's forward raises on a smaller model is the answer
            return f"{type(error).__name__}: {error}"
        if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
            return "its outputs have other shapes"
        for left, right in zip(expected, found, strict=True):
            distance = _error(left, right)
            rounding = torch.finfo(left.dtype).eps if left.is_floating_point() else 0.0
            if not distance <= max(tolerance, 64 * rounding):
                return f"its outputs differ by {distance:.1e}"
    return ""


def _error(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest entry of ``a`` where that is above one; inf where b is not."""
    a, b = a.double(), b.double()
    finite = torch.isfinite(a)
    if not a.numel() or not finite.any():
        return 0.0
    if not torch.isfinite(b[finite]).all():
        return float("inf")
    return float((a - b)[finite].abs().max() / a[finite].abs().max().clamp(min=1))


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_map(item, change) for item in value)
    return value


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
