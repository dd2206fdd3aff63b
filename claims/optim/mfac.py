"""M-FAC against SGD with momentum and Adam: final training loss at equal epochs, and how its cost grows."""

import functools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from claims._training import Arrays, accuracy, arrays, best, descend, full_loss, resnet
from netwright.optim.mfac import MFAC

PAPER = 14
CLAIM = (
    "Training a small residual network on digits for 4 epochs, M-FAC with 128 gradients ends at a lower training loss "
    "than the better of SGD with momentum and Adam, each with the best of four learning rates by that loss, in the "
    "geometric mean (figures are binary logarithms)."
)
BETTER = "lower"
SEEDS = 20

Make = Callable[..., Optimizer]
METHODS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "mfac": (functools.partial(MFAC, window=128, damping=1e-2), (0.01, 0.03, 0.1, 0.3)),
    "sgd": (functools.partial(SGD, momentum=0.9), (0.03, 0.1, 0.3, 1.0)),
    "adam": (Adam, (3e-3, 1e-2, 3e-2, 1e-1)),
}


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    data = arrays("digits", seed=seed, train=192 if smoke else None)
    found: dict[str, float] = {}
    for name, (make, rates) in METHODS.items():
        lr, model = _tuned(make, rates[:1] if smoke else rates, data, 1 if smoke else 4, seed)
        found[f"{name}_lr"] = lr
        found[f"{name}_test"] = full_loss(model, data.test, cross_entropy)
        found[f"{name}_train"] = full_loss(model, data.train, cross_entropy)
        found[f"{name}_accuracy"] = accuracy(model, data.test)
    rival = min(found["sgd_train"], found["adam_train"])
    growth = _growth(10_000 if smoke else 100_000)
    logarithms = {"method": math.log2(found["mfac_train"]), "baseline": math.log2(rival)}
    return {**logarithms, **found, "cost_4d_over_4_cost_d": growth}


def _tuned(make: Make, rates: tuple[float, ...], data: Arrays, epochs: int, seed: int) -> tuple[float, nn.Module]:
    models = {lr: _trained(functools.partial(make, lr=lr), data, epochs, seed) for lr in rates}
    lr = best(rates, lambda lr: full_loss(models[lr], data.train, cross_entropy))
    return lr, models[lr]


def _trained(make: Make, data: Arrays, epochs: int, seed: int) -> nn.Module:
    model = resnet(seed, width=8)
    optimizer = make(model.parameters())
    steps = epochs * (len(data.train[1]) // 64)
    schedule = CosineAnnealingLR(optimizer, steps)
    descend(model, optimizer, data.train, cross_entropy, steps=steps, batch=64, seed=seed, schedule=schedule)
    return model


def _growth(size: int) -> float:
    """How much a step costs with four times the parameters, over four: 1 where cost is linear; interleaved."""
    optimizers = [MFAC([_with_grad(size * factor)]) for factor in (1, 4)]
    fastest = [float("inf"), float("inf")]
    for _ in range(8):
        for place, optimizer in enumerate(optimizers):
            start = time.perf_counter()
            optimizer.step()
            fastest[place] = min(fastest[place], time.perf_counter() - start)
    return fastest[1] / (4 * fastest[0])


def _with_grad(size: int) -> Tensor:
    param = torch.zeros(size, requires_grad=True)
    param.grad = torch.ones(size)
    return param
