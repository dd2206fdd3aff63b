"""Joint training of weights, grids and sparsity: what GETA does within every iteration."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netwright.compress._learned_quantizer import LearnedGrid, on_grid, residual, step_of
from netwright.compress._unit_plan import Plan, UnitHook
from netwright.compress._unit_saliency import unit_saliency
from netwright.compress._unit_vectors import UnitVectors

__all__ = ["WIDE", "JointTraining", "Stages", "forget_rate", "forget_step"]

WIDE = 16.0
"""Bits with which every weight starts."""
_ETA, _XI, _BETA = 0.999, 0.9, 0.8  # shares of the descent that forgetting and rounding may use up; shrinking of gamma


def forget_rate(clipped: Tensor, gradient: Tensor, rate: float, left: int) -> float:
    r"""How much of redundant units is forgotten in a step, :math:`\gamma`.

    With :math:`c` their clipped parameters, :math:`g` the gradient, :math:`\alpha` the learning rate and ``left``
    steps of the period to go: ``1 / left`` where :math:`c^\top g \ge 0`, for then forgetting descends; else
    :math:`(1 - \eta)\, \alpha \|g\|^2 / (-c^\top g)`, with which the step as a whole still does.
    """
    product = float(clipped @ gradient)
    if not bool(clipped.any()):
        return 0.0
    if product >= 0:
        return 1.0 / left
    return min(1.0, (1.0 - _ETA) * rate * float(gradient @ gradient) / -product)


def forget_step(
    rest: Tensor, gradient: Tensor, rate: float, gamma: float, bounds: tuple[float, float]
) -> tuple[float, float]:
    r"""The step :math:`d` of a grid with redundant units, and :math:`\gamma`, made smaller where :math:`d` asks for it.

    With :math:`r` the rounding residuals: the coarsest step where :math:`r^\top g \ge 0` or nothing is forgotten; else
    :math:`\xi \eta\, \alpha \|g\|^2 / (-\gamma\, r^\top g)`, within the bounds.
    """
    low, high = bounds
    product = float(rest @ gradient)
    square = float(gradient @ gradient)
    if product >= 0 or gamma == 0 or square == 0 or rate == 0:
        return high, gamma
    step = _XI * _ETA * rate * square / (-gamma * product)
    while step < low:
        gamma, step = gamma * _BETA, step / _BETA
    return min(step, high), gamma


@dataclass(frozen=True)
class Stages:
    """When what happens: iterations counted from 0.

    Args:
        widths: first iteration in which the upper bound of the widths begins to fall.
        prune: first iteration in which units fade.
        settle: first iteration in which widths are whole and units gone.
        periods: in which the bound falls, and in which units go.
    """

    widths: int
    prune: int
    settle: int
    periods: int

    def upper(self, step: int, high: float) -> float:
        """The upper bound of the widths after iteration ``step``: from 16 to ``high`` in equal parts."""
        if step < self.widths:
            return WIDE
        if step >= self.prune:
            return high
        part = (step - self.widths) * self.periods // max(1, self.prune - self.widths) + 1
        return WIDE - (WIDE - high) * min(1.0, part / self.periods)

    def bounds(self) -> list[int]:
        """Where the periods begin in which units go, and where the last one ends."""
        length = self.settle - self.prune
        count = max(1, min(self.periods, length))
        return [self.prune + length * part // count for part in range(count + 1)]


class JointTraining(UnitHook):
    """The model computes with rounded weights; the optimizer moves those beneath; grids and sparsity follow.

    Args:
        model: what is trained; its parameters hold rounded weights between the iterations.
        names: the parameters to round.
        vectors: of the units of ``model``.
        plan: which groups, and how many units are to go.
        stages: when.
        bits: bounds of the widths.
        sizes: the learning rate of each iteration.
    """

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        vectors: UnitVectors,
        plan: Plan,
        stages: Stages,
        bits: tuple[int, int],
        sizes: list[float],
    ) -> None:
        super().__init__(vectors, plan)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._weights = {name: parameters[name] for name in names}
        self.grids = {name: LearnedGrid.of(value, WIDE) for name, value in self._weights.items()}
        self._beneath = {name: value.detach().clone() for name, value in self._weights.items()}
        self._stages, self._bits, self._sizes = stages, bits, sizes
        self._layers = {group: [p.parameter for p in places] for group, places in plan.places.items()}
        self._fading = {name: torch.zeros_like(mask) for name, mask in self.gone.items()}
        self._rates: dict[str, float] = {}
        self._shown: dict[str, Tensor] = {}
        self.widths: dict[str, int] | None = None
        self._show()

    def bounds(self, step: int) -> tuple[float, float]:
        """Within which every width lies after iteration ``step``."""
        return float(self._bits[0]), self._stages.upper(step, float(self._bits[1]))

    @torch.no_grad()
    def before_step(self, step: int, total: int) -> None:
        """Choose units and how fast they are forgotten, move the grids, and put in the weights beneath."""
        starts = self._stages.bounds()
        if step in starts[:-1]:
            scores = self.without_gone(unit_saliency(self.vectors.read(), self.vectors.gradients()))
            lowest = self.goal.lowest(scores, (starts.index(step) + 1) / (len(starts) - 1))
            self._fading = {name: mask & ~self.gone[name] for name, mask in lowest.items()}
        self._shown = self.vectors.snapshot()
        rounded = self.vectors.gradients()
        for name, value in self._weights.items():
            value.copy_(self._beneath[name])
            if value.grad is not None:
                grid = self.grids[name]
                clipped = value.abs() >= grid.reach
                grid.descend(value, value.grad, self._sizes[step])
                value.grad.masked_fill_(clipped, 0.0)
        self._project(step)
        if self._stages.prune <= step < self._stages.settle:
            end = min(bound for bound in starts if bound > step)
            self._forget(rounded, self._sizes[step], end - step, step)
        super().before_step(step, total)

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Forget, cut at the end of a period, and show the rounded weights."""
        if self._stages.prune <= step < self._stages.settle:
            self.vectors.add(self._shown, self._factors())
            if step + 1 in self._stages.bounds():
                self.gone = {name: mask | self.gone[name] for name, mask in self._fading.items()}
        self.hold()
        self._keep()
        if step + 1 >= self._stages.settle and self.widths is None:
            self._settle()
        self._show()

    @torch.no_grad()
    def finish(self) -> None:
        """Leave rounded weights of whole widths and exactly as many units as are to go."""
        self._put_beneath()
        if sum(int(mask.sum()) for mask in self.gone.values()) < self.goal.total:
            super().finish()
        self._keep()
        if self.widths is None:
            self._settle()
        self._show()

    def _project(self, step: int) -> None:
        low, high = self.bounds(step)
        for name, grid in self.grids.items():
            if self.widths is None:
                grid.project(low, high)
            else:
                grid.step = step_of(self.widths[name], grid.reach)

    def _forget(self, gradients: Mapping[str, Tensor], rate: float, left: int, step: int) -> None:
        """The rate of each group with redundant units, and the steps of the grids of its layers."""
        parts = self._parts()
        low, high = self.bounds(step)
        self._rates = {}
        for name, mask in self._fading.items():
            clipped, rest = (part[name][mask].flatten().double() for part in parts)
            gradient = gradients[name][mask].flatten().double()
            if not len(clipped):
                continue
            gamma = forget_rate(clipped, gradient, rate, left)
            grids = [self.grids[layer] for layer in self._layers[name] if layer in self.grids]
            if grids:
                reach = max(grid.reach for grid in grids)
                wanted, gamma = forget_step(rest, gradient, rate, gamma, (step_of(high, reach), step_of(low, reach)))
                for grid in grids:
                    grid.step = wanted
                    grid.project(low, high)
            self._rates[name] = gamma

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """For each group the clipped vectors of its units, and their rounding residuals."""
        values = self.vectors.snapshot()
        rest = {name: torch.zeros_like(value) for name, value in values.items()}
        for name, grid in self.grids.items():
            if name in values:
                rest[name] = residual(values[name], grid.step, grid.reach)
                values[name] = values[name].clamp(-grid.reach, grid.reach)
        return self.vectors.read(values), self.vectors.read(rest)

    def _factors(self) -> dict[str, Tensor]:
        return {
            name: -self._rates.get(name, 0.0) * mask.double()
            for name, mask in self._fading.items()
            if bool((mask & ~self.gone[name]).any())
        }

    def _settle(self) -> None:
        """Whole widths from here on."""
        low, high = self._bits
        self.widths = {}
        for name, grid in self.grids.items():
            grid.project(low, high)
            self.widths[name] = min(high, max(low, math.floor(grid.width + 0.5)))
            grid.step = step_of(self.widths[name], grid.reach)

    def _put_beneath(self) -> None:
        for name, value in self._weights.items():
            value.copy_(self._beneath[name])

    def _keep(self) -> None:
        self._beneath = {name: value.detach().clone() for name, value in self._weights.items()}

    @torch.no_grad()
    def _show(self) -> None:
        for name, value in self._weights.items():
            value.copy_(on_grid(self._beneath[name], self.grids[name].step, self.grids[name].reach))
