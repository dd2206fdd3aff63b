"""The one trace that pruning, costs and export share."""

import contextlib
import functools
import inspect
import io
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from netwright.core.data import Inputs, beside
from netwright.core.errors import TraceError
from netwright.core.graph.inference import inference

__all__ = ["ARGUMENT", "arguments", "export_model"]

ARGUMENT = "netwright.argument"
"""In the meta of a traced input that is given by position: the name of the argument, in its own letters."""


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
        with inference(model), _keywords_spelled_out(model, kwargs), _quiet():
            signature = inspect.signature(model.forward)
            shapes = {name: _dynamic_batch(value) for name, value in signature.bind(*args, **kwargs).arguments.items()}
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        _note_arguments(program, signature)
        return program
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


@contextlib.contextmanager
def _keywords_spelled_out(model: nn.Module, given: Collection[str]) -> Iterator[None]:
    """``forward(..., **more)`` with an argument of its own for each keyword given, which torch.export asks for."""
    signature = inspect.signature(model.forward)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    more = [name for name in given if name not in signature.parameters]
    if len(named) == len(signature.parameters) or not more:
        yield
        return
    forward, own = model.forward, vars(model).get("forward")

    @functools.wraps(forward)
    def spelled_out(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in more]
    vars(spelled_out)["__signature__"] = signature.replace(parameters=[*named, *keywords])
    vars(model)["forward"] = spelled_out
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


def _note_arguments(program: ExportedProgram, signature: inspect.Signature) -> None:
    """Write the names of arguments that are single tensors where those of the trace are in lower case."""
    given = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    spec = program.call_spec.in_spec
    if spec is None:
        return
    args, _ = pytree.tree_unflatten(given, spec)
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for parameter, name in zip(signature.parameters.values(), args, strict=False):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            break
        if isinstance(name, str) and name in nodes:
            nodes[name].meta[ARGUMENT] = parameter.name


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
