"""Quantized evaluations that a predictor needs, with and without what full precision taught it."""

from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.trial import create_trial
from scipy.stats import spearmanr
from torch.nn import functional

from claims._training import arrays
from claims.search._apq_supernet import BITS, JOINT, PLAIN, logits, supernet
from netwright.search import SearchSpace, stack
from netwright.search.apq import APQSampler

PAPER = 50
CLAIM = (
    "On sub-networks of a supernet (channels, depth and bits of three stages; Fashion-MNIST at 14 x 14), APQSampler's "
    "predictor needs less than half of the quantized evaluations for the rank correlation of one from scratch after 80."
)
BETTER = "lower"
SEEDS = 5
COUNTS, ORDERS = (5, 10, 20, 30, 40, 60, 80), 3


def rows(drawn: list[dict[str, Any]]) -> NDArray[np.float64]:
    """Candidates as numbers, bits as indicators."""
    plain = [[float(params[name]) for name in PLAIN.decisions] for params in drawn]
    bits = [[float(params[name] == choice) for name in BITS for choice in (3, 4, 6, 8)] for params in drawn]
    return np.concatenate([plain, bits], axis=1)


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng = np.random.default_rng(seed)
    splits = arrays("fashion-mnist", seed=seed, train=4000, held_out=200 if smoke else 1000)
    train, val = ((functional.avg_pool2d(images, 2), labels) for images, labels in (splits.train, splits.val))
    weights = supernet(train, seed, 2 if smoke else 400)

    def measured(space: SearchSpace, count: int) -> tuple[list[dict[str, Any]], NDArray[np.float64]]:
        drawn = [space.sample(rng) for _ in range(count)]
        return drawn, np.array([float((logits(weights, p, val[0]).argmax(1) == val[1]).float().mean()) for p in drawn])

    cheap, pool = measured(PLAIN, 20 if smoke else 200), measured(JOINT, 80)
    unseen = measured(JOINT, 30 if smoke else 300)
    decisions = dict(JOINT.decisions)
    trials = [create_trial(params=p, distributions=decisions, value=score) for p, score in zip(*pool, strict=True)]
    samplers = [APQSampler(JOINT, list(BITS), known, seed=seed) for known in (list(zip(*cheap, strict=True)), [])]
    counts, found = COUNTS[:1] if smoke else COUNTS, {}
    for count in counts:
        correlations = []
        for _ in range(1 if smoke else ORDERS):
            index = rng.permutation(80)[:count]
            study = optuna.create_study(direction="maximize")
            study.add_trials([trials[place] for place in index])
            answers = [sampler.predict(study, unseen[0]) for sampler in samplers]
            answers.append(stack(rows(pool[0])[index], pool[1][index], seed=seed).predict(rows(unseen[0]))[0])
            correlations.append([spearmanr(answer, unseen[1])[0] for answer in answers])
        found[count] = np.nan_to_num(np.mean(correlations, axis=0))
    transferred, scratch, others = ({n: float(entry[place]) for n, entry in found.items()} for place in range(3))
    target = scratch[counts[-1]]

    def needed(curve: dict[int, float]) -> int:
        """The count from which on the target is met; beyond the last one: twice that."""
        below = [place for place, count in enumerate(counts) if curve[count] < target]
        return int([*counts, 2 * counts[-1]][max(below, default=-1) + 1])

    return {
        "method": needed(transferred),
        "baseline": needed(scratch) / 2,
        "others_from_scratch": needed(others),
        **{f"transferred_{count}": value for count, value in transferred.items()},
        **{f"scratch_{count}": value for count, value in scratch.items()},
    }
