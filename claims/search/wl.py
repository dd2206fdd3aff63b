"""WLSampler after 100 evaluations against random search after 1,000; and whether its motifs are right."""

from statistics import fmean

import numpy as np
import optuna

from netwright.search import NASBench201, WLSampler, nasbench201
from netwright.search.nasbench201 import OPERATIONS, cell_graph
from netwright.search.wl_process import subtrees

PAPER = 290
CLAIM = (
    "On NAS-Bench-201 (CIFAR-100), the best validation accuracy that WLSampler has found after 100 evaluations is "
    "higher than what random search has found after 1,000."
)
BETTER = "higher"
SEEDS = 10
DEPTH = 2


def named(cell: str) -> dict[str, str]:
    """The decisions of a cell."""
    return {f"op{edge}": OPERATIONS[int(digit)] for edge, digit in enumerate(cell)}


def agreement(table: NASBench201, sampler: WLSampler, study: optuna.Study) -> tuple[float, float]:
    """Share of sure motifs (beyond twice their deviation) with the sign of their effect in the table; how many."""
    sure = [motif for motif in sampler.motifs(study, least=5) if abs(motif.effect) > 2 * motif.deviation][:20]
    having: dict[str, list[float]] = {motif.subtree: [] for motif in sure}
    for cell, accuracy in table.accuracy.items():
        for word in {word for level in subtrees(cell_graph(named(cell)), DEPTH) for word in level} & set(having):
            having[word].append(accuracy)
    total, count = sum(table.accuracy.values()), len(table.accuracy)
    right = []
    for motif in sure:
        inside = having[motif.subtree]
        if 0 < len(inside) < count:
            outside = (total - sum(inside)) / (count - len(inside))
            right.append((fmean(inside) - outside > 0) == (motif.effect > 0))
    return (float(np.mean(right)) if right else 0.0), float(len(right))


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    table = nasbench201("cifar100")
    sampler = WLSampler(table.space, depth=DEPTH, seed=seed)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    for _ in range(25 if smoke else 100):
        trial = study.ask(dict(table.space.decisions))
        study.tell(trial, table.evaluate(trial.params)["accuracy"])
    rng = np.random.default_rng(seed)
    drawn = [table.evaluate(table.space.sample(rng))["accuracy"] for _ in range(100 if smoke else 1000)]
    right, count = agreement(table, sampler, study)
    return {"method": study.best_value, "baseline": max(drawn), "motifs_right": right, "motifs": count}
