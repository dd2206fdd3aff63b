"""UBA against cosine, one-cycle, step and linear schedules: nine cases of three tasks and three budgets."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer
from torch.optim import lr_scheduler as torch_schedules
from torch.optim.lr_scheduler import LRScheduler

from claims._training import Arrays, Loss, arrays, descend, full_loss
from netwright.core.builtin.networks import CharTransformer, mlp
from netwright.core.builtin.python_source import VOCABULARY
from netwright.optim.unified_budget import UnifiedBudget

PAPER = 22
CLAIM = (
    "Over three tasks (digits with SGD, Fashion-MNIST and Python source text with Adam) and three budgets (25, 75 and "
    "200 iterations), UBA with its default shape is best or second of {cosine, one-cycle, step, linear, UBA}: its mean "
    "rank by test loss is below the second lowest of the other four, each at the best of the same four learning "
    "rates on validation data."
)
BETTER = "lower"
_LRS = (0.5, 1.0, 2.0, 4.0)

Make = Callable[[Optimizer, int, float], LRScheduler]
SCHEDULES: Mapping[str, Make] = {
    "uba": lambda optimizer, steps, lr: UnifiedBudget(optimizer, steps),
    "cosine": lambda optimizer, steps, lr: torch_schedules.CosineAnnealingLR(optimizer, steps),
    "onecycle": lambda optimizer, steps, lr: torch_schedules.OneCycleLR(optimizer, lr, steps, cycle_momentum=False),
    "step": lambda optimizer, steps, lr: torch_schedules.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4]),
    "linear": lambda optimizer, steps, lr: torch_schedules.LinearLR(optimizer, 1.0, 0.0, steps),
}


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    tasks: list[tuple[Arrays, Callable[[], nn.Module], Loss, Callable[..., Optimizer], float]] = [
        (arrays("digits", seed=seed), lambda: _flat(64), functional.cross_entropy, _sgd, 0.05)
    ]
    if not smoke:
        clothes = arrays("fashion-mnist", seed=seed, train=2000, held_out=500)
        text = Arrays(*(_short(part) for part in arrays("python-source", seed=seed, train=1000, held_out=128)))
        tasks += [
            (clothes, lambda: _flat(784), functional.cross_entropy, Adam, 0.002),
            (text, lambda: CharTransformer(VOCABULARY, 32, 32, 1, 2), _per_symbol, Adam, 0.004),
        ]
    ranks: dict[str, list[int]] = {name: [] for name in SCHEDULES}
    for data, build, loss, make, lr in tasks:
        for steps in (10,) if smoke else (25, 75, 200):
            found: dict[str, float] = {}
            for name, schedule in SCHEDULES.items():
                outcomes = []
                for factor in _LRS:
                    torch.manual_seed(seed)
                    model = build()
                    optimizer = make(model.parameters(), lr * factor)
                    descend(
                        model,
                        optimizer,
                        data.train,
                        loss,
                        steps=steps,
                        batch=16,
                        seed=seed,
                        schedule=schedule(optimizer, steps, lr * factor),
                    )
                    outcomes.append((full_loss(model, data.val, loss), full_loss(model, data.test, loss)))
                found[name] = min(outcomes)[1]
            for name, value in found.items():
                ranks[name].append(sorted(found.values()).index(value) + 1)
    means = {name: sum(found) / len(found) for name, found in ranks.items()}
    return {
        "method": means.pop("uba"),
        "baseline": sorted(means.values())[1],
        **means,
        "first_or_second": sum(rank <= 2 for rank in ranks["uba"]) / len(ranks["uba"]),
    }


def _flat(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *mlp(inputs, (32,), 10))


def _sgd(params: Iterable[nn.Parameter], lr: float) -> Optimizer:
    return SGD(params, lr, momentum=0.9)


def _short(part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return part[0][:, :32], part[1][:, :32]


def _per_symbol(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())
