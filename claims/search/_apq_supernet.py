"""Sub-networks of one trained network: three stages with channels, depth and bits of their own."""

import itertools

import numpy as np
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from torch import Tensor
from torch.nn import functional

from claims._training import batches
from netwright.search.space import Params, SearchSpace

__all__ = ["BITS", "JOINT", "PLAIN", "logits", "supernet"]

WIDTHS: dict[str, BaseDistribution] = {f"width{stage}": IntDistribution(4, 16, step=4) for stage in range(3)}
DEPTHS: dict[str, BaseDistribution] = {f"depth{stage}": IntDistribution(1, 2) for stage in range(3)}
BITS: dict[str, BaseDistribution] = {f"bits{stage}": CategoricalDistribution((3, 4, 6, 8)) for stage in range(3)}
PLAIN, JOINT = SearchSpace(WIDTHS | DEPTHS), SearchSpace(WIDTHS | DEPTHS | BITS)


def logits(weights: dict[str, Tensor], params: Params, x: Tensor) -> Tensor:
    """A sub-network: the first channels of the first layers of each stage, weights rounded where bits are given."""
    for stage, layer in itertools.product(range(3), range(2)):
        if layer >= params[f"depth{stage}"]:
            continue
        kernel = weights[f"{stage}{layer}"][: params[f"width{stage}"], : x.shape[1]]
        if f"bits{stage}" in params:
            step = kernel.abs().max() / (2 ** (params[f"bits{stage}"] - 1) - 1)
            kernel = torch.round(kernel / step) * step
        stride = 2 if stage and not layer else 1
        y = functional.relu(functional.group_norm(functional.conv2d(x, kernel, padding=1, stride=stride), 1))
        x = x + y if layer else y
    return x.mean((2, 3)) @ weights["head"][: x.shape[1]]


def supernet(data: tuple[Tensor, Tensor], seed: int, steps: int) -> dict[str, Tensor]:
    """Weights shared by all sub-networks, trained on the largest and two random ones in every step."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    weights = {"head": torch.randn(16, 10, generator=generator) / 4}
    for name in ("00", "01", "10", "11", "20", "21"):
        fan_in = 1 if name == "00" else 16
        weights[name] = torch.randn(16, fan_in, 3, 3, generator=generator) * (2 / (9 * fan_in)) ** 0.5
    largest = {**dict.fromkeys(WIDTHS, 16), **dict.fromkeys(DEPTHS, 2)}
    optimizer = torch.optim.Adam([weight.requires_grad_() for weight in weights.values()], lr=5e-3)
    for index in batches(len(data[1]), 64, steps, seed):
        optimizer.zero_grad()
        for params in (largest, PLAIN.sample(rng), PLAIN.sample(rng)):
            loss = functional.cross_entropy(logits(weights, params, data[0][index]), data[1][index])
            torch.autograd.backward(loss)
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}
