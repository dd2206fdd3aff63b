"""``python -m benchmarks.search_table``: evaluations until a sampler has the front of NAS-Bench-201.

Proposals to 95, 98 and 99% of the true front's hypervolume (validation accuracy against measured latency), exact since
the table is, with the time a suggestion took. Every line of the output file is one sampler on one data set with one
seed; what is there already is not run again, so that the run can be stopped and started at will, and a part of it can
be made anew by taking its lines out. The last lines printed are the medians.

A cell has no bits, so APQ's row is its predictor without the transfer that it is for.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler

from netwright.search import APQSampler, LINASSampler, NASBench201, WLSampler, evaluations_to, nasbench201
from netwright.search.space import SearchSpace

SHARES = (0.95, 0.98, 0.99)
SAMPLERS: Mapping[str, Callable[[NASBench201, int], BaseSampler]] = {
    "random": lambda table, seed: RandomSampler(seed=seed),
    "NSGA-II": lambda table, seed: NSGAIISampler(population_size=50, seed=seed),
    "TPE": lambda table, seed: TPESampler(multivariate=True, seed=seed),
    "GP": lambda table, seed: GPSampler(seed=seed),
    "LINAS": lambda table, seed: LINASSampler(table.space, seed=seed),
    "LINAS, decisions only": lambda table, seed: LINASSampler(SearchSpace(table.space.decisions), seed=seed),
    "APQ": lambda table, seed: APQSampler(table.space, seed=seed),
    "WL": lambda table, seed: WLSampler(table.space, seed=seed),
}
LIMITS = {"TPE": 1000, "GP": 300, "APQ": 1000, "WL": 1000}
"""Proposals after which a sampler whose suggestions grow dear is stopped; 4,000 for the others."""
FEWER = {"GP": 3, "APQ": 5}
"""Seeds of samplers that take minutes a run, where none are named; 20 for the others."""


def measured(name: str, data: str, seed: int, limit: int) -> dict[str, Any]:
    """One row."""
    table = nasbench201(data)
    state = {"proposals": 0, "share": 0.0}

    def progress(number: int, share: float) -> None:
        state["proposals"], state["share"] = number, share

    start = time.process_time()
    found = evaluations_to(table, SAMPLERS[name](table, seed), SHARES, limit, progress)
    seconds = time.process_time() - start
    return {
        "sampler": name,
        "data": data,
        "seed": seed,
        "limit": limit,
        "evaluations_to": {str(share): count for share, count in found.items()},
        "share": state["share"],
        "proposals": state["proposals"],
        "cpu_s": round(seconds, 2),
        "cpu_s_per_proposal": round(seconds / state["proposals"], 4),
    }


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for each sampler and data set; None where half of the seeds or more did not arrive."""
    found = []
    for name, data in sorted({(row["sampler"], row["data"]) for row in rows}):
        mine = [row for row in rows if (row["sampler"], row["data"]) == (name, data)]
        counts = {str(share): [row["evaluations_to"][str(share)] or math.inf for row in mine] for share in SHARES}
        middle = {share: statistics.median(values) for share, values in counts.items()}
        found.append(
            {
                "sampler": name,
                "data": data,
                "seeds": len(mine),
                "limit": mine[0]["limit"],
                "median_evaluations_to": {k: None if math.isinf(v) else v for k, v in middle.items()},
                "arrived": {share: sum(map(math.isfinite, values)) for share, values in counts.items()},
                "cpu_s_per_proposal": round(statistics.median(row["cpu_s_per_proposal"] for row in mine), 4),
            }
        )
    return found


def main() -> None:
    """Measure what is missing of the table and print its medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_table", description=__doc__)
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--data", nargs="+", choices=["cifar10", "cifar100", "imagenet"], default=["cifar100"])
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 to 19, fewer of GP and APQ")
    parser.add_argument("--limit", type=int, default=4000, help="proposals after which a run ends")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "search_table.jsonl")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    done = {(row["sampler"], row["data"], row["seed"]) for row in rows}
    for seed in options.seeds or range(20):
        for data in options.data:
            for name in options.samplers:
                left_out = options.seeds is None and seed >= FEWER.get(name, 20)
                if (name, data, seed) in done or left_out:
                    continue
                row = measured(name, data, seed, min(options.limit, LIMITS.get(name, options.limit)))
                rows.append(row)
                with options.out.open("a") as log:
                    log.write(json.dumps(row) + "\n")
    for summary in medians(rows):
        print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
