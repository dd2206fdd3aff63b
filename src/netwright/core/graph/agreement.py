"""Whether two modules compute the same function, asked with examples."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from netwright.core.data import Inputs, beside
from netwright.core.graph.export import arguments
from netwright.core.graph.inference import inference

__all__ = ["batch_of", "difference", "example", "first_parameter", "like", "outputs", "same_function"]


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


def same_function(a: nn.Module, b: nn.Module, inputs: Inputs, tolerance: float) -> bool:
    """Whether two modules that share their parameters compute the same, whatever the values of these are.

    They are asked twice: with their own values, and with random ones. An output layer of zeros, or a branch that is
    scaled to next to nothing, would hide what is different behind it.

    Args:
        a: the reference.
        b: the module in question; its parameters are the same tensors as those of ``a``, and as they were afterwards.
        inputs: an example batch.
        tolerance: how far outputs may differ, as in :func:`difference`; with random values relative to the largest
            output, however small.
    """
    if difference(a, b, inputs, tolerance):
        return False
    with _random_parameters(b):
        return not difference(a, b, inputs, tolerance, least=torch.finfo(torch.float32).tiny)


@contextmanager
def _random_parameters(model: nn.Module) -> Iterator[None]:
    """Others for the time being: matrices that keep the scale of what they multiply, vectors about one."""
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    own = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        try:
            for number, parameter in enumerate(parameters):
                generator = torch.Generator(parameter.device).manual_seed(number)
                drawn = torch.rand(parameter.shape, generator=generator, device=parameter.device)
                if parameter.ndim > 1:
                    drawn = (2 * drawn - 1) * sqrt(3 * parameter.shape[0] / max(1, parameter.numel()))
                else:
                    drawn += 0.5
                parameter.copy_(drawn)
            yield
        finally:
            for parameter, values in zip(parameters, own, strict=True):
                parameter.copy_(values)


def difference(a: nn.Module, b: nn.Module, inputs: Inputs, tolerance: float, least: float = 1.0) -> str:
    """Why two modules do not compute the same on batches of two and three; "" if they do.

    Args:
        a: the reference.
        b: the module in question.
        inputs: an example batch.
        tolerance: how far outputs may differ, relative to the largest output where that is above ``least``; at
            least 64 rounding errors of their type.
        least: the smallest output that differences are relative to.
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
            distance = _error(left, right, least)
            rounding = torch.finfo(left.dtype).eps if left.is_floating_point() else 0.0
            if not distance <= max(tolerance, 64 * rounding):
                return f"its outputs differ by {distance:.1e}"
    return ""


def _error(a: Tensor, b: Tensor, least: float) -> float:
    """The largest difference, relative to the largest entry of ``a`` or to ``least``; inf where b is not finite."""
    a, b = a.double(), b.double()
    finite = torch.isfinite(a)
    if not a.numel() or not finite.any():
        return 0.0
    if not torch.isfinite(b[finite]).all():
        return float("inf")
    return float((a - b)[finite].abs().max() / a[finite].abs().max().clamp(min=least))


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
