"""MANAS's agents on NAS-Bench-201: how the regret against the best cell grows."""

import math

import numpy as np
from numpy.typing import NDArray

from netwright.search.manas import Agents
from netwright.search.nasbench201 import OPERATIONS, nasbench201

PAPER = 287
CLAIM = (
    "On NAS-Bench-201 (CIFAR-100) the regret of MANAS's agents (least squares) against the best of all cells grows "
    "more slowly than the square root of the rounds: its exponent from 1,000 to 10,000 rounds is below 1/2. They play "
    "uniformly with probability 1 over the root of the round, and their rate is the best of five on CIFAR-10."
)
BETTER = "lower"
SEEDS = 5
EDGES = 6
RATES = (0.5, 1.0, 2.0, 4.0, 8.0)
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # of uniform play, for epsilon-greedy agents


def losses(name: str) -> NDArray[np.float64]:
    """One minus validation accuracy of every cell, by the operations of its edges."""
    found = np.empty((len(OPERATIONS),) * EDGES)
    for cell, accuracy in nasbench201(name).accuracy.items():
        found[tuple(map(int, cell))] = 1 - accuracy / 100
    return found


def regrets(table: NDArray[np.float64], rate: float, rounds: int, seed: int) -> NDArray[np.float64]:
    """Total regret of the agents after each round."""
    agents = Agents([len(OPERATIONS)] * EDGES, credit="least_squares", rate=rate, explore=1.0, seed=seed)
    seen = np.empty(rounds)
    for number in range(rounds):
        seen[number] = table[agents.act()]
        agents.observe(float(seen[number]))
    return np.cumsum(seen - table.min())


def greedy(table: NDArray[np.float64], share: float, rounds: int, seed: int) -> float:
    """Total regret of agents that play the operation with the lowest mean loss, and any one with a given share."""
    rng = np.random.default_rng(seed)
    count, total = np.zeros((EDGES, len(OPERATIONS))), np.zeros((EDGES, len(OPERATIONS)))
    regret, edges = 0.0, np.arange(EDGES)
    for _ in range(rounds):
        best = (total / np.maximum(count, 1) - (count == 0)).argmin(1)
        played = np.where(rng.random(EDGES) < share, rng.integers(len(OPERATIONS), size=EDGES), best)
        loss = float(table[tuple(played)])
        count[edges, played] += 1
        total[edges, played] += loss
        regret += loss - float(table.min())
    return regret


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    rounds = 300 if smoke else 10_000
    choosing, table = losses("cifar10"), losses("cifar100")
    rate = min(RATES, key=lambda entry: regrets(choosing, entry, rounds, seed)[-1])
    share = min(SHARES, key=lambda entry: greedy(choosing, entry, rounds, seed))
    found = regrets(table, rate, rounds, seed)
    return {
        "method": math.log10(found[-1] / found[rounds // 10 - 1]),
        "baseline": 0.5,
        "rate": rate,
        "regret": float(found[-1]),
        "regret_epsilon_greedy": greedy(table, share, rounds, seed),
        "regret_uniform": float(rounds * (table.mean() - table.min())),
        "exp3_bound": 2 * EDGES * math.sqrt(rounds * len(OPERATIONS) * math.log(len(OPERATIONS))),
    }
