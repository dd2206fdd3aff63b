"""Gates on the units of a traced model, learned within the iterations of its training."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from netwright.compress._groups import input_dim
from netwright.compress._trainable_gate_macs import MacModel
from netwright.core.data import Inputs
from netwright.core.fit import StepHook
from netwright.core.graph import Graph, Group, Place
from netwright.core.graph.agreement import difference

__all__ = ["GateTraining", "gate", "gated_places", "slope"]

Places = Mapping[str, Sequence[Place]]
_AGREES = 1e-3


def gate(value: Tensor) -> Tensor:
    """``1[w > 0]``, and the largest alone where all would be closed: a group of units cannot lose all."""
    opened = value > 0
    return opened if bool(opened.any()) else value == value.max()


def slope(value: Tensor, shape: str) -> Tensor:
    """The derivative ``g(w)`` that the gate has in training, 1 at 0: everywhere so, or of a sigmoid."""
    if shape == "constant":
        return torch.ones_like(value)
    return 4.0 * torch.sigmoid(value) * torch.sigmoid(-value)


def gated_places(graph: Graph, model: nn.Module, groups: Sequence[Group], inputs: Inputs) -> dict[str, list[Place]]:
    """For each group the entries of parameters that its gates multiply.

    Multiplying the input side of everything that reads a unit is multiplying what the unit puts out. Where that does
    not make the units contribute nothing, as zeroing them does, all of their parameters are multiplied.
    """
    shapes = {name: value.ndim for name, value in model.named_parameters(remove_duplicate=False)}
    places: dict[str, list[Place]] = {}
    for group in groups:
        known = [place for place in group.places if place.parameter in shapes]
        readers = [place for place in known if shapes[place.parameter] > 1 and place.dim == input_dim(model, place)]
        units = list(range(group.size // 2))
        closed = _without(model, readers, units)
        same = readers and not difference(graph.zero(model, {group.name: units}), closed, inputs, _AGREES)
        places[group.name] = list(readers if same else known)
    return places


@torch.no_grad()
def _without(model: nn.Module, places: Sequence[Place], units: Sequence[int]) -> nn.Module:
    copy = deepcopy(model)
    parameters = dict(copy.named_parameters(remove_duplicate=False))
    for place in places:
        value = parameters[place.parameter]
        value.index_fill_(place.dim, torch.as_tensor(place.index[list(units)], device=value.device).flatten(), 0)
    return copy


class GateTraining(StepHook):
    """The parameters show the model its units multiplied by their gates; the optimizer moves what lies beneath.

    Args:
        model: what is trained.
        places: what the gates of each group multiply.
        values: ``(size,)`` the gates' weights at the start, all positive; moved in place.
        macs: what units cost.
        target: the share of the operations to reach.
        strength: weight of the budget in the gates' steps.
        reach: how far the budget alone would move a gate in the whole training.
        shape: see :func:`slope`.
        ramp: fraction of the training over which the target falls from 1.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Places,
        values: dict[str, Tensor],
        macs: MacModel,
        *,
        target: float,
        strength: float,
        reach: float,
        shape: str,
        ramp: float,
    ) -> None:
        self.values = values
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._where: dict[str, list[tuple[str, Place]]] = {}
        for name, found in places.items():
            for place in found:
                self._where.setdefault(place.parameter, []).append((name, place))
        self._macs, self._target, self._strength = macs, target, strength
        self._reach, self._shape, self._ramp = reach, shape, ramp
        self._beneath: dict[str, Tensor] = {}
        self._size = 0.0

    def gates(self) -> dict[str, Tensor]:
        """0 or 1 for each unit."""
        return {name: gate(value).double() for name, value in self.values.items()}

    @torch.no_grad()
    def before_step(self, step: int, total: int) -> None:
        """Read the gates' gradients, and put the weights that the optimizer is to move into place."""
        slopes = {name: torch.zeros_like(value) for name, value in self.values.items()}
        gates = self.gates()
        for parameter, found in self._where.items():
            value = self._parameters[parameter]
            beneath = self._beneath.get(parameter, value)
            masks = [_mask(gates[name], place, value) for name, place in found]
            if value.grad is not None:
                for at, (name, place) in enumerate(found):
                    product = beneath * value.grad
                    for mask in (*masks[:at], *masks[at + 1 :]):
                        product = product * mask
                    slopes[name] += _sums(product, place)
                for mask in masks:
                    value.grad.mul_(mask)
            value.copy_(beneath)
        self._move(slopes, gates, step, total)

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Multiply by the gates again."""
        gates = self.gates()
        for parameter, found in self._where.items():
            value = self._parameters[parameter]
            self._beneath[parameter] = value.detach().clone()
            for name, place in found:
                value.mul_(_mask(gates[name], place, value))

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the weights beneath in the model, as if all gates were open."""
        for parameter, value in self._beneath.items():
            self._parameters[parameter].copy_(value)

    def _move(self, slopes: dict[str, Tensor], gates: dict[str, Tensor], step: int, total: int) -> None:
        together = torch.cat(list(slopes.values()))
        self._size = max(0.9 * self._size, float(together.square().mean().sqrt()))
        share, costs = self._macs.slopes(gates)
        wanted = 1.0 - (1.0 - self._target) * min(1.0, (step + 1) / (self._ramp * total))
        mean = float(torch.cat(list(costs.values())).mean())
        for name, value in self.values.items():
            push = slopes[name] / self._size if self._size > 0 else slopes[name]
            if mean > 0:
                push = push + self._strength * _sign(share - wanted) * costs[name] / mean
            value -= self._reach / total * slope(value, self._shape) * push


def _sign(number: float) -> float:
    return float(number > 0) - float(number < 0)


def _mask(gates: Tensor, place: Place, value: Tensor) -> Tensor:
    """Gates spread over the entries of a parameter, of a shape that multiplies it."""
    line = torch.ones(value.shape[place.dim], dtype=value.dtype)
    line[torch.as_tensor(place.index)] = gates.to(value.dtype)[:, None]
    shape = [1] * value.ndim
    shape[place.dim] = -1
    return line.view(shape).to(value.device)


def _sums(values: Tensor, place: Place) -> Tensor:
    """``(units,)`` sums of ``values`` over all entries of each unit, in float64."""
    others = [dim for dim in range(values.ndim) if dim != place.dim]
    line = values.double().sum(others) if others else values.double()
    return line.cpu()[torch.as_tensor(place.index)].sum(1)
