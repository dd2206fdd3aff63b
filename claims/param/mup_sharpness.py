"""muP: the sharpness that training reaches is the same at every width."""

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from claims._training import arrays
from netwright.param.mup import mup

Data: TypeAlias = tuple[Tensor, Tensor]

PAPER = 137
CLAIM = (
    "On digits, after 20 to 60 steps of full-batch training, the sharpness of an MLP with two hidden layers of 32 to "
    "512 units varies less with width (largest difference of its logarithm to base 2) than in the NTK parameterization."
)
BETTER = "lower"

BASE = 32
WIDTHS = (32, 128, 512)
LR = 0.1
TIMES = (20, 40, 60)


def network(width: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    for name, param in model.named_parameters():
        nn.init.zeros_(param) if "bias" in name else nn.init.kaiming_normal_(param)
    return model


def ntk(model: nn.Module, width: int) -> list[dict[str, Any]]:
    """Learning rates of the NTK parameterization: those of weights behind a hidden layer fall with the width."""
    params = list(model.parameters())
    return [
        {"params": params[2:5:2], "lr": LR * BASE / width},
        {"params": [params[0], *params[1::2]], "lr": LR},
    ]


def sharpness(model: nn.Module, groups: list[dict[str, Any]], data: Data, iterations: int) -> float:
    """Largest eigenvalue of the Hessian in units of the learning rate, by power iteration.

    Parameters with a learning rate of their own are rescaled so that all would share one.
    """
    params = [param for group in groups for param in group["params"]]
    roots = [math.sqrt(group["lr"] / LR) for group in groups for _ in group["params"]]
    loss = nn.functional.cross_entropy(model(data[0]), data[1])
    grads = torch.autograd.grad(loss, params, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(param.shape, generator=generator) for param in params]
    value = 0.0
    for _ in range(iterations):
        length = math.sqrt(sum(float(part.square().sum()) for part in vector))
        vector = [part / length for part in vector]
        terms = [(grad * part).sum() * root for grad, part, root in zip(grads, vector, roots, strict=True)]
        found = torch.autograd.grad(torch.stack(terms).sum(), params, retain_graph=True)
        product = [part * root for part, root in zip(found, roots, strict=True)]
        value = sum(float((a * b).sum()) for a, b in zip(product, vector, strict=True))
        vector = product
    return value


def sharpnesses(width: int, maximal: bool, data: Data, seed: int, smoke: bool) -> list[float]:
    """At each of the times, during gradient descent with one learning rate for all widths."""
    torch.manual_seed(seed)
    model = network(width)
    groups = mup(model, network(BASE), optimizer="sgd", lr=LR) if maximal else ntk(model, width)
    optimizer = torch.optim.SGD(groups)
    found = []
    for step in range(1, max(TIMES) + 1):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(data[0]), data[1]))
        optimizer.step()
        if step in TIMES:
            found.append(sharpness(model, groups, data, 3 if smoke else 20))
    return found


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    inputs, targets = arrays("digits", seed=seed, train=64 if smoke else 512).train
    inputs = inputs.flatten(1)
    data = (inputs - inputs.mean(0)) / (inputs.std(0) + 0.01), targets
    result = {}
    for name, maximal in (("method", True), ("baseline", False)):
        widths = [sharpnesses(width, maximal, data, seed, smoke) for width in ((32, 64) if smoke else WIDTHS)]
        spreads = [max(map(math.log2, entry)) - min(map(math.log2, entry)) for entry in zip(*widths, strict=True)]
        result[name] = sum(spreads) / len(spreads)
        result |= {f"{name}_narrowest": widths[0][-1], f"{name}_widest": widths[-1][-1]}
    return result
