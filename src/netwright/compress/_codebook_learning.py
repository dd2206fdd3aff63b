"""Codebooks and the mapping of weights to codewords, learned together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from netwright.core.fit import StepHook

__all__ = ["LearnedCodebooks", "MappingSteps", "mapping_slopes"]

_MEMORY = 0.9


def mapping_slopes(slope: Tensor, weight: Tensor, words: Tensor, step: Tensor, proximal: bool) -> Tensor:
    r"""What the loss gains, to first order, per unit of mapping moved from each weight's codeword to every other.

    Args:
        slope: ``(...)``, derivative of the loss by each weight.
        weight: ``(...)``, the codeword that each weight is mapped to.
        words: ``(..., k)``, the codebook of each weight.
        step: ``(...)``, mean distance between neighbours in that codebook, the unit of distances.
        proximal: divide by the distance to a codeword, in place of multiplying by it.

    Example:
        >>> one, words = torch.tensor([1.0]), torch.tensor([[0.0, 1.0, 3.0]])
        >>> mapping_slopes(one, torch.tensor([0.0]), words, one, True)
        tensor([[0.0000, 1.0000, 0.3333]])
        >>> mapping_slopes(one, torch.tensor([0.0]), words, one, False)
        tensor([[0., 1., 3.]])
    """
    distance = (words - weight[..., None]) / step[..., None]
    if proximal:
        distance = torch.where(distance == 0, distance, 1 / torch.where(distance == 0, 1.0, distance))
    return slope[..., None] * distance


class LearnedCodebooks(nn.Module):
    """A parametrization that reads a weight out of codebooks and learns which codeword each weight is mapped to.

    Args:
        weight: ``(rows, columns)``, what the mapping starts from.
        codebooks: ``(g, k)``.
        groups: ``(rows,)``, the codebook of each row.
        shape: of the weight.
    """

    groups: Tensor
    step: Tensor
    logits: Tensor
    index: Tensor
    velocity: Tensor

    def __init__(self, weight: Tensor, codebooks: Tensor, groups: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        step = _steps(codebooks)[groups][:, None]
        logits = -((codebooks[groups][:, None] - weight[..., None]) / step[..., None]).square()
        state = {"groups": groups, "step": step, "logits": logits, "index": logits.argmax(-1)}
        for name, value in {**state, "velocity": torch.zeros_like(weight)}.items():
            self.register_buffer(name, value, persistent=False)  # moved between devices, and not averaged
        self.slope: Tensor | None = None
        self.largest = 0.0

    def forward(self, codebooks: Tensor) -> Tensor:
        """The weight."""
        weight = codebooks[self.groups[:, None], self.index]
        if weight.requires_grad:
            hear: Any = weight.register_hook  # torch leaves it without annotations
            hear(self._keep)
        return weight.view(self.shape)

    def move(self, codebooks: Tensor, rate: float, proximal: bool) -> None:
        """One step of the mapping along the slopes seen since the last one, and the mapping that comes of it."""
        if self.slope is None:
            return
        self.velocity.mul_(_MEMORY).add_(self.slope, alpha=1 - _MEMORY)
        self.slope = None
        self.largest = max(self.largest, float(self.velocity.square().mean().sqrt()))
        if self.largest == 0:
            return
        words = codebooks[self.groups][:, None].expand_as(self.logits)
        weight = codebooks[self.groups[:, None], self.index]
        slopes = mapping_slopes(self.velocity / self.largest, weight, words, self.step, proximal)
        self.logits.sub_(slopes, alpha=rate)
        self.index = self.logits.argmax(-1)

    def _keep(self, slope: Tensor) -> None:
        self.slope = slope.clone() if self.slope is None else self.slope + slope


class MappingSteps(StepHook):
    """Moves mappings along with what the optimizer moves.

    Args:
        parts: mappings, each with the codebooks that it reads.
        reach: how far logits move in all where slopes are as large as the largest mean over the layer.
        proximal: as in :func:`mapping_slopes`.
    """

    def __init__(self, parts: Sequence[tuple[LearnedCodebooks, Tensor]], reach: float, proximal: bool) -> None:
        self.parts, self.reach, self.proximal = parts, reach, proximal

    def before_step(self, step: int, total: int) -> None:
        """Move all mappings at the point where the gradients were taken; steps shrink to zero linearly."""
        rate = 2 * self.reach / total * (1 - step / total)
        with torch.no_grad():
            for mapping, codebooks in self.parts:
                mapping.move(codebooks.detach(), rate, self.proximal)


def _steps(codebooks: Tensor) -> Tensor:
    """The mean distance between neighbours in each codebook, ``(g,)``."""
    spread = codebooks.amax(1) - codebooks.amin(1)
    steps: Tensor = spread / max(1, codebooks.shape[1] - 1)
    return torch.where(steps > 0, steps, torch.ones_like(steps))
