"""How long saddles hold saddle-free Newton and gradient descent: a network started near zero, and known saddles."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD

from claims._training import arrays
from netwright.optim.saddle_free_newton import SaddleFreeNewton

PAPER = 72
CLAIM = (
    "Started near the saddle at zero of a deep autoencoder of 300 digits, saddle-free Newton brings the error down by "
    "a tenth in less than a tenth of the steps of gradient descent with the best of five learning rates (the method's "
    "number is ten times its steps; a step costs about 45 gradients)."
)
BETTER = "lower"

RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
SMALL_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
Problem = Callable[[], tuple[list[Tensor], Callable[[], Tensor]]]


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    images = arrays("digits", seed=seed, train=50 if smoke else 300).train[0].flatten(1)
    images = images - images.mean(0)
    most = 20 if smoke else 2000

    def network() -> tuple[list[Tensor], Callable[[], Tensor]]:
        torch.manual_seed(seed)
        sizes = ((64, 16), (16, 8), (8, 16), (16, 64))
        first, second, third, last = (nn.Linear(*size, bias=False) for size in sizes)
        model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third, nn.Tanh(), last)
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.1 * weight.shape[1] ** -0.5)
        return list(model.parameters()), lambda: mse_loss(model(images), images)

    generator = torch.Generator().manual_seed(seed)
    problems: dict[str, tuple[Problem, float, tuple[float, ...]]] = {
        "network": (network, 0.9 * float(images.square().mean()), RATES),
        "monkey": (_known(_monkey, generator), -1.0, SMALL_RATES),
        "strict": (_known(_strict, generator), -0.002, SMALL_RATES),
    }
    found = {}
    for name, (problem, left, rates) in problems.items():
        found[f"{name}_newton"] = float(_newton(problem, left, min(most, 200)))
        found[f"{name}_descent"] = float(min(_descent(problem, left, most, rate) for rate in rates))
    return {"method": 10 * found["network_newton"], "baseline": found["network_descent"], **found}


def _monkey(point: Tensor) -> Tensor:
    return point[0] ** 3 - 3 * point[0] * point[1] ** 2 + (point**4).sum() / 4


def _strict(point: Tensor) -> Tensor:
    return point[0] ** 2 / 2 + (point[1] ** 4 / 4 - point[1] ** 2 / 2) / 100


def _known(loss: Callable[[Tensor], Tensor], generator: torch.Generator) -> Problem:
    """A start a tenth away along the valley that leads to the saddle, and a little beside it."""
    start = torch.tensor([0.1, 1e-5 * (1 + float(torch.rand((), generator=generator)))])

    def build() -> tuple[list[Tensor], Callable[[], Tensor]]:
        point = start.clone().requires_grad_()
        return [point], lambda: loss(point)

    return build


def _newton(problem: Problem, left: float, most: int) -> int:
    """The first step after which the loss is below ``left``; ``most`` where none is."""
    params, loss = problem()
    optimizer = SaddleFreeNewton(params, subspace=20)
    return next((step for step in range(most) if float(optimizer.step(loss)) < left), most)


def _descent(problem: Problem, left: float, most: int, rate: float) -> int:
    params, loss = problem()
    optimizer = SGD(params, lr=rate)
    for step in range(most):
        optimizer.zero_grad()
        value = loss()
        if float(value.detach()) < left:
            return step
        torch.autograd.backward(value)
        optimizer.step()
    return most
