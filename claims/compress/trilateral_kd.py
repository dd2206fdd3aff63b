"""Learned ratios against the best constant ratio between teacher and label, where labels are wrong."""

import dataclasses

import torch
from torch import nn
from torch.utils.data import TensorDataset

from claims._compress import task_of, trained
from netwright.compress.trilateral_kd import TrilateralKD
from netwright.core.builtin.networks import mlp
from netwright.core.data import Data
from netwright.core.evaluate import evaluate
from netwright.core.fit import fit
from netwright.core.task import Task

PAPER = 180
CLAIM = (
    "Where 40% of the labels of 10,000 Fashion-MNIST images are wrong (half of the classes are taken for another), a "
    "student 784-32-10 that learns a ratio between teacher and label for every item has a higher test accuracy than "
    "with the best of five constant ratios."
)
BETTER = "higher"
SEEDS = 5
RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)


def teacher_network() -> nn.Module:
    """784-256-10."""
    return nn.Sequential(nn.Flatten(), *mlp(784, (256,), 10))


def student_network() -> nn.Module:
    """784-32-10."""
    return nn.Sequential(nn.Flatten(), *mlp(784, (32,), 10))


def noisy(task: Task, seed: int, share: float = 0.4) -> Task:
    """The task with ``share`` of its training labels wrong: in each class the next class's, or, in every other, any."""
    train = task.data.train
    assert isinstance(train, TensorDataset)
    inputs, labels = train.tensors
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < share
    anything = torch.randint(0, 10, labels.shape, generator=generator)
    other = torch.where(labels % 2 == 0, (labels + 1) % 10, anything)
    spoilt = TensorDataset(inputs, torch.where(wrong, other, labels))
    return dataclasses.replace(task, data=Data(spoilt, task.data.val, task.data.test))


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = noisy(task_of(teacher_network, epochs=6, smoke=smoke), seed)
    teacher = trained(task, seed)
    student = dataclasses.replace(task, model=student_network)
    tried = []
    for ratio in RATIOS:
        assert task.recipe is not None
        recipe = task.recipe.replace(distill_weight=ratio)
        model = fit(student.build(seed), student, recipe, seed=seed, teacher=teacher, validate=False).model
        tried.append((evaluate(model, task, "val"), evaluate(model, task, "test"), ratio))
    best = max(tried, key=lambda entry: entry[0])
    ours = TrilateralKD("claims.compress.trilateral_kd:student_network")(teacher, student, seed=seed)
    return {
        "method": evaluate(ours, task, "test"),
        "baseline": best[1],
        "ratio": best[2],
        "teacher": evaluate(teacher, task, "test"),
    }
