"""The one trace that pruning, costs and export share."""

import contextlib
import inspect
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from netwright.core.data import Inputs, beside
from netwright.core.errors import TraceError
from netwright.core.graph.inference import inference

__all__ = ["arguments", "export_model"]


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a model call with these inputs."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return tuple(inputs), {}


def export_model(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """``torch.export`` of ``model`` in evaluation mode, its batch dimension dynamic.

    Args:
        model: any module; its training mode is restored afterwards.
        inputs: a batch of at least one item, on any device. One item is repeated, for ``torch.export`` would take a
            batch of one as a constant.

    Raises:
        TraceError: a model that ``torch.export`` cannot trace, with its reason in one line, or one whose
            code fixes the batch size.
    """
    inputs = beside(_at_least_two(inputs), model)
    args, kwargs = arguments(inputs)
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        shapes = {name: _dynamic_batch(value) for name, value in bound.items()}
        with inference(model), _quiet():
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises dozens of types; whichever it is, the user needs its reason
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise TraceError(
            f"{type(model).__name__} cannot be traced by torch.export: {type(error).__name__}: {reason[:300]} "
            "Data-dependent Python control flow in forward() is the usual cause; see torch.export's documentation."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch prints of a failed trace, whose reason the error repeats, and warns of recurrent layers."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _dynamic_batch(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {0: Dim.DYNAMIC} if value.ndim else {}
    if isinstance(value, Mapping):
        return {key: _dynamic_batch(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_dynamic_batch(item) for item in value)
    return None


def _at_least_two(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.ndim and value.shape[0] == 1 else value
    if isinstance(value, Mapping):
        return {key: _at_least_two(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_at_least_two(item) for item in value)
    return value
