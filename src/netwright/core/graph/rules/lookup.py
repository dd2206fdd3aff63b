"""Tables that are looked up by number, and tensors made from nothing."""

from netwright.core.graph.axes import Value, extent
from netwright.core.graph.call import Answer, Call
from netwright.core.graph.table import rule

__all__ = ["constant", "embedding"]


@rule("embedding")
def embedding(call: Call) -> Answer:
    """Rows are looked up by number and stay; the columns are the features."""
    weight, indices = call["weight"], call["indices"]
    call.freeze(weight.axes[0], "its rows are looked up by number")
    call.produces(weight.axes[1], weight)
    return Value((*indices.axes, weight.axes[1]), (*(False for _ in indices.axes), weight.null[1]))


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor")
def constant(call: Call) -> Answer:
    """A tensor of one value: any of its entries can go with what they meet."""
    name = call.name
    zero = "zeros" in name or ("full" in name and call["fill_value"] == 0)
    axes = tuple(call.constraints.fresh(*extent(length)) for length in call.shape)
    return Value(axes, tuple(zero for _ in axes))


@rule("zeros_like", "ones_like", "full_like", "empty_like")
def constant_like(call: Call) -> Answer:
    """A tensor of one value in the shape of another."""
    x = call["self"]
    zero = "zeros" in call.operation
    return Value(x.axes, tuple(zero for _ in x.axes))


@rule("arange", "linspace", "eye", "tril", "triu")
def counting(call: Call) -> Answer:
    """Values that depend on their position."""
    for value in call.tensors():
        for axis in value.axes:
            call.freeze(axis, "its entries depend on their position")
    axes = tuple(call.fixed(length, "its entries depend on their position") for length in call.shape)
    return Value(axes, tuple(False for _ in axes))


@rule("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range_for_size")
def check(call: Call) -> Answer:
    """Checks compute nothing."""
    return []
