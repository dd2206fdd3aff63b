"""What RegNet's space and AnyNet's share: candidates are stages, costs are known before a network is built."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from torch import nn

from netwright.search._regnet_network import Shape, Stage, StagedNetwork, count
from netwright.search.space import Params, Rule, SearchSpace, SpaceError

__all__ = ["MULTIPLE", "Range", "StagedSpace", "bounds", "compatible", "groups", "integers", "logarithmic"]

Range: TypeAlias = tuple[float, float]
MULTIPLE = 8
"""Every width is one of it before groups are fitted."""


def compatible(width: int, group_width: int) -> tuple[int, int]:
    """Width and group width of a stage such that groups divide it: ``g = min(g, w)``, then the multiple next to ``w``.

    Example:
        >>> compatible(56, 16), compatible(8, 16)
        ((64, 16), (8, 8))
    """
    group_width = min(group_width, width)
    return round(width / group_width) * group_width, group_width


class StagedSpace(SearchSpace):
    """What both spaces share: a candidate is a list of stages, ``most`` of them at most, and costs are bounded."""

    inputs: Shape
    outputs: int
    stem: int
    most: int

    def __init__(
        self,
        decisions: Mapping[str, BaseDistribution],
        rules: Sequence[Rule],
        most: int,
        macs: Range | None,
        inputs: Shape,
        outputs: int,
        stem: int,
    ) -> None:
        _check_shape(inputs, outputs, stem)
        for name, kept in {"inputs": tuple(inputs), "outputs": outputs, "stem": stem, "most": most}.items():
            object.__setattr__(self, name, kept)
        rules = list(rules)
        if macs is not None:
            low, high = bounds("macs", macs, 0)
            words = f"multiply-accumulates must be {low:.4g} to {high:.4g}"
            rules.append(Rule(next(iter(decisions)), lambda params: low <= self.macs(params) <= high, words))
        super().__init__(decisions, rules, features=self._features)

    @abstractmethod
    def stages(self, params: Params) -> list[Stage]:
        """The stages of a candidate, widths and group widths made compatible."""

    def widths(self, params: Params) -> list[int]:
        """The width of every block of a candidate."""
        return [stage.width for stage in self.stages(params) for _ in range(stage.depth)]

    def macs(self, params: Params) -> int:
        """Multiply-accumulates of a candidate for one image of the space's ``inputs``."""
        return count(self.stages(params), self.inputs, self.outputs, self.stem)

    def build(self, params: Params, *, inputs: Shape | None = None, outputs: int | None = None) -> nn.Module:
        """The network of a candidate, ``(n, C, H, W) -> (n, outputs)``; weights from torch's global generator.

        A 3x3 stem, residual blocks of a 1x1, a 3x3 group and a 1x1 convolution (bottleneck ratio 1), average pooling
        and a linear layer. Stem and stages halve the resolution while the shorter side keeps 4 pixels; where the image
        is too small for all, the first ones do not.

        Args:
            params: a candidate.
            inputs: ``(C, H, W)``; None for the space's.
            outputs: logits; None for the space's.

        Raises:
            SpaceError: the candidate is not one of the space, or a size is below 1.
        """
        self.check(params)
        shape, logits = self.inputs if inputs is None else inputs, self.outputs if outputs is None else outputs
        _check_shape(shape, logits, self.stem)
        return StagedNetwork(self.stages(params), shape, logits, self.stem)

    def _features(self, params: Params) -> list[float]:
        """Logarithm of the MACs, width and depth of each stage; zeros where there is none."""
        stages = self.stages(params)
        rows = [(float(stage.width), float(stage.depth)) for stage in stages[: self.most]]
        rows += [(0.0, 0.0)] * (self.most - len(rows))
        return [float(np.log(self.macs(params))), *(value for row in rows for value in row)]


def bounds(name: str, value: Range, least: float) -> Range:
    """A range, or an error where it is empty or begins below ``least``."""
    low, high = value
    if not least <= low <= high < float("inf"):
        raise SpaceError(f"{name} must be (smallest, largest), finite, in this order, at least {least}; got {value}.")
    return low, high


def integers(name: str, value: tuple[int, int], step: int = 1) -> IntDistribution:
    """Whole numbers of a range, uniform."""
    low, high = bounds(name, value, step)
    if low % step or high % step:
        raise SpaceError(f"{name} must be multiples of {step}, got {value}.")
    return IntDistribution(int(low), int(high), step=step)


def logarithmic(name: str, value: Range, above: float) -> FloatDistribution:
    """Numbers of a range, uniform over their logarithm."""
    low, high = bounds(name, value, above)
    if low <= above:
        raise SpaceError(f"{name} must be above {above}, got {value}.")
    return FloatDistribution(low, high, log=True)


def groups(choices: Sequence[int]) -> CategoricalDistribution:
    """Group widths to choose from."""
    if not choices or any(choice < 1 or choice != int(choice) for choice in choices):
        raise SpaceError(f"group_width must be whole numbers, each at least 1, got {tuple(choices)}.")
    return CategoricalDistribution(tuple(choices))


def _check_shape(inputs: Shape, outputs: int, stem: int) -> None:
    if len(inputs) != 3 or min(inputs) < 1:
        raise SpaceError(f"inputs must be (channels, height, width), each at least 1, got {inputs}.")
    for name, value in (("outputs", outputs), ("stem", stem)):
        if value < 1:
            raise SpaceError(f"{name} must be at least 1, got {value}.")
