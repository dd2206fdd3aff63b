"""The ranking of allocations of bits by orthogonality against their ranking by brute force, on a small network."""

import copy
import itertools

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from claims._compress import task_of, trained
from netwright.compress._calibrated import levels
from netwright.compress._quantizers import WeightQuantizer
from netwright.compress.ompq import OMPQ
from netwright.core.builtin.networks import mlp
from netwright.core.evaluate import predict
from netwright.core.task import Task

PAPER = 269
CLAIM = (
    "On digits, over all allocations of 2, 3 or 4 bits to the four layers of a network 64-32-32-32-10 that take 2.8 to "
    "3.2 bits per weight, the orthogonality objective has a positive rank correlation with the quality (less "
    "cross-entropy on the test split) that trying each of them shows."
)
BETTER = "higher"
SEEDS = 5


def network() -> nn.Module:
    """64-32-32-32-10."""
    return nn.Sequential(nn.Flatten(), *mlp(64, (32, 32, 32), 10))


def loss_of(model: nn.Module, bits: dict[str, int], task: Task) -> float:
    """Cross-entropy with every weight rounded to its bits."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in rounded.named_parameters():
            if name in bits:
                value.copy_(WeightQuantizer(value, 0, levels(bits[name])[0], per_channel=True).eval()(value))
    outputs, targets = predict(rounded, task, "test")
    return float(nn.functional.cross_entropy(outputs, targets))


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = task_of(network, data="digits", items=None, epochs=10, smoke=smoke)
    model = trained(task, seed)
    importance = OMPQ().importance(model, task, seed=seed)
    sizes = {name: model.get_parameter(name).numel() for name in importance}
    objectives, plain, losses = [], [], []
    for choice in itertools.product((2, 3, 4), repeat=len(importance)):
        bits = dict(zip(importance, choice, strict=True))
        average = sum(sizes[name] * bits[name] for name in bits) / sum(sizes.values())
        if 2.8 <= average <= 3.2:
            objectives.append(sum(importance[name] * bits[name] for name in bits))
            plain.append(sum(bits.values()))
            losses.append(loss_of(model, bits, task))
    return {
        "method": float(spearmanr(objectives, -np.array(losses)).statistic),
        "baseline": 0.0,
        "plain_sum_of_bits": float(spearmanr(plain, -np.array(losses)).statistic),
        "allocations": float(len(losses)),
    }
