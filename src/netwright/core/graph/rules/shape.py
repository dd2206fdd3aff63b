"""Views: the same entries under other dimensions."""

from netwright.core.graph.axes import Axis, Factor, Value, extent
from netwright.core.graph.call import Answer, Call, UnprovableError
from netwright.core.graph.table import rule

__all__ = ["view"]


@rule(
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze", "ravel"
)
def view(call: Call) -> Answer:
    """The factors of all dimensions in order, dealt out anew; a dimension may be split, and is then a product."""
    x = call.tensors()[0]
    factors = [factor for axis in x.axes for factor in axis]
    axes = call.constraints.regroup(factors, [extent(length) for length in call.shape], call.operation)
    if axes is None:
        raise UnprovableError(f"it regroups a dimension in a way that keeps no factor whole, to {tuple(call.shape)}")
    return Value(tuple(axes), tuple(_merged_null(call, x, axis, axes) for axis in axes))


def _merged_null(call: Call, x: Value, axis: Axis, axes: list[Axis]) -> bool:
    """A merged dimension is zero at a unit if every part that can lose entries is."""
    flags = [flag for part, flag in zip(x.axes, x.null, strict=True) if part and not call.constraints.is_fixed(part)]
    same = [flag for part, flag in zip(x.axes, x.null, strict=True) if part and part == axis]
    return all(same) if same else bool(flags) and all(flags)


@rule(
    "transpose", "transpose_", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "numpy_T", "mT", "adjoint"
)
def permute(call: Call) -> Answer:
    """Dimensions change places."""
    x = call.tensors()[0]
    rank = len(x.axes)
    order = list(range(rank))
    name = call.name
    if name in ("permute",):
        order = [dim % rank for dim in call["dims"]]
    elif name in ("movedim", "moveaxis"):
        order = _moved(rank, call["source"], call["destination"])
    elif name in ("numpy_T",):
        order.reverse()
    elif rank > 1:
        a = call.get("dim0", call.get("axis0", -2 if name in ("mT", "adjoint") else 0))
        b = call.get("dim1", call.get("axis1", -1))
        order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
    return Value(tuple(x.axes[dim] for dim in order), tuple(x.null[dim] for dim in order))


def _moved(rank: int, source: int | list[int], destination: int | list[int]) -> list[int]:
    sources = [source] if isinstance(source, int) else source
    destinations = [destination] if isinstance(destination, int) else destination
    placed = {to % rank: origin % rank for origin, to in zip(sources, destinations, strict=True)}
    rest = iter(dim for dim in range(rank) if dim not in placed.values())
    return [placed[dim] if dim in placed else next(rest) for dim in range(rank)]


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> Answer:
    """A dimension of length one is repeated; the repetitions are entries of their own."""
    tensors = call.tensors()
    x, other = tensors[0], tensors[1] if len(tensors) > 1 else None
    axes: list[Axis] = []
    null: list[bool] = []
    rank = len(call.shape)
    for dim, length in enumerate(call.shape):
        back = rank - dim
        if len(x.axes) >= back and x.axes[-back]:
            axes.append(x.axes[-back])
            null.append(x.null[-back])
        else:
            axes.append(other.axes[-back] if other else call.constraints.fresh(*extent(length)))
            null.append(False)
    return Value(tuple(axes), tuple(null))


@rule("repeat", "tile")
def repeat(call: Call) -> Answer:
    """Whole copies one behind the other: the outer factor counts the copies."""
    x = call.tensors()[0]
    counts = list(call.get("repeats") or call.get("dims"))
    rank = max(len(counts), len(x.axes))
    counts = [1] * (rank - len(counts)) + counts
    axes = ((),) * (rank - len(x.axes)) + x.axes
    null = (False,) * (rank - len(x.null)) + x.null
    results: list[Axis] = []
    for axis, count in zip(axes, counts, strict=True):
        copies = call.fixed(count, "it counts copies") if count != 1 else ()
        results.append((*copies, *axis))
    return Value(tuple(results), null)


@rule("repeat_interleave.self_int")
def repeat_interleave(call: Call) -> Answer:
    """Every entry several times in a row: the inner factor counts the copies."""
    x, count, dim = call["self"], call["repeats"], call["dim"]
    if dim is None:
        raise UnprovableError("it flattens all dimensions")
    axes = list(x.axes)
    axes[dim] = (*axes[dim], *call.fixed(count, "it counts copies"))
    return Value(tuple(axes), x.null)


@rule("flip", "fliplr", "flipud")
def flip(call: Call) -> Answer:
    """Entries in reverse order."""
    x = call.tensors()[0]
    axes = list(x.axes)
    for dim in call["dims"]:
        axes[dim] = call.axis(call.flat(axes[dim])[::-1])
    return Value(tuple(axes), x.null)


@rule("roll")
def roll(call: Call) -> Answer:
    """Entries move along cyclically, so none of them may be removed."""
    x = call["self"]
    dims = call["dims"] or range(len(x.axes))
    for dim in dims:
        call.freeze(x.axes[dim], "its entries are addressed by position")
    return Value(x.axes, x.null)


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(call: Call) -> Answer:
    """``(c r r, h, w)`` to ``(c, h r, w r)`` or back: only c can lose entries."""
    x = call["self"]
    channels, height, width = x.axes[-3:]
    r = call.get("upscale_factor", call.get("downscale_factor"))
    for axis in (height, width):
        call.freeze(axis, "it is a spatial dimension")
    finer = "unshuffle" not in call.operation
    coarse = channels if not finer else call.fresh(call.flat(channels).size // (r * r))
    blocks = call.fixed(r * r, "it is a block of pixels")
    fine = channels if finer else call.fresh(call.flat(channels).size * r * r)
    call.choose(call.flat(fine), (coarse, blocks))
    sizes = tuple(call.fixed(length, "it is a spatial dimension") for length in call.shape[-2:])
    return Value((*x.axes[:-3], coarse if finer else fine, *sizes), (*x.null[:-2], False, False))


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Answer:
    """``(g, c / g)`` channels transposed: the same channels of every group go together."""
    x, groups = call["self"], call["groups"]
    elements = call.flat(x.axes[1])
    first, rest = call.fresh(groups), call.fresh(elements.size // groups)
    prefer = int(elements.size // groups > groups)
    call.choose(elements, (first, rest), prefer)
    shuffled = elements.reshape(groups, -1).T.ravel()
    return Value((x.axes[0], (Factor(shuffled.size, shuffled),), *x.axes[2:]), x.null)
