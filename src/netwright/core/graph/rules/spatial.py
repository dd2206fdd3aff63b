"""Pooling, resizing and other operations on the last dimensions of each channel."""

from netwright.core.graph.axes import Value
from netwright.core.graph.call import Answer, Call
from netwright.core.graph.table import rule

__all__ = ["spatial"]

_NAMES = (
    *(f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max", "lp") for d in (1, 2, 3)),
    *(f"_adaptive_avg_pool{d}d" for d in (2, 3)),
    *(f"max_pool{d}d_with_indices" for d in (1, 2, 3)),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d"),
    *("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d"),
    *("reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "grid_sampler"),
)


@rule(*_NAMES)
def spatial(call: Call) -> Answer:
    """Channels pass, the spatial dimensions stay as they are; a channel of zeros stays zero."""
    x, *others = call.tensors()
    name = call.name
    count = 2 if "grid" in name else next(int(name[i - 1]) for i in range(len(name), 1, -1) if name[i - 1].isdigit())
    for axis in x.axes[-count:]:
        call.freeze(axis, "it is a spatial dimension")
    for axis in (axis for grid in others for axis in grid.axes):
        call.freeze(axis, "it says where values are read")
    results = []
    for shape in call.shapes:
        sizes = tuple(call.fixed(length, "it is a spatial dimension") for length in shape[-count:])
        results.append(Value((*x.axes[:-count], *sizes), (*x.null[:-count], *(False,) * count)))
    return results if len(results) > 1 else results[0]
