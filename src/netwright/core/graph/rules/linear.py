"""Matrix products: linear layers, and products of two activations."""

from netwright.core.graph.axes import Axis, Value
from netwright.core.graph.call import Answer, Call, UnprovableError
from netwright.core.graph.table import rule

__all__ = ["linear", "matmul"]


@rule("linear")
def linear(call: Call) -> Answer:
    """``y = x W^T + b``: the last dimension of x meets W's columns; W's rows and b are the outputs."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    call.contract(x.axes[-1], x.null[-1], weight.axes[-1], weight.null[-1])
    if len(weight.axes) == 1:
        return Value(x.axes[:-1], tuple(flag and bias is None for flag in x.null[:-1]))
    out = weight.axes[0]
    call.produces(out, weight)
    null = weight.null[0]
    if bias is not None:
        call.tie(out, bias.axes[0])
        null = null and bias.null[0]
    return Value((*x.axes[:-1], out), (*(flag and bias is None for flag in x.null[:-1]), null))


@rule("addmm", "baddbmm", "addbmm", "addmv")
def addmm(call: Call) -> Answer:
    """``b + x W``, the bias broadcast."""
    if call.operation.startswith("aten.addbmm"):
        raise UnprovableError("it sums over its batch")
    bias, *factors = call.tensors()
    product = _product(call, factors[0], factors[1])
    axes, null = [], []
    for back in range(len(product.axes), 0, -1):
        axis = bias.axes[-back] if len(bias.axes) >= back else ()
        if axis:
            call.tie(product.axes[-back], axis)
        axes.append(product.axes[-back] or axis)
        null.append(product.null[-back] and bool(axis) and bias.null[-back])
    return Value(tuple(axes), tuple(null))


@rule("matmul", "mm", "bmm", "mv", "dot", "__matmul__")
def matmul(call: Call) -> Answer:
    """``x W`` for any two tensors, leading dimensions broadcast."""
    a, b = call.tensors()
    return _product(call, a, b)


def _product(call: Call, a: Value, b: Value) -> Value:
    rows = (a.axes[-2], a.null[-2]) if len(a.axes) > 1 else None
    columns = (b.axes[-1], b.null[-1]) if len(b.axes) > 1 else None
    b_sum = -2 if len(b.axes) > 1 else -1
    call.contract(a.axes[-1], a.null[-1], b.axes[b_sum], b.null[b_sum])
    if rows and a.parameter:
        call.produces(rows[0], a)
    if columns and b.parameter:
        call.produces(columns[0], b)
    axes: list[Axis] = []
    null: list[bool] = []
    for back in range(max(len(a.axes), len(b.axes)), 2, -1):
        here = [(v.axes[-back], v.null[-back]) for v in (a, b) if len(v.axes) >= back and v.axes[-back]]
        if len(here) == 2:
            call.tie(here[0][0], here[1][0])
            if not (a.parameter or b.parameter) and here[0][0]:
                call.heads(here[0][0])
        axes.append(here[0][0] if here else ())
        null.append(any(flag for _, flag in here))
    for part in (rows, columns):
        if part:
            axes.append(part[0])
            null.append(part[1])
    return Value(tuple(axes), tuple(null))


@rule("einsum")
def einsum(call: Call) -> Answer:
    """Letters that two operands share go together; letters that the result lacks are summed over."""
    equation = call["equation"].replace(" ", "")
    operands = call.tensors()
    if "." in equation or "->" not in equation:
        raise UnprovableError("its equation is implicit or has an ellipsis")
    left, result = equation.split("->")
    seen: dict[str, tuple[Axis, bool]] = {}
    for letters, value in zip(left.split(","), operands, strict=True):
        if len(set(letters)) < len(letters):
            raise UnprovableError("its equation takes a diagonal")
        for letter, axis, flag in zip(letters, value.axes, value.null, strict=True):
            if letter in seen and axis and seen[letter][0]:
                call.tie(seen[letter][0], axis)
            known, known_flag = seen.get(letter, ((), False))
            seen[letter] = (known or axis, known_flag or flag)
            if value.parameter and letter in result:
                call.produces(axis, value)
    for letter, (axis, flag) in seen.items():
        if letter not in result and not flag:
            call.inexact(axis, "the sum over it sees entries that are not zero at zeroed units")
    return Value(tuple(seen[letter][0] for letter in result), tuple(seen[letter][1] for letter in result))
