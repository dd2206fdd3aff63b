"""Convolutions and transposed convolutions, grouped and depthwise ones too."""

from netwright.core.graph.axes import Axis, Value
from netwright.core.graph.call import Answer, Call
from netwright.core.graph.table import rule

__all__ = ["convolution"]


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def convolution(call: Call) -> Answer:
    """Input channels meet the kernel's, output channels are the kernel's and the bias's.

    With ``g`` groups of ``i`` input channels each, whole groups are removed where ``g >= i`` (a depthwise convolution
    has ``i = 1``); otherwise the same channels of every group, and the number of groups stays.
    """
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    spatial = len(weight.axes) - 2
    for axis in weight.axes[2:]:
        call.freeze(axis, "it is the extent of a kernel")
    for axis in x.axes[-spatial:]:
        call.freeze(axis, "it is a spatial dimension")
    transposed = bool(call.get("transposed", "transpose" in call.operation))
    channel = len(x.axes) - spatial - 1
    if groups == 1:
        incoming, out = (weight.axes[0], weight.axes[1]) if transposed else (weight.axes[1], weight.axes[0])
        flag = weight.null[0] if transposed else weight.null[1]
        call.contract(x.axes[channel], x.null[channel], incoming, flag)
    else:
        out = _grouped(call, x.axes[channel], weight, groups, transposed)
    call.produces(out, weight, "channels")
    null = weight.null[1 if transposed and groups == 1 else 0]
    if bias is not None:
        call.tie(out, bias.axes[0])
        null = null and bias.null[0]
    sizes = tuple(call.fixed(length, "it is a spatial dimension") for length in call.shape[-spatial:])
    leading = tuple(flag and bias is None for flag in x.null[:channel])
    return Value((*x.axes[:channel], out, *sizes), (*leading, null, *(False,) * spatial))


def _grouped(call: Call, channels: Axis, weight: Value, groups: int, transposed: bool) -> Axis:
    """Ties of a grouped convolution; returns the axis of its output channels."""
    whole = call.fresh(groups)
    call.constraints.groups[call.node.name] = whole
    elements = call.flat(channels)
    if transposed:  # the kernel is (groups * incoming, outgoing, ...)
        call.tie(channels, weight.axes[0])
        incoming = call.fresh(elements.size // groups)
        outgoing = weight.axes[1]
        out = call.fresh(groups * call.flat(outgoing).size)
    else:  # the kernel is (groups * outgoing, incoming, ...)
        incoming = weight.axes[1]
        out = weight.axes[0]
        outgoing = call.fresh(call.flat(out).size // groups)
    prefer = 0 if groups >= elements.size // groups else 1
    call.choose(elements, (whole, incoming), prefer)
    call.choose(call.flat(out), (whole, outgoing), prefer)
    return out
