"""U-DoG as it comes against SGD with a tuned learning rate on convex problems, and its rate on a quadratic."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from claims._training import Arrays, Loss, arrays, batches, clone, diabetes, full_loss
from netwright.optim.dog import DoG
from netwright.optim.udog import UDoG

PAPER = 103
CLAIM = (
    "Without a step size U-DoG comes within 10% of the test loss of SGD, whose learning rate is the best of nine and "
    "whose iterates are averaged where that helps, at as many gradients: geometric mean over four convex problems of "
    "the ratio of losses below 1.1."
)
BETTER = "lower"
SEEDS = 8

Optimizer = torch.optim.SGD | UDoG | DoG


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    gradients, steps = (30, 40) if smoke else (600, 500)
    rates = [1e-2, 1e-1] if smoke else [10 ** (-3 + place / 2) for place in range(9)]
    found: dict[str, float] = {}
    for name, data, outputs, loss in _problems(seed, 200 if smoke else 4000):
        tried = []
        for rate in rates:
            models = _trained(partial(torch.optim.SGD, lr=rate), data, outputs, loss, gradients, seed)
            tried += [(full_loss(model, data.val, loss), full_loss(model, data.test, loss)) for model in models]
        found[f"{name}_sgd"] = min(tried)[1]
        found[f"{name}_udog"] = full_loss(_trained(UDoG, data, outputs, loss, gradients, seed)[0], data.test, loss)
    names = [name.removesuffix("_sgd") for name in found if name.endswith("_sgd")]
    ratio = math.exp(sum(math.log(found[f"{name}_udog"] / found[f"{name}_sgd"]) for name in names) / len(names))
    slopes = {"slope_udog": _slope(UDoG, steps), "slope_dog": _slope(DoG, 2 * steps)}
    slopes["slope_descent"] = _slope(partial(torch.optim.SGD, lr=1.0), 2 * steps)
    return {"method": ratio, "baseline": 1.1, **found, **slopes}


def _problems(seed: int, count: int) -> Iterator[tuple[str, Arrays, int, Loss]]:
    for name, data, classes in (
        ("digits", arrays("digits", seed=seed), 10),
        ("fashion", arrays("fashion-mnist", seed=seed, train=count, held_out=1000), 10),
        ("cancer", arrays("breast-cancer", seed=seed), 2),
    ):
        yield (
            name,
            Arrays(*((inputs.flatten(1), targets) for inputs, targets in data)),
            classes,
            functional.cross_entropy,
        )
    yield "diabetes", diabetes(seed), 1, functional.mse_loss


def _trained(
    make: Callable[..., Optimizer], data: Arrays, outputs: int, loss: Loss, gradients: int, seed: int
) -> list[nn.Module]:
    """A linear model after so many gradients, and for SGD also the polynomial average that goes with DoG."""
    inputs, targets = data.train
    model = nn.Linear(inputs.shape[1], outputs)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = make(model.parameters())
    averaged = clone(model)
    draw = iter(batches(len(targets), 64, gradients, seed))

    def closure() -> Tensor:
        index = next(draw)
        optimizer.zero_grad()
        value = loss(model(inputs[index]), targets[index])
        torch.autograd.backward(value)
        return value

    step: Callable[..., object] = optimizer.step
    if isinstance(optimizer, UDoG):
        for _ in range(gradients // 2):
            step(closure)
        return [model]
    for count in range(gradients):
        step(closure)
        with torch.no_grad():
            for average, new in zip(averaged.parameters(), model.parameters(), strict=True):
                average.lerp_(new, 9 / (count + 9))
    return [model, averaged]


def _slope(make: Callable[..., Optimizer], steps: int, size: int = 400) -> float:
    """Least-squares slope of log error against log step, over the last half, on a smooth quadratic."""
    curvature = (torch.arange(1.0, size + 1, dtype=torch.float64) / size) ** 4
    x = nn.Parameter(torch.zeros(size, dtype=torch.float64))
    optimizer = make([x])

    def error() -> float:
        return float((curvature * (x.detach() - 1) ** 2).sum() / 2)

    def closure() -> Tensor:
        x.grad = curvature * (x.detach() - 1)
        return torch.tensor(error())

    step: Callable[..., object] = optimizer.step
    errors = []
    for _ in range(steps):
        step(closure)
        errors.append(error())
    first = steps // 2
    return float(np.polyfit(np.log(np.arange(first, steps) + 1), np.log(errors[first:]), 1)[0])
