"""ReLUs needed for an accuracy: what DeepReDuce removes first, against the same share of every layer."""

import itertools
import math

import torch
from torch import Tensor, nn

from claims._compress import task_of, trained
from netwright.compress._batch_norms import thaw
from netwright.compress._relus import find_relus
from netwright.compress._training import train
from netwright.compress.deep_reduce import count_relus, relu_front
from netwright.compress.quantize import trace
from netwright.core.builtin.networks import ResNet
from netwright.core.evaluate import evaluate
from netwright.core.task import Task

PAPER = 167
CLAIM = (
    "A residual network on 10,000 Fashion-MNIST images of 14 x 14 needs at least three times fewer ReLUs for a "
    "validation accuracy within one point of the whole network's than when every layer loses the ReLUs of the same "
    "share of its channels (eight networks each, the same distillation; the number without order is interpolated)."
)
BETTER = "higher"
SEEDS = 3
WHY = (
    "Taking the ReLUs of layers by sensitivity needs a quarter more of them, on each seed, than taking the same "
    "share of channels in every layer."
)
SHARES = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.02)
EPOCHS = 3.0


def network() -> nn.Module:
    """Three basic blocks of 8, 16 and 32 channels at half resolution."""
    return nn.Sequential(nn.AvgPool2d(2), ResNet(1, 8, 10))


def partial_relu(x: Tensor, channels: int) -> Tensor:
    """A ReLU on the first channels only."""
    return torch.cat([x[:, :channels].relu(), x[:, channels:]], 1)


def uniform(model: nn.Module, task: Task, share: float, seed: int, epochs: float) -> tuple[int, float]:
    """ReLUs and validation accuracy when every layer keeps the ReLUs of ``share`` of its channels, at least one."""
    module = trace(model, task)
    thaw(module)
    count, layers = 0, {layer.name: layer for layer in find_relus(module, task)}
    for node in module.graph.nodes:
        if node.name in layers:
            channels = node.meta["val"].shape[1]
            kept = max(1, round(share * channels))
            count += layers[node.name].count * kept // channels
            node.target, node.args = partial_relu, (node.args[0], kept)
    module.recompile()
    fitted = train("uniform", module, task, epochs=epochs, seed=seed, teacher=model)
    return count, evaluate(fitted, task, "val")


def needed(points: list[tuple[int, float]], goal: float) -> float:
    """The number of ReLUs from which on accuracies reach ``goal``, between two networks by its logarithm."""
    points = sorted(points, reverse=True)
    for (more, better), (less, worse) in itertools.pairwise(points):
        if worse < goal:
            part = (better - goal) / (better - worse)
            return math.exp(math.log(more) + part * (math.log(less) - math.log(more)))
    return points[-1][0]


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    task = task_of(network, epochs=6, smoke=smoke)
    model = trained(task, seed)
    epochs = 0.2 if smoke else EPOCHS
    whole, total = evaluate(model, task, "val"), count_relus(model, task)
    front = list(relu_front(model, task, budget=epochs, seed=seed))
    ours = min((point for point in front if point.score >= whole - 0.01), key=lambda point: point.count)
    shares = SHARES[:1] if smoke else SHARES
    points = [(total, whole), *(uniform(model, task, share, seed, epochs) for share in shares)]
    theirs = needed(points, whole - 0.01)
    return {
        "method": theirs / ours.count,
        "baseline": 3.0,
        "relus": ours.count,
        "uniform_relus": theirs,
        "total": total,
        "whole": evaluate(model, task, "test"),
        "accuracy": evaluate(ours.model, task, "test"),
    }
