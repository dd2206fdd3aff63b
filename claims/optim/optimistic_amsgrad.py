"""Steps that optimistic AMSGrad needs, against AMSGrad at an equally tuned learning rate."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer

from claims._training import arrays, best, descend, steps_to
from netwright.optim.optimistic_amsgrad import OptimisticAMSGrad

PAPER = 65
CLAIM = (
    "A two-layer network on digits reaches a training loss of 0.1 in fewer steps with optimistic AMSGrad than with "
    "AMSGrad, each with the best of nine learning rates (mean over five starts)."
)
BETTER = "lower"

Make = Callable[[list[nn.Parameter], float], Optimizer]


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    inputs, targets = arrays("digits", seed=seed).train
    rates = [1e-2, 1e-1] if smoke else [10 ** (-3 + place / 4) for place in range(9)]
    limit, starts = (40, 1) if smoke else (150, 5)

    def steps(make: Make, rate: float, start: int) -> int:
        torch.manual_seed(start)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = make(list(network.parameters()), rate)
        losses = descend(
            network, optimizer, (inputs, targets), functional.cross_entropy, steps=limit, batch=64, seed=start
        )
        return steps_to(losses, 0.1)

    def tuned(make: Make) -> tuple[float, float]:
        """The learning rate that is best on starts of its own, and the mean number of steps on others with it."""
        rate = best(rates, lambda rate: sum(steps(make, rate, 1000 * seed + 500 + place) for place in range(starts)))
        return sum(steps(make, rate, 1000 * seed + place) for place in range(starts)) / starts, rate

    method, method_rate = tuned(lambda params, rate: OptimisticAMSGrad(params, lr=rate))
    baseline, baseline_rate = tuned(lambda params, rate: torch.optim.Adam(params, lr=rate, amsgrad=True))
    return {"method": method, "baseline": baseline, "method_lr": method_rate, "baseline_lr": baseline_rate}
