"""What an integer programme over hardware leaves of a joint space of networks, bits and hardware, and what it keeps."""

import copy
import itertools
from dataclasses import replace

import numpy as np
import torch
from optuna.distributions import CategoricalDistribution
from torch import nn
from torch.nn import functional

from claims._training import Arrays, accuracy, arrays, descend
from claims.search._hao_joint import latencies
from netwright.search import SearchSpace
from netwright.search.hao import Convolution, Device, HAOMapper, convolutions

PAPER = 109
CLAIM = (
    "HAOMapper prunes more than 90% of the joint space of networks, bits and fitting hardware: of each network it "
    "keeps the fastest mapping, and of the networks just those that exhaustive search finds within the latency limit; "
    "so what is left holds the optimum, the best validation accuracy on Fashion-MNIST within that limit."
)
BETTER = "higher"
CHOICES = {"first": (8, 16), "second": (16, 32), "depth": (1, 2), "separable": (0, 1), "bits": (3, 4, 8)}
UNROLLS, ROWS = (1, 2, 4, 8, 16), (1, 4, 14)


def network(first: int, second: int, depth: int, separable: int) -> nn.Module:
    """A small network for 14 x 14 images, with full or depthwise separable convolutions."""
    layers: list[nn.Module] = [nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU()]
    for stride, width in ((2, first), (1, second))[:depth]:
        groups, inner = (width, width) if separable else (1, second)
        layers += [nn.Conv2d(width, inner, 3, stride, 1, groups=groups)]
        layers += [nn.Conv2d(width, second, 1)] if separable else []
        layers += [nn.BatchNorm2d(second), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(second, 10))


def rounded(model: nn.Module, bits: int) -> nn.Module:
    """A copy with the weights of each layer rounded to ``bits``."""
    found = copy.deepcopy(model)
    for weight in (parameter for parameter in found.parameters() if parameter.ndim > 1):
        step = weight.data.abs().max() / (2 ** (bits - 1) - 1)
        weight.data = torch.round(weight.data / step) * step
    return found


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    device = Device(int(rng.integers(16, 64)), float(rng.uniform(8, 32)), float(rng.uniform(0.2, 1.0)))
    mapper, splits = HAOMapper(device, UNROLLS, ROWS), arrays("fashion-mnist", seed=seed, train=2000, held_out=2000)
    data = Arrays(*((functional.avg_pool2d(images, 2), labels) for images, labels in splits))
    choices = {name: values[-1:] if smoke and name != "bits" else values for name, values in CHOICES.items()}
    known: dict[tuple[int, ...], tuple[float, list[Convolution]]] = {}
    for first, second, depth, separable in itertools.product(*list(choices.values())[:-1]):
        torch.manual_seed(seed)
        model = network(first, second, depth, separable)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        descend(model, optimizer, data.train, functional.cross_entropy, steps=3 if smoke else 120, batch=64, seed=seed)
        layers = convolutions(model, data.train[0][:2])
        for bits in choices["bits"]:
            score = accuracy(rounded(model, bits), data.val)
            known[first, second, depth, separable, bits] = score, [replace(layer, bits=bits) for layer in layers]
    joint = {key: latencies(layers, mapper) for key, (_, layers) in known.items()}
    limit = 1.001 * float(np.median([found.min() for found in joint.values()]))
    optimum = max((known[key][0], -found.min()) for key, found in joint.items() if found.min() <= limit)
    space = SearchSpace({name: CategoricalDistribution(values) for name, values in choices.items()})
    left = mapper.restrict(space, lambda params: known[tuple(params[name] for name in choices)][1], limit)
    kept = [key for key in known if left.valid(dict(zip(choices, key, strict=True)))]
    found = max((known[key][0], -mapper.map(known[key][1]).latency_ms) for key in kept)
    points = sum(map(len, joint.values()))
    same = kept == [key for key in known if joint[key].min() <= limit] and np.allclose(found, optimum, rtol=1e-9)
    return {
        "method": (1 - len(kept) / points) if same else 0.0,
        "baseline": 0.9,
        "joint_points": points,
        "networks": len(known),
        "networks_left": len(kept),
        "limit_ms": limit,
    }
