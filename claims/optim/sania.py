"""SANIA as it comes against Adam with a tuned learning rate, on ill-scaled features and on a network."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Adam

from claims._training import Arrays, accuracy, arrays, batches, best
from netwright.optim.sania import SANIA

PAPER = 54
CLAIM = (
    "Without any tuning SANIA stays within 2% of the test accuracy of Adam with the best of nine learning rates, both "
    "on digits regression with features rescaled by up to a thousand and on a two-layer network: the smaller of the "
    "two ratios of accuracies exceeds 0.98."
)
BETTER = "higher"
SEEDS = 8


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    steps = 60 if smoke else 600
    rates = [1e-3, 1e-1] if smoke else [10 ** (-4 + place / 2) for place in range(9)]
    digits = Arrays(*((inputs.flatten(1), targets) for inputs, targets in arrays("digits", seed=seed)))
    scale = 10 ** (6 * torch.rand(64, generator=torch.Generator().manual_seed(seed)) - 3)
    scaled = Arrays(*((inputs * scale, targets) for inputs, targets in digits))
    found: dict[str, float] = {"change_by_rescaling": _change(seed)}
    ratios = []
    cases: list[tuple[str, Arrays, Callable[[], nn.Module]]] = [
        ("scaled", scaled, lambda: _regression(64, 10)),
        ("network", digits, _network),
    ]
    for name, data, build in cases:
        models = {}
        for rate in rates:
            torch.manual_seed(seed)
            models[rate] = build()
            _train(models[rate], Adam(models[rate].parameters(), lr=rate), data.train, steps, seed)
        scores = {rate: accuracy(model, data.val) for rate, model in models.items()}
        rate = best(rates, scores.__getitem__, higher=True)
        torch.manual_seed(seed)
        model = build()
        _train(model, SANIA(model.parameters()), data.train, steps, seed)
        ours, theirs = accuracy(model, data.test), accuracy(models[rate], data.test)
        ratios.append(ours / theirs)
        found |= {f"{name}_sania": ours, f"{name}_adam": theirs, f"{name}_adam_lr": rate}
    return {"method": min(ratios), "baseline": 0.98, **found}


def _train(model: nn.Module, optimizer: Adam | SANIA, data: tuple[Tensor, Tensor], steps: int, seed: int) -> None:
    for index in batches(len(data[1]), 64, steps, seed):
        _step(model, optimizer, (data[0][index], data[1][index]))


def _step(model: nn.Module, optimizer: Adam | SANIA, batch: tuple[Tensor, Tensor]) -> float:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(batch[0]), batch[1])
        torch.autograd.backward(loss)
        return loss

    step: Callable[..., Tensor] = optimizer.step
    return float(step(closure).detach())


def _change(seed: int) -> float:
    """Largest relative change of 30 losses on breast cancer (float64, full batch, no floor) by rescaled features."""
    inputs, targets = arrays("breast-cancer", seed=seed).train
    scale = 10 ** (6 * torch.rand(30, generator=torch.Generator().manual_seed(seed)).double() - 3)
    paths = []
    for features in (inputs.double(), inputs.double() * scale):
        model = _regression(30, 2).double()
        optimizer = SANIA(model.parameters(), eps=1e-300)
        paths.append([_step(model, optimizer, (features, targets)) for _ in range(30)])
    changes: list[float] = [abs(after / before - 1) for before, after in zip(*paths, strict=True)]
    return max(changes)


def _regression(features: int, classes: int) -> nn.Module:
    model = nn.Linear(features, classes)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return model


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
