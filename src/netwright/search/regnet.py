"""RegNet: residual networks whose widths follow a quantized line."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from netwright.search._regnet_anynet import AnyNetSpace
from netwright.search._regnet_edf import DesignSpaceEDF, design_space_edf
from netwright.search._regnet_network import Shape, Stage
from netwright.search._regnet_space import (
    MULTIPLE,
    Range,
    StagedSpace,
    bounds,
    compatible,
    groups,
    integers,
    logarithmic,
)
from netwright.search.space import Params, Rule

__all__ = ["AnyNetSpace", "DesignSpaceEDF", "RegNetSpace", "Stage", "design_space_edf"]


def quantized_widths(depth: int, w0: float, wa: float, wm: float) -> list[int]:
    """Widths of ``depth`` blocks: ``u_j = w0 + wa j``, ``s_j = round(log(u_j / w0) / log(wm))``, ``w_j = w0 wm^s_j``.

    ``w_j`` is rounded to a multiple of 8; halves go to the even multiple.

    Example:
        >>> quantized_widths(5, 24, 36.44, 2.49)
        [24, 56, 152, 152, 152]
    """
    line = w0 + wa * np.arange(depth)
    powers = np.round(np.log(line / w0) / np.log(wm))
    return [int(width) for width in np.round(w0 * wm**powers / MULTIPLE) * MULTIPLE]


class RegNetSpace(StagedSpace):
    r"""Regular networks in five numbers: widths grow linearly with depth, quantized to a few stages.

    Reach for it to search convolutional networks without searching each layer: of networks with like cost those of this
    space are better on average than those with free stages (:class:`AnyNetSpace`), and it is small enough for a search
    of tens of evaluations. It is a :class:`~netwright.search.SearchSpace`, with the decisions ``depth``, ``w0``,
    ``wa``, ``wm`` and ``group_width``.

    Block ``j = 0 .. depth - 1`` would have width ``u_j = w0 + wa j``; it has

    ``w_j = w0 wm^s_j``, ``s_j = round(log(u_j / w0) / log(wm))``, rounded to a multiple of 8.

    A run of equal ``w_j`` is a stage. Where ``group_width`` does not divide its width, the width is moved to the next
    multiple, or the group width lowered to the width.

    Args:
        depth: fewest and most blocks.
        w0: smallest and largest initial width, channels, multiples of 8.
        wa: smallest and largest slope, channels a block, above 0; the logarithm is uniform.
        wm: smallest and largest ratio of successive widths, above 1; the logarithm is uniform.
        group_width: the choices, channels of a group.
        stages: fewest and most stages.
        macs: smallest and largest number of multiply-accumulates for one image; None for any.
        inputs: ``(C, H, W)`` of an image.
        outputs: logits.
        stem: channels of the first convolution.

    Raises:
        SpaceError: a range that is empty or out of its bounds.

    Example:
        >>> space = RegNetSpace()
        >>> regnet_x_400mf = {"depth": 22, "w0": 24, "wa": 24.48, "wm": 2.54, "group_width": 16}
        >>> [tuple(stage) for stage in space.stages(regnet_x_400mf)]
        [(32, 1, 16), (64, 2, 16), (160, 7, 16), (384, 12, 16)]
        >>> round(space.macs(regnet_x_400mf) / 1e6)
        398

    Source: paper 279: Radosavovic, Kosaraju, Girshick, He and Dollár, "Designing Network Design Spaces", 2020, arXiv
        2003.13678.

    Differs: ``w0`` is uniform over its multiples of 8 where the paper's draws are uniform over the logarithm; small
        images are not halved below 4 pixels; the bottleneck ratio is 1, which the paper finds best, and there is
        no squeeze-and-excitation.

    Cost: a candidate is judged in time ``O(depth)``; nothing is built.
    """

    def __init__(
        self,
        *,
        depth: tuple[int, int] = (8, 28),
        w0: tuple[int, int] = (8, 256),
        wa: Range = (8.0, 256.0),
        wm: Range = (1.5, 3.0),
        group_width: Sequence[int] = (1, 2, 4, 8, 16, 32),
        stages: tuple[int, int] = (1, 4),
        macs: Range | None = None,
        inputs: Shape = (3, 224, 224),
        outputs: int = 1000,
        stem: int = 32,
    ) -> None:
        decisions = {
            "depth": integers("depth", depth),
            "w0": integers("w0", w0, MULTIPLE),
            "wa": logarithmic("wa", wa, 0.0),
            "wm": logarithmic("wm", wm, 1.0),
            "group_width": groups(group_width),
        }
        fewest, most = bounds("stages", stages, 1)
        words = f"the number of stages must be {fewest} to {most}; another wm or wa gives others"
        rule = Rule("wm", lambda params: fewest <= len(self.stages(params)) <= most, words)
        super().__init__(decisions, [rule], int(most), macs, inputs, outputs, stem)

    def stages(self, params: Params) -> list[Stage]:
        """The stages of a candidate, widths and group widths made compatible."""
        runs = groupby(quantized_widths(params["depth"], params["w0"], params["wa"], params["wm"]))
        sized = [(compatible(width, params["group_width"]), len(list(run))) for width, run in runs]
        return [Stage(width, depth, group_width) for (width, group_width), depth in sized]
