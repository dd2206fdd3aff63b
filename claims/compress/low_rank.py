"""Ranks shared out by effective rank against one fixed share of every layer's rank."""

from typing import get_args

from torch import nn

from claims._compress import lenet_300_100, task_of, trained
from netwright.compress.low_rank import LowRank, Metric, Rule
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.task import Task

PAPER = 64
CLAIM = (
    "Factorizing LeNet-300-100 on Fashion-MNIST at 7% of its operations, without training, ranks shared out by "
    "effective rank keep more test accuracy than the same share of every layer's rank."
)
BETTER = "higher"
SEEDS = 5
_RATIO = 0.93
_RECOVERY = 1.0  # epochs, for the numbers after recovery


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = task_of(lenet_300_100, epochs=6.0, smoke=smoke)
    model = trained(task, seed)
    effective, uniform = _best(model, task, "effective", seed), _best(model, task, "uniform", seed)
    return {
        "method": evaluate(effective, task, "test"),
        "baseline": evaluate(uniform, task, "test"),
        "whole": evaluate(model, task, "test"),
        "method_recovered": _recovered(effective, model, task, seed),
        "baseline_recovered": _recovered(uniform, model, task, seed),
    }


def _best(model: nn.Module, task: Task, rule: Rule, seed: int) -> nn.Module:
    """The best on validation of two settings that both rules get."""
    found = [LowRank(_RATIO, rule=rule, metric=metric)(model, task, seed=seed) for metric in get_args(Metric)]
    return max(found, key=lambda candidate: evaluate(candidate, task, "val"))


def _recovered(model: nn.Module, teacher: nn.Module, task: Task, seed: int) -> float:
    recipe = (task.recipe or Recipe()).replace(epochs=min(_RECOVERY, (task.recipe or Recipe()).epochs)).scaled(0.3)
    result = fit(model, task, recipe, seed=seed, teacher=teacher, device="cpu", validate=False).model
    return evaluate(result, task, "test")
