"""Walks a traced graph once and collects what its operations say about the dimensions of their tensors."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import getitem

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec

from netwright.core.graph.axes import Value, extent
from netwright.core.graph.call import Answer, Call, UnprovableError
from netwright.core.graph.constraints import Constraints
from netwright.core.graph.rules import pointwise
from netwright.core.graph.table import rule_for

__all__ = ["Walk", "walk"]

_STORED = (InputKind.PARAMETER, InputKind.BUFFER)


@dataclass(frozen=True, eq=False)
class Walk:
    """What a walk has found.

    Args:
        constraints: the facts.
        values: for every node that computes tensors, what is known about them.
        parameters: the same for parameters and buffers; one that has several names is listed under the first.
        names: the same under all their names.
    """

    constraints: Constraints
    values: Mapping[str, Answer]
    parameters: Mapping[str, Value]
    names: Mapping[str, Value]


def walk(program: ExportedProgram, model: nn.Module) -> Walk:
    """Apply the rule of every operation in order; operations without one leave everything that they touch as it is.

    Args:
        program: the trace.
        model: the module that was traced; says which names are the same tensor.
    """
    constraints = Constraints()
    environment: dict[fx.Node, Answer] = {}
    names: dict[str, Value] = {}
    same = {name: id(tensor) for name, tensor in _stored(model)}
    known: dict[int, Value] = {}
    specs = iter(program.graph_signature.input_specs)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = next(specs)
            value = _placeholder(node, spec, constraints)
            if value is not None:
                if value.parameter:
                    value = known.setdefault(same.get(value.parameter, id(value)), value)
                    names[str(spec.target)] = value
                environment[node] = value
        elif node.op == "call_function":
            answer = _answer(node, environment, constraints)
            if answer is not None:
                environment[node] = answer
        elif node.op == "output":
            for operand in node.all_input_nodes:
                _freeze_all(environment.get(operand), constraints, "output", "it is an output of the model")
    values = {node.name: answer for node, answer in environment.items()}
    parameters = {value.parameter: value for value in names.values()}
    return Walk(constraints, values, parameters, names)


def _stored(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _placeholder(node: fx.Node, spec: InputSpec, constraints: Constraints) -> Value | None:
    tensor = node.meta.get("val")
    if not isinstance(tensor, Tensor):
        return None
    axes = tuple(constraints.fresh(*extent(length)) for length in tensor.shape)
    if spec.kind in _STORED:
        return Value(axes, tuple(tensor.is_floating_point() for _ in axes), str(spec.target))
    what = "it is an input of the model" if spec.kind == InputKind.USER_INPUT else "it is a constant in the code"
    for axis in axes:
        constraints.freeze(axis, "input" if spec.kind == InputKind.USER_INPUT else "constant", what)
    return Value(axes, tuple(False for _ in axes))


def _answer(node: fx.Node, environment: dict[fx.Node, Answer], constraints: Constraints) -> Answer | None:
    if node.target is getitem:
        source = environment.get(node.all_input_nodes[0])
        return source[node.args[1]] if isinstance(source, list) and isinstance(node.args[1], int) else source
    call = Call(node, environment, constraints)
    if not call.tensors() and not call.shapes:
        return None
    rule = rule_for(node.target)
    if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        rule = pointwise
    if rule is None:
        return _untouched(call, "no rule is registered for it")
    try:
        answer = rule(call)
    except UnprovableError as reason:
        return _untouched(call, str(reason))
    return answer if call.fits(answer) else _untouched(call, "its rule does not fit the shape of its result")


def _untouched(call: Call, reason: str) -> Answer | None:
    """Everything that goes in and comes out stays as it is."""
    for value in call.tensors():
        for axis in value.axes:
            call.freeze(axis, reason)
            if value.parameter:
                call.produces(axis, value)
    results = [
        Value(tuple(call.fixed(length, reason) for length in shape), tuple(False for _ in shape))
        for shape in call.shapes
    ]
    single = isinstance(call.node.meta.get("val"), Tensor)
    return results[0] if single else results or None


def _freeze_all(answer: Answer | None, constraints: Constraints, operation: str, reason: str) -> None:
    for value in answer if isinstance(answer, list) else [answer]:
        if value is not None:
            for axis in value.axes:
                constraints.freeze(axis, operation, reason)
