"""MANAS: one agent for each edge; together they sample architectures, of which one at a time is trained."""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from netwright.core.errors import SettingError
from netwright.search._manas_agents import CREDITS, Agents
from netwright.search._relaxed_loop import Loss, Stepper, descend, steady
from netwright.search._relaxed_search import RelaxedSearch
from netwright.search.relaxed import alphas, choices, mixed, on_path, weights

__all__ = ["MANAS", "Agents"]


@dataclass(frozen=True, kw_only=True)
class MANAS(RelaxedSearch):
    r"""A search in the memory of a single architecture: agents sample a path, the path is trained, its loss is shared.

    Reach for it where a super-network with all operations at once does not fit, or where the operations are many: an
    iteration costs what one architecture costs, however many operations an edge has. It

    1. lets an agent for each decision play an operation (:class:`Agents`; edges that share an alpha share an agent),
    2. moves the weights on that path by SGD with momentum on a batch of the first half of the training data,
    3. tells the agents how the path does on a batch of the second half: the share of the last ``window`` paths that had
       a smaller loss, a number in [0, 1] to which the scale of the loss, and its fall while the weights train, are one.

    The alphas of the result are :math:`\ln \pi`, the logarithms of the agents' probabilities.

    Args:
        credit: "least_squares" tells the agents' parts of the loss apart by regression; "exp3" gives each all of it.
        rate: of the agents, a factor on :math:`\sqrt{\ln K / (t K)}`.
        explore: of the agents; in iteration :math:`t` they play uniformly with probability ``explore`` over
            :math:`\sqrt t`, at most 1.
        warmup: epochs of uniform play at the start, which train all operations alike.
        window: earlier losses that a loss is compared with.
        epochs: passes over the halves.
        batch_size: of both batches.
        lr: of the weights at the start; it falls to 0 by a half cosine.
        momentum: of the weights.
        weight_decay: of the weights.
        clip_norm: largest norm of the weights' gradient; None for no bound.

    Raises:
        SettingError: a setting out of its range.

    Example:
        >>> from netwright.core.task import load_task
        >>> from netwright.search.relaxed import Mixed
        >>> edge = Mixed({"skip": nn.Identity(), "linear": nn.Sequential(nn.Linear(30, 30), nn.ReLU())})
        >>> result = MANAS(epochs=4).search(nn.Sequential(edge, nn.Linear(30, 2)), load_task("breast-cancer"))
        >>> round(float(result.alphas["0"][-1].exp().sum()), 6)
        1.0

    Source: paper 287: Lopes, Carlucci, Esperança, Singh, Yang, Gabillon, Xu, Chen and Wang, "MANAS: Multi-Agent Neural
        Architecture Search", 2019, arXiv 1909.01051.

    Differs: rates of the agents are those that need no horizon. Least squares is a ridge regression on all rounds,
        whose estimate times their number is what the exponential weights see. Agents see ranks among recent losses, so
        that the bound of EXP3 applies to ranks. ``val`` stays unseen: the loss comes from a half of the training data.

    Cost: a forward and a backward pass of one architecture and one more forward pass an iteration. Activations are
        those of one architecture; weights are held for all operations, gradients and momentum where they were played.
    """

    credit: str = "least_squares"
    rate: float = 1.0
    explore: float = 0.0
    warmup: int = 1
    window: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise SettingError(f"MANAS: window must be at least 1, got {self.window!r}.")
        if self.credit not in CREDITS:
            raise SettingError(f"MANAS: credit must be one of {', '.join(CREDITS)}, got {self.credit!r}.")
        if self.rate == 0:
            raise SettingError(f"MANAS: rate must be positive, got {self.rate}.")

    def _stepper(self, network: nn.Module, seed: int) -> Stepper:
        return _Playing(self, network, seed)


class _Playing(Stepper):
    """The agents, and what an iteration does."""

    def __init__(self, settings: MANAS, network: nn.Module, seed: int) -> None:
        self.networks = (network,)
        self.movers = (settings._mover(network),)
        self._settings = settings
        self._decisions = list(alphas(network).values())
        place = {id(alpha): number for number, alpha in enumerate(self._decisions)}
        self._agent = {name: place[id(part.alpha)] for name, part in mixed(network).items()}
        sizes = [len(alpha) for alpha in self._decisions]
        self._agents = Agents(sizes, credit=settings.credit, rate=settings.rate, explore=settings.explore, seed=seed)
        self._recent: deque[float] = deque(maxlen=settings.window)

    def step(self, train: Callable[[nn.Module], Loss], held: Callable[[nn.Module], Loss], epoch: int) -> float:
        """Play, train what was played, and tell how it did."""
        network = self.networks[0]
        played = self._agents.act(uniform=epoch < self._settings.warmup)
        edges = mixed(network)
        with on_path(network, {name: edges[name].names[played[agent]] for name, agent in self._agent.items()}):
            loss = descend(train(network), weights(network), self.movers[0], self._settings.clip_norm)
            with steady(network), torch.no_grad():
                value = float(held(network)())
        self._agents.observe(_rank(value, self._recent))
        self._recent.append(value)
        with torch.no_grad():
            for alpha, policy in zip(self._decisions, self._agents.policies, strict=True):
                alpha.copy_(policy.log())
        return loss

    def scoring(self) -> AbstractContextManager[None]:
        """The strongest path is scored."""
        return on_path(self.networks[0], choices(self.networks[0]))

    def state(self) -> dict[str, Any]:
        """The agents and the recent losses."""
        return {"agents": self._agents.state(), "recent": list(self._recent)}

    def restore(self, state: dict[str, Any]) -> None:
        """Put them back."""
        self._agents.restore(state["agents"])
        self._recent.clear()
        self._recent.extend(state["recent"])


def _rank(value: float, recent: deque[float]) -> float:
    """Share of ``recent`` that is smaller, equal ones by half; 1/2 where there is none."""
    if not recent:
        return 0.5
    return sum((other < value) + 0.5 * (other == value) for other in recent) / len(recent)
