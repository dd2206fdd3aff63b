"""Normalizations: per channel (exact), or over channels (removing one changes the statistics of the rest)."""

from netwright.core.graph.axes import Axis, Value
from netwright.core.graph.call import Answer, Call
from netwright.core.graph.table import rule

__all__ = ["batch_norm", "group_norm", "layer_norm"]


@rule("batch_norm", "instance_norm", "native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
def batch_norm(call: Call) -> Answer:
    """Statistics per channel: the channels of input, scale, shift and running statistics go together."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    mean, variance = call["running_mean"], call["running_var"]
    channels = x.axes[1]
    for value in (weight, bias, mean, variance):
        if value is not None:
            call.tie(channels, value.axes[0])
    if variance is not None:
        call.keep(variance, 0)
    null = _affine_null(x.null[1], weight, bias)
    result = Value(x.axes, tuple(null and dim == 1 for dim in range(len(x.axes))))
    return result if len(call.shapes) == 1 else _refuse(call)


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Answer:
    """Statistics over the last dimensions: removing one of their entries changes the others."""
    x, weight, bias = call["input"], call["weight"], call.get("bias")
    count = len(call["normalized_shape"])
    for position in range(-count, 0):
        call.inexact(x.axes[position], "its statistics run over this dimension")
        for value in (weight, bias):
            if value is not None:
                call.tie(x.axes[position], value.axes[position])
    null = [flag and bias is None for flag in x.null]
    for position in range(-count, 0):
        null[position] = _affine_null(
            x.null[position], weight, bias, None if weight is None else position, None if bias is None else position
        )
    return Value(x.axes, tuple(null)) if len(call.shapes) == 1 else _refuse(call)


@rule("group_norm")
def group_norm(call: Call) -> Answer:
    """Statistics over ``c / g`` channels of each of ``g`` groups.

    Whole groups are removed, which is exact, where there are at least as many groups as channels in one; otherwise
    the same channels of every group, which is not.
    """
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call["num_groups"]
    channels = x.axes[1]
    for value in (weight, bias):
        if value is not None:
            call.tie(channels, value.axes[0])
    elements = call.flat(channels)
    if groups == 1:
        call.inexact(channels, "its statistics run over this dimension")
    else:
        whole, within = call.fresh(groups), call.fresh(elements.size // groups)
        call.constraints.groups[call.node.name] = whole
        call.inexact(within, "its statistics run over the channels of a group")
        call.choose(elements, (whole, within), 0 if groups >= elements.size // groups else 1)
    null = _affine_null(x.null[1], weight, bias)
    return Value(x.axes, tuple(null and dim == 1 for dim in range(len(x.axes))))


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(call: Call) -> Answer:
    """``g v / ||v||``, one norm per entry of one dimension. A unit is zeroed by its ``g``, for v is divided by."""
    v, g, dim = call["v"], call["g"], call["dim"] % len(call["v"].axes)
    call.tie(v.axes[dim], g.axes[dim])
    call.keep(v, dim)
    for position, axis in enumerate(v.axes):
        if position != dim and not v.null[position]:
            call.inexact(axis, "a norm runs over this dimension")
    weight = Value(v.axes, tuple(g.null[dim] if at == dim else flag for at, flag in enumerate(v.null)))
    return weight if len(call.shapes) == 1 else [weight, Value(g.axes, tuple(False for _ in g.axes))]


def _affine_null(
    null: bool, weight: Value | None, bias: Value | None, at_weight: int | None = 0, at_bias: int | None = 0
) -> bool:
    if weight is not None and at_weight is not None:
        null = weight.null[at_weight]
    if bias is not None and at_bias is not None:
        null = null and bias.null[at_bias]
    return null


def _refuse(call: Call) -> Answer:
    """Variants that also return their statistics: the first result follows the input, the statistics stay."""
    x = call["input"]
    results = [Value(x.axes, (False,) * len(x.axes))]
    for shape in call.shapes[1:]:
        axes: tuple[Axis, ...] = tuple(call.fixed(length, "they are statistics") for length in shape)
        results.append(Value(axes, (False,) * len(axes)))
    return list(results)
