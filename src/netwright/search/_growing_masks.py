"""Masks on the units and layers of a network: relaxed, sampled, and moved by the loss and by a budget."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from netwright.core.errors import SettingError

__all__ = ["LAYERS", "Masks", "mask_step", "within_budget"]

LAYERS = "<layers>"
"""The name under which the masks of layers stand beside those of groups of units."""
_SEED, _LOW, _HIGH, _LAYER = 2.0, -3.0, -1.0, -1.0

Values = dict[str, Tensor]


def mask_step(s: Tensor, beta: Tensor, slope: Tensor, pressure: float, rate: float) -> Tensor:
    r"""The logits of masks ``m = sigmoid(beta s)`` after a step.

    .. math:: s - r\, \beta m (1 - m) \Big( \frac{\partial L}{\partial m} + \lambda \Big)

    Args:
        s: ``(n,)``.
        beta: ``(n,)``, the temperature of each.
        slope: ``(n,)`` the loss's derivative by each mask, on the scale of all; 0 where the mask was not sampled.
        pressure: ``lambda``, positive to shrink and negative to grow.
        rate: ``r``.
    """
    m = torch.sigmoid(beta * s)
    return s - rate * beta * m * (1.0 - m) * (slope + pressure)


class Masks:
    """Logits, temperatures and samples of all masks, in float64.

    Args:
        sizes: units of each group.
        layers: how many layers may be left out.
        seed_share: share of each group's units that is open at the start.
        final: the temperature of a mask that every round has sampled.
        rounds: how many there are.
        generator: draws the logits of closed units, and the samples.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        layers: int,
        *,
        seed_share: float,
        final: float,
        rounds: int,
        generator: torch.Generator,
    ) -> None:
        self._generator, self._final, self._rounds = generator, final, rounds
        self.logits: Values = {}
        for name, size in sizes.items():
            value = _LOW + (_HIGH - _LOW) * torch.rand(size, generator=generator, dtype=torch.float64)
            value[: max(1, round(seed_share * size))] = _SEED
            self.logits[name] = value
        if layers:
            self.logits[LAYERS] = torch.full((layers,), _LAYER, dtype=torch.float64)
        self.counts = {name: torch.zeros(len(value), dtype=torch.float64) for name, value in self.logits.items()}
        self._size = 0.0

    def temperatures(self) -> Values:
        """``beta = final ** (t / rounds)``, for ``t`` rounds in which a mask has been sampled open."""
        return {name: self._final ** (count / self._rounds) for name, count in self.counts.items()}

    def values(self) -> Values:
        """``m = sigmoid(beta s)``."""
        betas = self.temperatures()
        return {name: torch.sigmoid(betas[name] * s) for name, s in self.logits.items()}

    def sample(self) -> Values:
        """Which units and layers take part in the next round, 0 or 1, drawn with probability ``m``; counted.

        A group in which none would is given its likeliest one.
        """
        drawn = {}
        for name, value in self.values().items():
            found = (torch.rand(len(value), generator=self._generator, dtype=torch.float64) < value).double()
            if name != LAYERS and not bool(found.any()):
                found[int(value.argmax())] = 1.0
            self.counts[name] += found
            drawn[name] = found
        return drawn

    def move(self, slopes: Values, pressure: float, rate: float) -> None:
        """One :func:`mask_step` of all; slopes are divided by the running maximum of their root mean square."""
        seen = torch.cat([slope[slope != 0] for slope in slopes.values()])
        if len(seen):
            self._size = max(0.9 * self._size, float(seen.square().mean().sqrt()))
        betas = self.temperatures()
        for name, s in self.logits.items():
            slope = slopes[name] / self._size if self._size > 0 else slopes[name]
            self.logits[name] = mask_step(s, betas[name], slope, pressure, rate)


def within_budget(logits: Mapping[str, Tensor], share: Callable[[Values], float], budget: float) -> Values:
    """The masks, 0 or 1, of the network that is kept.

    Layers with a positive logit stay, as long as one unit of each group then fits the budget; those of lowest logit go
    first. Of the units those of highest logit stay, as many as fit, and one of each group.

    Args:
        logits: of groups and layers.
        share: of the multiply-accumulates that masks leave.
        budget: the most that may be left.

    Raises:
        SettingError: one unit of each group alone exceeds the budget.
    """
    least = {name: _one(s) for name, s in logits.items() if name != LAYERS}
    if LAYERS in logits:
        least[LAYERS] = (logits[LAYERS] > 0).double()
        for place in logits[LAYERS].argsort().tolist():
            if share(least) <= budget:
                break
            least[LAYERS][place] = 0.0
    if share(least) > budget:
        raise SettingError(
            f"budget={budget:g} is out of reach: one unit of every group leaves {share(least):.4f} of the "
            "multiply-accumulates. Raise budget, or let layers be left out."
        )
    ranked = sorted(
        ((value, name, unit) for name, s in logits.items() if name != LAYERS for unit, value in enumerate(s.tolist())),
        reverse=True,
    )
    low, high = 0, len(ranked)  # as many as low fit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if share(_with(least, ranked[:middle])) <= budget else (low, middle - 1)
    return _with(least, ranked[:low])


def _one(s: Tensor) -> Tensor:
    found = torch.zeros_like(s)
    found[int(s.argmax())] = 1.0
    return found


def _with(least: Values, opened: Sequence[tuple[float, str, int]]) -> Values:
    found = {name: value.clone() for name, value in least.items()}
    for _, name, unit in opened:
        found[name][unit] = 1.0
    return found
