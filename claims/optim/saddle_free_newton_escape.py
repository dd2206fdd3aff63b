"""How long saddles hold saddle-free Newton and gradient descent: known saddles, and a network started near zero."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD

from claims._training import arrays
from netwright.optim.saddle_free_newton import SaddleFreeNewton

PAPER = 72
CLAIM = (
    "A saddle in ten dimensions, of curvatures 0.1 to 1 and of -0.01 along one direction at random, holds gradient "
    "descent with the best of seven learning rates more than ten times as many steps as saddle-free Newton (the "
    "method's number is ten times its steps)."
)
BETTER = "lower"

SIZE, DOWN = 10, 0.01
RATES = (0.1, 1.0, 10.0, 30.0, 60.0, 100.0, 200.0)  # beyond the last the network's descent diverges
SMALL_RATES = (0.03, 0.1, 0.3, 1.0, 1.5, 1.9, 2.5)  # beyond 2 over the largest curvature it does
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
        "strict": (_strict(generator), -DOWN / 5, SMALL_RATES),
    }
    found = {}
    for name, (problem, left, rates) in problems.items():
        found[f"{name}_newton"] = float(_newton(problem, left, min(most, 200)))
        found[f"{name}_descent"] = float(min(_descent(problem, left, most, rate) for rate in rates))
    return {"method": 10 * found["strict_newton"], "baseline": found["strict_descent"], **found}


def _monkey(point: Tensor) -> Tensor:
    return point[0] ** 3 - 3 * point[0] * point[1] ** 2 + (point**4).sum() / 4


def _strict(generator: torch.Generator) -> Problem:
    """Bowls in all directions but one, along which two minima of -DOWN / 4 lie; turned, and started near the saddle."""
    axes = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator)).Q
    bowls = 10 ** -torch.rand(SIZE - 1, generator=generator)
    beside = 1e-5 * (1 + torch.rand((), generator=generator))
    start = axes @ torch.cat([0.1 * torch.randn(SIZE - 1, generator=generator), beside[None]])

    def build() -> tuple[list[Tensor], Callable[[], Tensor]]:
        point = start.clone().requires_grad_()

        def loss() -> Tensor:
            places = axes.mT @ point
            along = places[-1]
            value: Tensor = (bowls * places[:-1].square()).sum() / 2 + DOWN * (along**4 / 4 - along.square() / 2)
            return value

        return [point], loss

    return build


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
