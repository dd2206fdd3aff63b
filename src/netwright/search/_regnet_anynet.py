"""AnyNet: the networks of RegNet with depth, width and group width of every stage free."""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

from optuna.distributions import BaseDistribution

from netwright.search._regnet_network import Shape, Stage
from netwright.search._regnet_space import MULTIPLE, Range, StagedSpace, compatible, groups, integers
from netwright.search.space import Params, Rule, SpaceError

__all__ = ["AnyNetSpace", "Design"]

Design: TypeAlias = Literal["B", "C", "D", "E"]
"""How far AnyNet is restricted; each letter keeps what the one before it asks for."""


class AnyNetSpace(StagedSpace):
    """The networks of :class:`RegNetSpace` with depth, width and group width of each stage free.

    Reach for it as the unrestricted space that a restriction is compared with (:func:`design_space_edf`), or step by
    step from it towards RegNet. Decisions are ``depth1``, ``width1``, ``group_width1`` and so on.

    Args:
        stages: how many.
        depth: fewest and most blocks of a stage.
        width: smallest and largest width of a stage, multiples of 8.
        group_width: the choices.
        design: "B": nothing more; "C": all stages share one decision ``group_width``; "D": also, widths do not fall
            from stage to stage; "E": also, depths do not.
        macs: smallest and largest number of multiply-accumulates for one image; None for any.
        inputs: ``(C, H, W)`` of an image.
        outputs: logits.
        stem: channels of the first convolution.

    Raises:
        SpaceError: a range that is empty or out of its bounds, or an unknown design.

    Example:
        >>> space = AnyNetSpace(stages=2, design="C", inputs=(1, 28, 28), outputs=10)
        >>> list(space.decisions)
        ['depth1', 'width1', 'depth2', 'width2', 'group_width']
        >>> params = {"depth1": 1, "width1": 16, "depth2": 2, "width2": 32, "group_width": 8}
        >>> space.widths(params)
        [16, 32, 32]

    Source: paper 279, as :class:`RegNetSpace`.

    Differs: widths and depths are uniform where the paper's draws are uniform over the logarithm; the bottleneck ratio
        is 1 throughout, so that the paper's first space AnyNetX_A, where it is free, does not occur.

    Cost: a candidate is judged in time ``O(stages * depth)``.
    """

    def __init__(
        self,
        *,
        stages: int = 4,
        depth: tuple[int, int] = (1, 16),
        width: tuple[int, int] = (8, 1024),
        group_width: Sequence[int] = (1, 2, 4, 8, 16, 32),
        design: Design = "B",
        macs: Range | None = None,
        inputs: Shape = (3, 224, 224),
        outputs: int = 1000,
        stem: int = 32,
    ) -> None:
        if design not in get_args(Design):
            raise SpaceError(f"design must be one of {', '.join(get_args(Design))}, got {design!r}.")
        if stages < 1:
            raise SpaceError(f"stages must be at least 1, got {stages}.")
        decisions: dict[str, BaseDistribution] = {}
        for stage in range(1, stages + 1):
            decisions[f"depth{stage}"] = integers("depth", depth)
            decisions[f"width{stage}"] = integers("width", width, MULTIPLE)
            if design == "B":
                decisions[f"group_width{stage}"] = groups(group_width)
        if design != "B":
            decisions["group_width"] = groups(group_width)
        growing = ["width"] * (design in ("D", "E")) + ["depth"] * (design == "E")
        rules = [_not_falling(kind, stage) for kind in growing for stage in range(2, stages + 1)]
        super().__init__(decisions, rules, stages, macs, inputs, outputs, stem)

    def stages(self, params: Params) -> list[Stage]:
        """The stages of a candidate, widths and group widths made compatible."""
        found = []
        for stage in range(1, self.most + 1):
            wanted = params["group_width"] if "group_width" in self.decisions else params[f"group_width{stage}"]
            width, group_width = compatible(params[f"width{stage}"], wanted)
            found.append(Stage(width, params[f"depth{stage}"], group_width))
        return found


def _not_falling(kind: str, stage: int) -> Rule:
    before, name = f"{kind}{stage - 1}", f"{kind}{stage}"
    return Rule(name, lambda params: bool(params[name] >= params[before]), f"it must be at least {before}")
