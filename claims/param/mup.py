"""muP: the best learning rate of SGD, Adam, K-FAC and Shampoo stays where it is while the width grows."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from claims._training import arrays, descend, full_loss
from netwright.optim.kfac import KFAC
from netwright.optim.shampoo import Shampoo
from netwright.param.mup import mup

Name: TypeAlias = Literal["sgd", "adam", "kfac", "shampoo"]
Data: TypeAlias = tuple[Tensor, Tensor]

PAPER = 138
CLAIM = (
    "On digits, while an MLP with two hidden layers grows from 32 to 512 units, the best learning rates of K-FAC and "
    "of Shampoo move by fewer steps of a grid of factor 2 than in the standard parameterization, on average over both "
    "(SGD and Adam beside)."
)
BETTER = "lower"
SEEDS = 6
JUDGED: tuple[Name, ...] = ("kfac", "shampoo")

BASE = 32
WIDTHS = (32, 128, 512)
STEPS = 24
# The grids are centred on the base width, where both parameterizations are the same.
CENTRES: Mapping[Name, float] = {"sgd": 1.6, "adam": 1.6e-2, "kfac": 0.1, "shampoo": 0.4}
REACH = (-3, 3)
DAMPINGS: Mapping[Name, float | None] = {"sgd": None, "adam": 1e-8, "kfac": 1e-2, "shampoo": 0.1}
MAKERS: Mapping[Name, Callable[[Any, nn.Module], Optimizer]] = {
    "sgd": lambda groups, model: torch.optim.SGD(groups, momentum=0.0),
    "adam": lambda groups, model: torch.optim.Adam(groups),
    "kfac": lambda groups, model: KFAC(groups, model, momentum=0.0, kl_clip=None),
    "shampoo": lambda groups, model: Shampoo(groups, momentum=0.0, precondition_every=STEPS),
}


def network(width: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    for name, param in model.named_parameters():
        nn.init.zeros_(param) if "bias" in name else nn.init.kaiming_normal_(param)
    return model


def final_loss(name: Name, width: int, lr: float, maximal: bool, data: Data, seed: int, steps: int) -> float:
    """The training loss in the end; by muP, or with the base's settings at every width."""
    torch.manual_seed(seed)
    model = network(width)
    groups = mup(model, network(BASE) if maximal else model, optimizer=name, lr=lr, damping=DAMPINGS[name])
    descend(model, MAKERS[name](groups, model), data, nn.functional.cross_entropy, steps=steps, batch=128, seed=seed)
    return min(full_loss(model, data, nn.functional.cross_entropy), 10.0)


def movement(name: Name, maximal: bool, data: Data, seed: int, smoke: bool) -> int:
    """How many grid steps lie between the lowest and the highest best learning rate over the widths."""
    best = []
    for width in (32, 48) if smoke else WIDTHS:
        losses = {
            place: final_loss(name, width, CENTRES[name] * 2.0**place, maximal, data, seed, 3 if smoke else STEPS)
            for place in (range(-1, 1) if smoke else range(*REACH))
        }
        best.append(min(losses, key=losses.__getitem__))
    return max(best) - min(best)


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    inputs, targets = arrays("digits").train
    inputs = inputs.flatten(1)
    data = (inputs - inputs.mean(0)) / (inputs.std(0) + 0.01), targets
    moved = {
        f"{kind}_{name}": float(movement(name, kind == "mup", data, seed, smoke))
        for kind in ("mup", "standard")
        for name in CENTRES
    }
    means = {kind: sum(moved[f"{kind}_{name}"] for name in JUDGED) / len(JUDGED) for kind in ("mup", "standard")}
    return {"method": means["mup"], "baseline": means["standard"], **moved}
