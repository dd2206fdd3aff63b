"""Multiply-accumulate operations and parameters, read off the trace."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.export import ExportedProgram

__all__ = ["count_macs", "count_parameters", "total_macs"]

Shape: TypeAlias = tuple[int, ...]
_aten = torch.ops.aten
_SAME_ENTRIES = (_aten.flatten, _aten.view, _aten.reshape, _aten.alias, _aten.detach, _aten.clone, _aten.to)


def count_macs(program: ExportedProgram, batch: int = 1) -> dict[str, int]:
    """Multiply-accumulates of one call, by the module in which they happen.

    Products of sums are what is counted: convolutions (grouped and transposed ones too), linear layers, every form of
    matrix product, einsum, bilinear forms, attention, recurrent layers and cells. Element-wise operations,
    normalizations, pooling and look-ups in tables count nothing, by custom. One multiply-accumulate is two
    floating-point operations.

    Args:
        program: a trace made by :func:`netwright.core.graph.export.export_model`.
        batch: items in the call.

    Returns:
        Dotted module path (``""`` for the model itself) to a positive count, in the order of the graph. A module used
        twice holds the sum of its uses. In a model that is itself a traced graph, an operation belongs to the
        module that owns its weight.

    Example:
        >>> from netwright.core.graph.export import export_model
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(32, 5))
        >>> count_macs(export_model(net, torch.zeros(1, 3, 4, 4)))
        {'0': 864, '2': 160}

    Cost: linear in the number of operations; nothing is run.
    """
    counts: dict[str, int] = defaultdict(int)
    owners = {name: path.rpartition(".")[0] for name, path in program.graph_signature.inputs_to_parameters.items()}
    for module in program.graph_module.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in module.graph.nodes:
            rule = _RULES.get(_packet(node))
            if rule is not None and (macs := rule(node, batch)):
                counts[_module_path(node) or _owner(node, owners)] += macs
    return dict(counts)


def total_macs(program: ExportedProgram, batch: int = 1) -> int:
    """The sum of :func:`count_macs`."""
    return sum(count_macs(program, batch).values())


def count_parameters(program: ExportedProgram) -> int:
    """Elements of all parameters of a traced model; tied ones count once.

    A weight that is read out of a codebook by stored indices counts an entry for each of them, as it did before.

    Example:
        >>> from netwright.core.graph.export import export_model
        >>> count_parameters(export_model(torch.nn.Linear(3, 2), torch.zeros(1, 3)))
        8
    """
    looked_up, seen = _looked_up(program), {}
    for name in program.graph_signature.parameters:
        value = program.state_dict[name]
        place = (id(value), 0) if value.numel() == 0 else (value.data_ptr(), value.numel())
        seen[place] = max(value.numel(), looked_up.get(name, 0))
    return sum(seen.values())


def _looked_up(program: ExportedProgram) -> dict[str, int]:
    """Parameter names to the entries that indices, themselves no function of the inputs, take out of them."""
    signature = program.graph_signature
    given, source = set(signature.user_inputs), dict(signature.inputs_to_parameters)
    found: dict[str, int] = {}
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        if any(each.name in given for each in inputs):
            given.add(node.name)
        elif inputs and inputs[0].name in source:
            name = source[inputs[0].name]
            if _packet(node) in _SAME_ENTRIES:
                source[node.name] = name
            elif _packet(node) is _aten.index:
                found[name] = max(found.get(name, 0), prod(_shape(node, 1)))
    return found


def _packet(node: fx.Node) -> Any:
    target = node.target
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else None


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(next(reversed(stack.values()))[0]) if stack else ""


def _owner(node: fx.Node, owners: dict[str, str]) -> str:
    """The module that owns the first parameter that ``node`` reads, directly or rounded."""
    for source in node.all_input_nodes:
        while source.name not in owners and "fake_quantize" in source.name:
            source = source.all_input_nodes[0]
        if source.name in owners:
            return owners[source.name]
    return ""


def _shape(value: Any, batch: int) -> Shape:
    """The shape of what a node gives, its symbols replaced by ``batch``."""
    result = value.meta["val"] if isinstance(value, fx.Node) else value
    if isinstance(result, tuple | list):
        result = result[0]
    return tuple(_size(size, batch) for size in result.shape)


def _size(size: Any, batch: int) -> int:
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression.subs(dict.fromkeys(expression.free_symbols, batch)))
    return int(size)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, wherever it was given."""
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def _convolution(node: fx.Node, batch: int) -> int:
    """Each output element sums over the kernel and the channels of its group: ``|out| * prod(weight.shape[1:])``."""
    return prod(_shape(node, batch)) * prod(_shape(node.args[1], batch)[1:])


def _transposed(node: fx.Node, batch: int) -> int:
    """Each input element is spread over the kernel and the channels of its group: ``|in| * prod(weight.shape[1:])``."""
    return prod(_shape(node.args[0], batch)) * prod(_shape(node.args[1], batch)[1:])


def _any_convolution(node: fx.Node, batch: int) -> int:
    return _transposed(node, batch) if _argument(node, 6, "transposed", False) else _convolution(node, batch)


def _inner(position: int) -> Callable[[fx.Node, int], int]:
    """Each output element is an inner product over the last dimension of the argument at ``position``."""
    return lambda node, batch: prod(_shape(node, batch)) * _shape(node.args[position], batch)[-1]


def _last_with_last(node: fx.Node, batch: int) -> int:
    """``inner``: each output element is an inner product over the last dimensions, unless one is a single number."""
    shapes = [_shape(argument, batch) for argument in node.args[:2]]
    return prod(_shape(node, batch)) * shapes[0][-1] if all(shapes) else 0


def _summed_inner(node: fx.Node, batch: int) -> int:
    """``addbmm``: the inner products of every matrix of the batch, summed into one."""
    left, right = _shape(node.args[1], batch), _shape(node.args[2], batch)
    return prod(left) * right[-1]


def _attention(node: fx.Node, batch: int) -> int:
    """``|q| * S`` for the scores and ``|q|/E * S * Ev`` for the values, ``q`` of shape ``(..., L, E)``."""
    query, key, value = (_shape(argument, batch) for argument in node.args[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(node: fx.Node, batch: int) -> int:
    """Every weight matrix meets every step of every item once."""
    steps = prod(_shape(node.args[0], batch)[:2])
    weights = next(argument for argument in node.args[2:4] if isinstance(argument, list | tuple) and len(argument) > 1)
    return steps * sum(prod(shape) for shape in (_shape(item, batch) for item in weights) if len(shape) == 2)


def _cell(node: fx.Node, batch: int) -> int:
    """One step of a recurrent layer: both weight matrices meet every item once."""
    return prod(_shape(node.args[0], batch)[:-1]) * sum(prod(_shape(weight, batch)) for weight in node.args[2:4])


def _bilinear(node: fx.Node, batch: int) -> int:
    """Each output element sums over all pairs of an entry of the one input and one of the other."""
    return prod(_shape(node, batch)) * prod(_shape(node.args[2], batch)[1:])


def _tensordot(node: fx.Node, batch: int) -> int:
    """Each output element sums over the dimensions that are contracted."""
    shape, contracted = _shape(node.args[0], batch), node.args[2]
    assert isinstance(contracted, Sequence)
    return prod(_shape(node, batch)) * prod(shape[dim] for dim in contracted if isinstance(dim, int))


def _einsum(node: fx.Node, batch: int) -> int:
    """Operands are contracted from left to right; each step costs the product of all sizes that take part."""
    equation, operands = str(node.args[0]), node.args[1]
    assert isinstance(operands, Sequence)
    shapes = [_shape(operand, batch) for operand in operands]
    terms, output = _labels(equation.replace(" ", ""), [len(shape) for shape in shapes])
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for label, size in zip(term, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))  # a dimension of one broadcasts
    total, held = 0, set(terms[0])
    for position, term in enumerate(terms[1:], start=1):
        together = held | set(term)
        total += prod(sizes[label] for label in together)
        held = together & set(output).union(*terms[position + 1 :])
    return total


def _labels(equation: str, ranks: list[int]) -> tuple[list[list[str]], list[str]]:
    """The labels of each operand and of the result, the dots written out as ``.0``, ``.1``, ... from the right."""
    left, arrow, right = equation.partition("->")
    terms = [_expanded(text, rank) for text, rank in zip(left.split(","), ranks, strict=True)]
    if arrow:
        dots = max((sum(label[0] == "." for label in term) for term in terms), default=0)
        return terms, _expanded(right, len(right.replace("...", "")) + (dots if "..." in right else 0))
    letters = sorted(label for label in {label for term in terms for label in term} if label[0] != ".")
    once = [label for label in letters if left.count(label) == 1]
    return terms, sorted({label for term in terms for label in term if label[0] == "."}) + once


def _expanded(text: str, rank: int) -> list[str]:
    before, dots, after = text.partition("...")
    missing = rank - len(before) - len(after) if dots else 0
    return [*before, *(f".{missing - 1 - position}" for position in range(missing)), *after]


_RULES: dict[Any, Callable[[fx.Node, int], int]] = {
    _aten.conv1d: _convolution,
    _aten.conv2d: _convolution,
    _aten.conv3d: _convolution,
    _aten.conv_transpose1d: _transposed,
    _aten.conv_transpose2d: _transposed,
    _aten.conv_transpose3d: _transposed,
    _aten.convolution: _any_convolution,
    _aten.linear: _inner(0),
    _aten.mm: _inner(0),
    _aten.bmm: _inner(0),
    _aten.mv: _inner(0),
    _aten.dot: _inner(0),
    _aten.inner: _last_with_last,
    _aten.tensordot: _tensordot,
    _aten.bilinear: _bilinear,
    _aten.matmul: _inner(0),
    _aten.addmm: _inner(1),
    _aten.addmv: _inner(1),
    _aten.baddbmm: _inner(1),
    _aten.addbmm: _summed_inner,
    _aten.einsum: _einsum,
    _aten.scaled_dot_product_attention: _attention,
    _aten.lstm: _recurrent,
    _aten.gru: _recurrent,
    _aten.rnn_tanh: _recurrent,
    _aten.rnn_relu: _recurrent,
    _aten.lstm_cell: _cell,
    _aten.gru_cell: _cell,
    _aten.rnn_tanh_cell: _cell,
    _aten.rnn_relu_cell: _cell,
}
