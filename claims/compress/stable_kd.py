"""Distillation block by block against end to end in twice the steps."""

import dataclasses

from torch import nn

from claims._compress import task_of, trained
from netwright.compress.stable_kd import StableKD
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.task import Task

PAPER = 73
CLAIM = (
    "A student of nine hidden layers of 64 units without normalization learns Fashion-MNIST (6,000 images) from a "
    "teacher of three with batch norm to a higher test accuracy in 2 epochs block by block than in 4 end to end, the "
    "better of three learning rates for each."
)
BETTER = "higher"
SEEDS = 5
RATES = (1e-3, 3e-3, 1e-2)
AT = (("1", "1"), ("2", "2"), ("3", "3"))


def block(given: int, units: int, layers: int, norm: bool) -> nn.Module:
    """Linear layers, each with batch norm where wanted, and ReLU."""
    parts: list[nn.Module] = []
    for layer in range(layers):
        parts += [nn.Linear(units if layer else given, units), *([nn.BatchNorm1d(units)] if norm else []), nn.ReLU()]
    return nn.Sequential(*parts)


def network(layers: int, norm: bool) -> nn.Module:
    """Three blocks of ``layers`` layers of 64 units."""
    blocks = (block(784 if not place else 64, 64, layers, norm) for place in range(3))
    return nn.Sequential(nn.Flatten(), *blocks, nn.Linear(64, 10))


def teacher_network() -> nn.Module:
    """Three hidden layers with batch norm."""
    return network(1, norm=True)


def student_network() -> nn.Module:
    """Nine hidden layers without."""
    return network(3, norm=False)


def best(teacher: nn.Module, task: Task, seed: int, epochs: float, *, apart: bool) -> float:
    """Test accuracy of the student with the learning rate that does best on the validation split."""
    tried = []
    for rate in RATES:
        settings = {"optimizer_settings": {"lr": rate}, "schedule_settings": {"max_lr": rate}, "epochs": epochs}
        assert task.recipe is not None
        recipe = task.recipe.replace(**settings)
        own = dataclasses.replace(task, recipe=recipe)
        if apart:
            model = StableKD("claims.compress.stable_kd:student_network", at=AT)(teacher, own, seed=seed)
        else:
            model = fit(own.build(seed), own, seed=seed, teacher=teacher, validate=False).model
        tried.append((evaluate(model, own, "val"), evaluate(model, own, "test")))
    return max(tried, key=lambda entry: entry[0])[1]


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = task_of(teacher_network, items=6000, epochs=6, smoke=smoke)
    teacher = trained(task, seed)
    assert task.recipe is not None
    recipe = task.recipe.replace(distill_weight=0.5, distill_temperature=4.0)
    student = dataclasses.replace(task, model=student_network, recipe=recipe)
    scale = 0.1 if smoke else 1.0
    return {
        "method": best(teacher, student, seed, 2 * scale, apart=True),
        "baseline": best(teacher, student, seed, 4 * scale, apart=False),
        "teacher": evaluate(teacher, task, "test"),
    }
