"""LINAS against NSGA-II on NAS-Bench-201: evaluations until the front of accuracy and latency is found."""

import math

import optuna

from netwright.search import LINASSampler, evaluations_to, nasbench201

PAPER = 2
CLAIM = (
    "On NAS-Bench-201 (validation accuracy against measured latency, CIFAR-100 cells) LINAS reaches 99% of the true "
    "front's hypervolume in less than a quarter of the evaluations of NSGA-II (population 50), in the geometric mean."
)
BETTER = "lower"
SEEDS = 20
LIMIT = 4000  # of NSGA-II; where it ends there it counts as having arrived, in its favour


def needed(found: dict[float, int | None], share: float, limit: int) -> int:
    """Evaluations to a share; the limit where it was not reached."""
    count = found[share]
    return limit if count is None else count


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table, limit = nasbench201("cifar100"), 60 if smoke else LIMIT
    linas = evaluations_to(table, LINASSampler(table.space, seed=seed), limit=limit)
    nsga2 = evaluations_to(table, optuna.samplers.NSGAIISampler(population_size=50, seed=seed), limit=limit)
    return {
        "method": math.log2(needed(linas, 0.99, limit) / needed(nsga2, 0.99, limit)),
        "baseline": math.log2(1 / 4),
        "linas_99": needed(linas, 0.99, limit),
        "quarter_of_nsga2_99": needed(nsga2, 0.99, limit) / 4,
        "linas_98": needed(linas, 0.98, limit),
        "quarter_of_nsga2_98": needed(nsga2, 0.98, limit) / 4,
        "linas_95": needed(linas, 0.95, limit),
        "quarter_of_nsga2_95": needed(nsga2, 0.95, limit) / 4,
        "nsga2_arrived": float(nsga2[0.99] is not None),
    }
