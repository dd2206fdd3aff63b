"""Agents that choose together and share one loss: exponential weights over estimates of what each operation costs."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from netwright.core.errors import SettingError

__all__ = ["CREDITS", "Agents"]

CREDITS = ("exp3", "least_squares")
"""How the shared loss is credited to the operations that were played."""


def _policy(totals: Tensor, rate: float, explore: float) -> Tensor:
    r""":math:`(1 - \gamma)\, \mathrm{softmax}(-\eta \hat L) + \gamma / K` for totals :math:`\hat L` ``(K,)``."""
    return (1 - explore) * torch.softmax(-rate * totals, 0) + explore / len(totals)


def _credited(totals: Tensor, action: int, loss: float, policy: Tensor) -> Tensor:
    r"""EXP3: the loss, divided by the probability of what was played, joins the total of that operation alone."""
    changed = totals.clone()
    changed[action] += loss / policy[action]
    return changed


def _solved(moment: Tensor, target: Tensor, ridge: float) -> Tensor:
    r""":math:`(\sum_t z_t z_t^\top + \rho I)^{-1} \sum_t z_t l_t`."""
    solution: Tensor = torch.linalg.solve(moment + ridge * torch.eye(len(target), dtype=target.dtype), target)
    return solution


class Agents:
    r"""One agent for each decision; together they learn from the shared loss which options to play.

    The core of :class:`~netwright.search.manas.MANAS`, to be used by itself wherever several choices are made at once
    and only the joint outcome is seen: a table of architectures, a bandit, a slow simulator. Ask
    :meth:`act`, tell :meth:`observe`.

    Agent :math:`i` plays option :math:`k` with probability

    .. math:: \pi_i(k) = (1 - \gamma_t)\, \frac{\exp(-\eta_t \hat L_{ik})}{\sum_j \exp(-\eta_t \hat L_{ij})}
        + \frac{\gamma_t}{K_i}, \qquad \eta_t = s \sqrt{\frac{\ln K_i}{t K_i}}, \qquad
        \gamma_t = \min\!\left(1, \frac{g}{\sqrt t}\right),

    :math:`t` the round from 1, :math:`K_i` its options, :math:`\hat L` the estimated total loss of each option:

    - ``"exp3"``: the observed loss over the probability of what was played, for what was played. Each agent's regret
      against its best option in hindsight is at most :math:`2 \sqrt{T K \ln K}` in expectation, whatever the others do
      (with :math:`s = 1`, :math:`g = 0`).
    - ``"least_squares"``: :math:`t \beta_{ik}`, where :math:`\beta` minimizes
      :math:`\sum_t (l_t - z_t^\top \beta)^2 + \rho \lVert \beta \rVert^2` and :math:`z_t` marks the options played.
      Every agent's part of the loss is told from the others', so far fewer rounds do where parts add up; with a
      large :math:`s` agents may settle together on what is not best, which :math:`g = 1` prevented in all of twelve
      runs on NAS-Bench-201.

    Uniform play costs an agent at most :math:`2 g \sqrt T` in expectation, whatever the others do.

    Args:
        sizes: options of each agent, at least 2.
        credit: "exp3" or "least_squares".
        rate: :math:`s`.
        explore: :math:`g`, uniform play, at least 0.
        ridge: :math:`\rho`.
        seed: source of all play.

    Raises:
        SettingError: a setting out of its range.

    Example:
        >>> agents = Agents([3, 3], seed=0)
        >>> for _ in range(2000):
        ...     first, second = agents.act()
        ...     agents.observe(0.2 * (first != 1) + 0.2 * (second != 2))
        >>> agents.best
        (1, 2)

    Cost: a round takes ``O(n)`` with EXP3, ``n`` the options of all agents; ``O(n^3)`` and ``O(n^2)`` memory with least
        squares.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        credit: str = "exp3",
        rate: float = 1.0,
        explore: float = 0.0,
        ridge: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not sizes or min(sizes) < 2:
            raise SettingError(f"Every agent needs at least two options to choose from, got sizes {list(sizes)}.")
        if credit not in CREDITS:
            raise SettingError(f"credit must be one of {', '.join(CREDITS)}, got {credit!r}.")
        if not (math.isfinite(rate) and rate > 0 and math.isfinite(ridge) and ridge > 0):
            raise SettingError(f"rate and ridge must be positive and finite, got {rate!r} and {ridge!r}.")
        if not (math.isfinite(explore) and explore >= 0):
            raise SettingError(f"explore must be finite and at least 0, got {explore!r}.")
        self.sizes = list(sizes)
        self.round = 0
        self._credit, self._rate, self._explore, self._ridge = credit, rate, explore, ridge
        self._generator = torch.Generator().manual_seed(seed)
        options = sum(sizes)
        self._totals = torch.zeros(options, dtype=torch.float64)
        whole = credit == "least_squares"
        self._moment = torch.zeros(options if whole else 0, options if whole else 0, dtype=torch.float64)
        self._target = torch.zeros(options if whole else 0, dtype=torch.float64)
        self._played: tuple[int, ...] | None = None
        self._policies = self._current()

    @property
    def policies(self) -> tuple[Tensor, ...]:
        """Each agent's probabilities ``(options,)`` in the coming round."""
        return self._policies

    @property
    def best(self) -> tuple[int, ...]:
        """Each agent's most probable option."""
        return tuple(int(policy.argmax()) for policy in self._policies)

    def act(self, *, uniform: bool = False) -> tuple[int, ...]:
        """What the agents play in this round.

        Args:
            uniform: play every option alike, to explore; :meth:`observe` takes it into account.
        """
        if uniform:
            self._policies = tuple(torch.full((size,), 1 / size, dtype=torch.float64) for size in self.sizes)
        drawn = [torch.multinomial(policy, 1, generator=self._generator) for policy in self._policies]
        self._played = tuple(map(int, drawn))
        return self._played

    def observe(self, loss: float) -> None:
        """Learn from the loss of what was played last.

        Args:
            loss: in [0, 1].

        Raises:
            SettingError: a loss out of its range, or nothing that was played.
        """
        if self._played is None:
            raise SettingError("Nothing was played: call act() before each observe().")
        if not 0 <= loss <= 1:
            raise SettingError(f"The loss of round {self.round + 1} must be in [0, 1], got {loss!r}. Scale it.")
        self.round += 1
        played, self._played = self._played, None
        if self._credit == "exp3":
            parts = torch.split(self._totals, self.sizes)
            credited = zip(parts, played, self._policies, strict=True)
            self._totals = torch.cat([_credited(part, action, loss, policy) for part, action, policy in credited])
        else:
            marks = torch.cat(
                [torch.eye(size, dtype=torch.float64)[a] for size, a in zip(self.sizes, played, strict=True)]
            )
            self._moment += torch.outer(marks, marks)
            self._target += loss * marks
            self._totals = self.round * _solved(self._moment, self._target, self._ridge)
        self._policies = self._current()

    def _current(self) -> tuple[Tensor, ...]:
        scales = [self._rate * math.sqrt(math.log(size) / ((self.round + 1) * size)) for size in self.sizes]
        parts, explore = torch.split(self._totals, self.sizes), min(1.0, self._explore / math.sqrt(self.round + 1))
        return tuple(_policy(part, scale, explore) for part, scale in zip(parts, scales, strict=True))

    def state(self) -> dict[str, Any]:
        """All that :meth:`restore` needs to go on from here."""
        return {
            "round": self.round,
            "totals": self._totals,
            "moment": self._moment,
            "target": self._target,
            "generator": self._generator.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned, between two rounds."""
        self.round = state["round"]
        # a checkpoint may have brought them to the network's device
        self._totals = state["totals"].cpu()
        self._moment, self._target = state["moment"].cpu().clone(), state["target"].cpu().clone()
        self._generator.set_state(state["generator"].cpu())
        self._policies = self._current()
