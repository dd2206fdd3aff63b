"""Scaled dot-product attention, with grouped keys and values too."""

import numpy as np

from netwright.core.graph.axes import Axis, Value
from netwright.core.graph.call import Answer, Call
from netwright.core.graph.table import rule

__all__ = ["attention"]


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Answer:
    """``softmax(q k^T s + mask) v``: heads of q, k and v go together; the keys' positions stay.

    Queries and keys share the dimension they are multiplied over, which stays where the scale ``s`` is left to
    depend on its length.
    """
    q, k, v, mask = call["query"], call["key"], call["value"], call["attn_mask"]
    if call["scale"] is None:
        call.freeze(q.axes[-1], "the default scale depends on its length")
        call.freeze(k.axes[-1], "the default scale depends on its length")
    call.contract(q.axes[-1], q.null[-1], k.axes[-1], k.null[-1])
    positions = [k.axes[-2], v.axes[-2]]
    if call["is_causal"]:
        positions.append(q.axes[-2])
    call.tie(k.axes[-2], v.axes[-2])
    if mask is not None:
        if mask.axes[-1]:
            call.tie(mask.axes[-1], k.axes[-2])
        if mask.axes[-2] and q.axes[-2]:
            call.tie(mask.axes[-2], q.axes[-2])
    for axis in positions:
        call.freeze(axis, "softmax runs over it")
    axes: list[Axis] = []
    null: list[bool] = []
    for back in range(len(call.shape), 2, -1):
        heads = _heads(call, [q, k, v], back)
        if mask is not None and len(mask.axes) >= back and mask.axes[-back] and heads:
            call.tie(heads, mask.axes[-back])
        call.heads(heads)
        axes.append(heads)
        null.append(len(v.axes) >= back and bool(v.axes[-back]) and v.null[-back])
    return Value((*axes, q.axes[-2], v.axes[-1]), (*null, False, v.null[-1]))


def _heads(call: Call, values: list[Value], back: int) -> Axis:
    present = [value.axes[-back] for value in values if len(value.axes) >= back and value.axes[-back]]
    if not present:
        return ()
    first = present[0]
    for axis in present[1:]:
        if back == 3 and call.get("enable_gqa"):
            queries, keys = call.flat(first), call.flat(axis)
            call.tie(first, call.axis(np.repeat(keys, queries.size // keys.size)))
        else:
            call.tie(first, axis)
    return first
