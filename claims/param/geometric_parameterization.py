"""Boundaries of ReLU units under geometric parameterization against weight normalization, while they learn."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from claims._training import descend, diabetes, full_loss
from netwright.param.geometric_parameterization import geometric_parameterization

PAPER = 196
CLAIM = (
    "While a ReLU network learns the diabetes data by Adam at a learning rate of 0.01, the boundary of the unit that "
    "turns furthest in a step turns less far under geometric parameterization than under weight normalization."
)
BETTER = "lower"
RATES = (0.1, 0.2, 0.4, 0.8, 1.6)


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    steps = 10 if smoke else 100
    gmp, baseline, plain = (train(seed, steps, kind, 0.01) for kind in ("gmp", "weight_norm", "plain"))
    result = {"method": gmp[0], "baseline": baseline[0], "turn_plain": plain[0]}
    result |= {"loss_method": gmp[1], "loss_baseline": baseline[1], "loss_plain": plain[1]}
    for kind in ("gmp", "weight_norm", "plain"):  # the largest rate after which half of the variance is explained
        trained = [rate for rate in RATES[: 1 if smoke else None] if train(seed, steps, kind, rate)[1] < 0.5]
        result[f"largest_rate_{kind}"] = max(trained, default=0.0)
    return result


def train(seed: int, steps: int, kind: str, rate: float) -> tuple[float, float]:
    """The mean over steps of the largest turn of a boundary, in radians, and the final training error."""
    torch.manual_seed(seed)
    data = diabetes(seed)
    hidden = nn.Linear(10, 100)
    nn.init.xavier_uniform_(hidden.weight)
    nn.init.zeros_(hidden.bias)
    if kind == "gmp":
        geometric_parameterization(hidden)
    elif kind == "weight_norm":
        weight_norm(hidden)
    model = nn.Sequential(hidden, nn.ReLU(), nn.Linear(100, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    places = [hidden.weight.detach().clone()]
    descend(
        model,
        optimizer,
        data.train,
        functional.mse_loss,
        steps=steps,
        batch=64,
        seed=seed,
        after_step=lambda step: places.append(hidden.weight.detach().clone()),
    )
    turns = [float(turn(before, after).max()) for before, after in pairwise(places)]
    return sum(turns) / len(turns), full_loss(model, data.train, functional.mse_loss)


def turn(first: Tensor, second: Tensor) -> Tensor:
    """The angle between the hyperplanes that rows are normal to, in [0, pi / 2]; 0 where it is not finite."""
    first, second = (functional.normalize(rows, dim=1) for rows in (first, second))
    near, far = (first - second).norm(dim=1), (first + second).norm(dim=1)
    return (2 * torch.atan2(torch.minimum(near, far), torch.maximum(near, far))).nan_to_num(0.0)
