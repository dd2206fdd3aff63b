"""``python -m benchmarks.proposer``: what a suggestion costs after 100 to 3,000 observations, as JSON lines.

Each sampler is told as many random cells of NAS-Bench-201, then asked and told sixty times more, the table giving the
answers; the processor time of one suggestion is the mean of these, so that models fitted for a batch count in their
share (the longest batch is of sixty), and the median over rounds in which all sizes take turns. ``exponent`` is the
slope of log time against log n: n log n has 1.15 over this range.
"""

import argparse
import json
import statistics
import time

import numpy as np
import optuna
import torch
from optuna.trial import create_trial

from benchmarks.search_table import SAMPLERS
from netwright.search import NASBench201, nasbench201
from netwright.search.nasbench201 import OPERATIONS

SIZES = (100, 300, 1000, 3000)
ASKED = 60
LARGEST = {"GP": 300}
"""Observations up to which a sampler is timed: a suggestion of GP takes 0.7 s there."""


def filled(table: NASBench201, name: str, count: int, seed: int) -> optuna.Study:
    """A study with ``count`` random cells."""
    study = optuna.create_study(sampler=SAMPLERS[name](table, seed), directions=["maximize", "minimize"])
    decisions, rng = dict(table.space.decisions), np.random.default_rng(seed)
    for _ in range(count):
        params = {key: str(rng.choice(OPERATIONS)) for key in decisions}
        metrics = table.evaluate(params)
        values = [metrics["accuracy"], metrics["latency_ms"]]
        study.add_trial(create_trial(params=params, distributions=decisions, values=values))
    return study


def suggestion_s(table: NASBench201, study: optuna.Study) -> float:
    """Processor seconds of one suggestion, the mean of sixty."""
    spent = 0.0
    for _ in range(ASKED):
        start = time.process_time()
        trial = study.ask(dict(table.space.decisions))
        spent += time.process_time() - start
        metrics = table.evaluate(trial.params)
        study.tell(trial, [metrics["accuracy"], metrics["latency_ms"]])
    return spent / ASKED


def main() -> None:
    """Time every sampler that is named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proposer", description=__doc__)
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    torch.set_num_threads(1)
    table = nasbench201("cifar100")
    for name in options.samplers:
        sizes = [size for size in SIZES if size <= LARGEST.get(name, size)]
        seconds: dict[int, list[float]] = {size: [] for size in sizes}
        for seed in range(options.rounds):
            for size in sizes:
                seconds[size].append(suggestion_s(table, filled(table, name, size, seed)))
        medians = {size: statistics.median(values) for size, values in seconds.items()}
        slope = np.polyfit(np.log(sizes), np.log(list(medians.values())), 1)[0]
        times = {f"cpu_s_at_{size}": round(medians[size], 5) if size in medians else None for size in SIZES}
        print(json.dumps({"sampler": name, **times, "exponent": round(float(slope), 2)}), flush=True)


if __name__ == "__main__":
    main()
