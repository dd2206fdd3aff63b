"""Widths learned by gates under a budget of multiply-accumulates against the same share cut from every layer."""

import bisect

from torch import nn

from claims._compress import small_cnn, task_of, trained
from netwright.compress.prune import Prune, Saliency
from netwright.compress.trainable_gate import TrainableGate
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.graph import export_model
from netwright.core.graph.macs import total_macs
from netwright.core.task import Task

PAPER = 162
CLAIM = (
    "A small convolutional network on 5,000 Fashion-MNIST images, cut to a tenth of its multiply-accumulates by gates "
    "that are learned with the weights, has a higher test accuracy than with the same share of the channels cut from "
    "every layer and trained for as many epochs with the same teacher (two settings each, chosen on val)."
)
BETTER = "higher"
SEEDS = 5
MACS = 0.1
EPOCHS = 6.0


def cost(model: nn.Module, task: Task) -> int:
    return total_macs(export_model(model, task.example()))


def uniform(model: nn.Module, task: Task, saliency: Saliency, seed: int) -> nn.Module:
    """The same ratio in every layer, the smallest of a fine grid that meets the budget: costs fall along it."""
    limit = MACS * cost(model, task)

    def cut(step: int) -> nn.Module:
        return Prune(step / 64, saliency=saliency)(model, task, seed=seed)

    first = bisect.bisect_left(range(1, 63), True, key=lambda step: cost(cut(step), task) <= limit) + 1
    return fit(cut(first), task, seed=seed, teacher=model, validate=False).model


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = task_of(small_cnn, items=5000, epochs=EPOCHS, smoke=smoke)
    dense = trained(task, seed)
    tried = {
        "baseline": [uniform(dense, task, saliency, seed) for saliency in ("magnitude", "taylor")],
        "method": [TrainableGate(MACS, search=search, round_to=1)(dense, task, seed=seed) for search in (0.2, 0.4)],
    }
    found = {"dense": evaluate(dense, task, "test")}
    for name, models in tried.items():
        scores = [evaluate(model, task, "val") for model in models]
        best = models[scores.index(max(scores))]
        found[name] = evaluate(best, task, "test")
        found[f"{name} macs"] = cost(best, task) / cost(dense, task)
        found[f"{name} setting"] = scores.index(max(scores))
    return found
