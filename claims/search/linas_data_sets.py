"""LINAS against NSGA-II on the three data sets of NAS-Bench-201: evaluations until the front is found."""

import math
from statistics import fmean

import optuna

from claims.search.linas import LIMIT, needed
from netwright.search import LINASSampler, evaluations_to, nasbench201
from netwright.search.nasbench201 import DATA_SETS

PAPER = 289
CLAIM = (
    "On NAS-Bench-201 (validation accuracy against measured latency; CIFAR-10, CIFAR-100 and ImageNet16-120) LINAS "
    "reaches 99% of the true front's hypervolume in less than a quarter of the evaluations of NSGA-II (population 50), "
    "in the geometric mean over the three."
)
BETTER = "lower"
SEEDS = 20
SHARE = 0.99


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    limit = 60 if smoke else LIMIT
    rows: dict[str, float] = {}
    for name in DATA_SETS:
        table = nasbench201(name)
        linas = evaluations_to(table, LINASSampler(table.space, seed=seed), (SHARE,), limit)
        nsga2 = evaluations_to(
            table, optuna.samplers.NSGAIISampler(population_size=50, seed=seed), (SHARE,), limit
        )  # where it ends without having arrived it counts as having arrived, in its favour
        rows |= {f"linas_{name}": needed(linas, SHARE, limit), f"nsga2_{name}": needed(nsga2, SHARE, limit)}
    ratios = [math.log2(rows[f"linas_{name}"] / rows[f"nsga2_{name}"]) for name in DATA_SETS]
    return {"method": fmean(ratios), "baseline": math.log2(1 / 4), **rows}
