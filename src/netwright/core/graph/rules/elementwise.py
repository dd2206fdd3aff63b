"""Operations that work entry by entry, with broadcasting."""

from netwright.core.graph.axes import Axis, Value
from netwright.core.graph.call import Answer, Call, UnprovableError
from netwright.core.graph.table import rule

__all__ = ["follow", "pointwise"]

_ALIASES = {"slice", "select", "view", "reshape", "transpose", "permute", "expand", "narrow", "flatten", "unsqueeze"}


@rule(
    *("hardswish", "hardswish_", "relu6_", "gelu_", "mish_", "selu_", "prelu", "log_sigmoid", "divide", "multiply"),
    *(
        "subtract",
        "rsub",
        "__and__",
        "__or__",
        "__xor__",
        "masked_fill",
        "where",
        "negative",
        "absolute",
        "true_divide",
    ),
    *(
        "masked_fill_",
        "rrelu",
        "clamp_min",
        "clamp_max",
        "clip",
        "square",
        "greater",
        "less",
        "not_equal",
        "fix",
        "threshold_",
    ),
)
def pointwise(call: Call) -> Answer:
    """Dimensions that meet by broadcasting go together; one operand zero may or may not make the result zero."""
    operands = call.tensors()
    rank = len(call.shape)
    if call.name == "prelu" and rank > 1:  # its weight runs along the second dimension
        operands = [operands[0], _along(operands[1], 1, rank)]
    axes: list[Axis] = []
    null: list[bool] = []
    for back in range(rank, 0, -1):
        here = [value.axes[-back] if len(value.axes) >= back else () for value in operands]
        present = [axis for axis in here if axis]
        for axis in present[1:]:
            call.tie(present[0], axis)
        flags = [bool(axis) and value.null[-back] for axis, value in zip(here, operands, strict=True)]
        stays_zero, singular = call.zero_image(flags)
        if singular:
            for axis in present:
                call.inexact(axis, "it is infinite or undefined at zero")
        axes.append(present[0] if present else ())
        null.append(stays_zero)
    if len(operands[0].axes) == rank and any(a and not b for a, b in zip(operands[0].null, null, strict=True)):
        _refuse_writes_through_views(call)
    return Value(tuple(axes), tuple(null))


@rule(
    *(
        "contiguous",
        "alias",
        "detach",
        "detach_",
        "clone",
        "to",
        "_to_copy",
        "type_as",
        "lift_fresh",
        "lift_fresh_copy",
    ),
    *("dropout", "dropout_", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "native_dropout"),
)
def follow(call: Call) -> Answer:
    """The result is the first tensor, entry by entry, and zero where that is zero."""
    value = call.tensors()[0]
    return Value(value.axes, value.null)


def _along(value: Value, dim: int, rank: int) -> Value:
    axes: list[Axis] = [()] * rank
    null = [False] * rank
    axes[dim], null[dim] = value.axes[0] if value.axes else (), value.null[0] if value.null else False
    return Value(tuple(axes), tuple(null))


def _refuse_writes_through_views(call: Call) -> None:
    """``x[:, :4] += y`` changes ``x`` behind the graph's back: what is known about ``x`` would become wrong."""
    if call.schema is None or not call.schema.is_mutable:
        return
    written = getattr(call.node.all_input_nodes[0].target, "_schema", None)
    if written is not None and str(written.name).removeprefix("aten::") in _ALIASES:
        raise UnprovableError("it writes into a part of another tensor")
