"""A network that learns from full precision first, then, its input extended by bits, from quantized scores."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Member", "TransferredPredictor", "pretrain", "random_start", "turns", "without_bits"]

Array: TypeAlias = NDArray[np.float64]
Weights: TypeAlias = Sequence[Tensor]
_PULL = 1e-2  # weight of the squared distance from the starting weights
_AT_ONCE = 128  # observations in a step of Adam; more of them take turns


@dataclass(frozen=True)
class Member:
    """An ensemble of networks side by side, with the scale of their inputs.

    Attributes:
        weights: for inputs, bits, hidden layers and output, each with the members in front.
        centre: of architecture features, ``(a,)``; None where nothing was learned yet.
        spread: of them, ``(a,)``.
    """

    weights: tuple[Tensor, ...]
    centre: Array | None
    spread: Array | None


def forward(weights: Weights, inputs: Tensor, bits: Tensor) -> Tensor:
    """``W3 relu(W2 relu(W_a a + W_q q + b1) + b2) + b3`` of every member, ``(members, n)``.

    Args:
        weights: ``W_a (m, a, h)``, ``W_q (m, q, h)``, ``b1 (m, 1, h)``, ``W2 (m, h, h)``, ``b2 (m, 1, h)``,
            ``W3 (m, h, 1)``, ``b3 (m, 1, 1)``.
        inputs: features ``a`` of the architecture, ``(n, a)``.
        bits: features ``q`` of the bits, ``(n, q)``.
    """
    of_inputs, of_bits, first, between, second, last, level = weights
    hidden = torch.relu(inputs @ of_inputs + bits @ of_bits + first)
    hidden = torch.relu(hidden @ between + second)
    return (hidden @ last + level)[..., 0]


def random_start(inputs: int, bits: int, members: int, hidden: int, seed: int) -> Member:
    """Weights drawn from normal distributions of variance ``2 / fan_in``."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(fan_in: int, fan_out: int, gain: float = 2.0) -> Tensor:
        return torch.randn(members, fan_in, fan_out, generator=generator) * math.sqrt(gain / max(fan_in, 1))

    wide = drawn(inputs + bits, hidden)
    zeros = torch.zeros(members, 1, hidden)
    return Member(
        (
            wide[:, :inputs],
            wide[:, inputs:],
            zeros,
            drawn(hidden, hidden),
            zeros,
            drawn(hidden, 1, 1.0),
            torch.zeros(members, 1, 1),
        ),
        None,
        None,
    )


def pretrain(start: Member, inputs: Array, targets: Array, steps: int, rate: float) -> Member:
    """Learn full-precision targets ``(n,)`` from architecture features ``(n, a)``; weights of bits stay as they are."""
    centre, spread = _scale(inputs)
    nothing = torch.zeros(len(inputs), start.weights[1].shape[1])
    learned = _descend(
        start.weights, _tensor((inputs - centre) / spread), nothing, _tensor(_standard(targets)[0]), steps, rate
    )
    return Member(learned, centre, spread)


def without_bits(member: Member) -> Member:
    """The same with ``W_q = 0``: until it learns, bits say nothing."""
    weights = list(member.weights)
    weights[1] = torch.zeros_like(weights[1])
    return replace(member, weights=tuple(weights))


@dataclass
class TransferredPredictor:
    """Goes on from an ensemble's weights with quantized observations; the members' disagreement is the uncertainty.

    The squared error is minimized by Adam, plus the squared distance from the starting weights, which keeps what full
    precision taught, and keeps members apart where nothing was observed.

    Args:
        start: weights that learned full-precision scores, or random ones.
        bits: which columns of the features are of the bits, ``(f,)``.
        steps: of Adam.
        rate: its learning rate.
    """

    start: Member
    bits: NDArray[np.bool_]
    steps: int
    rate: float

    def fit(self, inputs: Array, targets: Array) -> Self:
        """Learn from ``inputs (n, f)`` and ``targets (n,)``."""
        ours, theirs = inputs[:, ~self.bits], inputs[:, self.bits]
        centre, spread = self.start.centre, self.start.spread
        if centre is None or spread is None:
            centre, spread = _scale(ours)
        self._bits = _scale(theirs)
        self._fitted = replace(self.start, centre=centre, spread=spread)
        wanted, self._level, self._width = _standard(targets)
        learned = _descend(self.start.weights, *self._read(inputs), _tensor(wanted), self.steps, self.rate)
        self._fitted = replace(self._fitted, weights=learned)
        return self

    def predict(self, inputs: Array) -> tuple[Array, Array]:
        """Mean and standard deviation over the members."""
        with torch.no_grad():
            answers = forward(self._fitted.weights, *self._read(inputs)).double().numpy()
        return self._level + self._width * answers.mean(0), self._width * answers.std(0)

    def _read(self, inputs: Array) -> tuple[Tensor, Tensor]:
        assert self._fitted.centre is not None
        assert self._fitted.spread is not None
        ours = (inputs[:, ~self.bits] - self._fitted.centre) / self._fitted.spread
        return _tensor(ours), _tensor((inputs[:, self.bits] - self._bits[0]) / self._bits[1])


def _descend(
    start: Weights, inputs: Tensor, bits: Tensor, targets: Tensor, steps: int, rate: float
) -> tuple[Tensor, ...]:
    """Adam from ``start`` on the mean squared error of each member and the pull back to ``start``.

    Cost: ``O(members * min(n, 128) * h^2)`` a step.
    """
    shapes = [weight.shape for weight in start]
    begin = torch.cat([weight.flatten() for weight in start])  # one vector: an optimizer's step is a few operations
    moved = begin.clone().requires_grad_()
    optimizer = torch.optim.Adam([moved], lr=rate, fused=True)

    def weights() -> list[Tensor]:
        parts = torch.split(moved, [shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    with torch.enable_grad():
        for step, turn in enumerate(turns(len(targets), steps)):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            optimizer.zero_grad()
            errors = ((forward(weights(), inputs[turn], bits[turn]) - targets[turn]) ** 2).mean(1).sum()
            torch.autograd.backward(errors + _PULL * ((moved - begin) ** 2).sum())
            optimizer.step()
    return tuple(weight.detach() for weight in weights())


def turns(count: int, steps: int) -> Iterator[slice | Tensor]:
    """Which observations each step sees: all of few, else the next ones of a fixed shuffle, over and over."""
    if count <= _AT_ONCE:
        yield from itertools.repeat(slice(None), steps)
        return
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    for step in range(steps):
        yield order[torch.arange(step * _AT_ONCE, (step + 1) * _AT_ONCE) % count]


def _scale(rows: Array) -> tuple[Array, Array]:
    spread = rows.std(0)
    return rows.mean(0), np.where(spread > 1e-12, spread, 1.0)


def _standard(targets: Array) -> tuple[Array, float, float]:
    level, width = float(targets.mean()), float(targets.std()) or 1.0
    return (targets - level) / width, level, width


def _tensor(values: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
