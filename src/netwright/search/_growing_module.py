"""A full-size network of which only the open units and layers are computed and trained."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from netwright.core.fit import StepHook
from netwright.search._growing_masks import LAYERS, Masks, within_budget
from netwright.search._growing_structure import Kept, Structure

__all__ = ["Growing", "GrowingModule", "Segment"]

Values = dict[str, Tensor]


class GrowingModule(nn.Module):
    """Runs a smaller network whose parameters are cut out of the full ones, so that gradients reach these.

    Args:
        full: the full-size network; its parameters are what an optimizer moves.
        structure: of it.
    """

    def __init__(self, full: nn.Module, structure: Structure) -> None:
        super().__init__()
        self.full = full
        self._structure = structure
        self._masks: Values = {}
        self._kept: Kept = {}
        self._small: list[nn.Module] = []  # not a submodule: its parameters stand for none
        self._frozen: dict[str, tuple[Tensor, Tensor]] = {}

    def open(self, drawn: Values, masks: Values | None) -> None:
        """From here on compute only what ``drawn`` opens.

        Args:
            drawn: 0 or 1 for each unit and layer.
            masks: what open units and layers are multiplied by, with gradients; None for ones.
        """
        self.store()
        self._small = [self._structure.build(self.full, drawn)]
        self._kept = self._structure.kept(drawn)
        self._masks = {} if masks is None else masks
        self._frozen = {}
        for name, value in self.full.named_parameters():
            if self._kept.get(name):
                active = torch.zeros_like(value, dtype=torch.bool)
                active[_index(self._kept[name], value)] = True
                self._frozen[name] = ~active, value.detach().clone()
        if masks is not None and LAYERS in masks:
            for place, name in enumerate(self._structure.layers):
                if bool(drawn[LAYERS][place]):
                    self._small[0].get_submodule(name).register_forward_hook(_mixing(masks[LAYERS], place))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the smaller network gives."""
        small = self._small[0]
        small.train(self.training)
        full = dict(self.full.named_parameters())
        values = {name: self._cut(name, full[name]) for name, _ in small.named_parameters()}
        return functional_call(small, values, args, kwargs)

    @torch.no_grad()
    def hold(self) -> None:
        """Put closed entries back to where they were, whatever the optimizer's momentum and decay did to them."""
        for name, value in self.full.named_parameters():
            if name in self._frozen:
                closed, before = self._frozen[name]
                value.copy_(torch.where(closed, before, value))

    @torch.no_grad()
    def store(self) -> None:
        """Write the running statistics of the smaller network into the full one."""
        buffers = dict(self.full.named_buffers())
        for small in self._small:
            for name, value in small.named_buffers():
                if self._kept.get(name):
                    buffers[name][_index(self._kept[name], buffers[name])] = value
                else:
                    buffers[name].copy_(value)

    @torch.no_grad()
    def fold(self, masks: Values) -> None:
        """Multiply the weights that read each unit by its mask."""
        for group in self._structure.groups:
            for place in self._structure.readers[group.name]:
                value = self.full.get_parameter(place.parameter)
                value.mul_(_line(masks[group.name].to(value.dtype), place.index, place.dim, value))

    def _cut(self, name: str, value: Tensor) -> Tensor:
        for group in self._structure.groups if self._masks else ():
            for place in self._structure.readers[group.name]:
                if place.parameter == name:
                    value = value * _line(self._masks[group.name], place.index, place.dim, value)
        for dim, kept in self._kept.get(name, {}).items():
            value = value.index_select(dim, kept.to(value.device))
        return value


class Segment:
    """Steps during which the network did not change: how many, its masks, its multiply-accumulates of one item."""

    def __init__(self, step: int, drawn: Values, macs: int) -> None:
        self.step, self.drawn, self.macs, self.steps = step, drawn, macs, 0


class Growing(StepHook):
    """Draws a network for each round, moves the masks at every step, and settles on a network at the end.

    Args:
        module: what is trained.
        structure: of it.
        masks: of its units and layers.
        budget: share of the multiply-accumulates of the network that is settled on.
        rounds: networks that are drawn.
        settle: fraction of the steps that the last network has to itself.
        strength: weight of the budget.
        reach: how far a steady slope of size 1 moves a logit, at its steepest, in all rounds.
    """

    def __init__(
        self,
        module: GrowingModule,
        structure: Structure,
        masks: Masks,
        *,
        budget: float,
        rounds: int,
        settle: float,
        strength: float,
        reach: float,
    ) -> None:
        self._module, self._structure, self.masks = module, structure, masks
        self._budget, self._rounds, self._settle = budget, rounds, settle
        self._strength, self._reach = strength, reach
        self._leaves: Values = {}
        self.segments: list[Segment] = []
        self._begin(0, masks.sample(), relaxed=True)

    def before_step(self, step: int, total: int) -> None:
        """Move the masks by their gradients and by how far the network is from its budget."""
        if not self._leaves:
            return
        slopes = {
            name: torch.zeros(len(leaf), dtype=torch.float64) if leaf.grad is None else leaf.grad.double()
            for name, leaf in self._leaves.items()
        }
        for name, slope in slopes.items():
            slope[self.segments[-1].drawn[name] == 0] = 0.0
        pressure = self._strength * (self._structure.share(self.masks.values()) - self._budget)
        self.masks.move(slopes, pressure, self._reach / self._growth(total))

    def after_step(self, step: int, total: int) -> None:
        """Hold what is closed; draw the next network where a round ends."""
        self._module.hold()
        self.segments[-1].steps += 1
        if not self._leaves:
            return
        growth = self._growth(total)
        if step + 1 >= growth:
            self._module.fold(self.masks.values())
            drawn = within_budget(self.masks.logits, self._structure.share, self._budget)
            self._begin(step + 1, drawn, relaxed=False)
        elif (step + 1) * self._rounds // growth > step * self._rounds // growth:
            self._begin(step + 1, self.masks.sample(), relaxed=True)
        else:
            self._relax()

    def _growth(self, total: int) -> int:
        return max(1, round((1.0 - self._settle) * total))

    def _begin(self, step: int, drawn: Values, *, relaxed: bool) -> None:
        values = self.masks.values() if relaxed else {}
        self._leaves = {name: value.float().requires_grad_() for name, value in values.items()}
        self._module.open(drawn, self._leaves or None)
        self.segments.append(Segment(step, drawn, round(self._structure.macs(drawn))))

    @torch.no_grad()
    def _relax(self) -> None:
        for name, value in self.masks.values().items():
            self._leaves[name].copy_(value)
            self._leaves[name].grad = None


def _mixing(masks: Tensor, place: int) -> Any:
    """A hook by which a layer gives ``m f(x) + (1 - m) x``."""

    def mix(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> Tensor:
        return masks[place] * result + (1.0 - masks[place]) * given[0]

    return mix


def _line(masks: Tensor, index: Any, dim: int, value: Tensor) -> Tensor:
    """Masks spread over the entries of one dimension, of a shape that multiplies ``value``."""
    where = torch.as_tensor(index, device=value.device)
    line = torch.ones(value.shape[dim], dtype=value.dtype, device=value.device)
    line = line.index_copy(0, where.flatten(), masks.to(line)[:, None].expand(where.shape).flatten())
    return line.view([-1 if place == dim else 1 for place in range(value.ndim)])


def _index(kept: dict[int, Tensor], value: Tensor) -> tuple[Tensor, ...]:
    """The entries that are kept, for indexing."""
    lines = [kept.get(dim, torch.arange(size)) for dim, size in enumerate(value.shape)]
    return tuple(torch.meshgrid(*(line.to(value.device) for line in lines), indexing="ij"))
