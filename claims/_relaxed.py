"""What claims about relaxed searches share: a cell space on handwritten digits, and the worth of what is derived."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import NamedTuple

from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.task import Task, load_task
from netwright.search._relaxed_search import RelaxedSearch
from netwright.search.relaxed import derive
from netwright.search.relaxed_cells import cell_network

_TRAININGS = 3


class Found(NamedTuple):
    """The best of several settings: its accuracies, share of edges without weights, processor seconds of its search."""

    val: float
    test: float
    idle: float
    seconds: float


def digits() -> Task:
    """Digits with a super-network of two stages: a cell of 8 channels on 8x8 pixels, one of 16 on 4x4."""
    base = load_task("digits")
    network = partial(cell_network, 1, 10, width=8)
    return Task("digits", network, base.data, base.loss, base.score)


def worth(task: Task, choices: Mapping[str, str], seed: int, epochs: float) -> tuple[float, float]:
    """Accuracy on val and test of an architecture trained from the start, the mean of three trainings."""
    settings = {"lr": 5e-3}
    recipe = Recipe(epochs=epochs, optimizer_settings=settings, schedule_settings={"max_lr": 5e-3}, batch_size=64)
    scores = []
    for number in range(_TRAININGS):
        network = derive(task.build(1000 * seed + number), choices)
        fit(network, task, recipe, seed=1000 * seed + number, device="cpu", validate=False)
        scores.append((evaluate(network, task, "val"), evaluate(network, task, "test")))
    return fmean(val for val, _ in scores), fmean(test for _, test in scores)


def searched(
    task: Task, make: Callable[[float], RelaxedSearch], rates: Sequence[float], seed: int, epochs: float
) -> Found:
    """A search with each rate of the alphas; the derived network that does best on val after training is kept."""
    tried = []
    for rate in rates:
        start = time.process_time()
        result = make(rate).search(task.build(seed), task, seed=seed)
        seconds = time.process_time() - start
        idle = fmean(not kind.startswith("conv") for kind in result.choices.values())
        tried.append(Found(*worth(task, result.choices, seed, epochs), idle, seconds))
    return max(tried, key=lambda found: found.val)
