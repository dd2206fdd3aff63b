"""Bring your own training loop and score: ``python examples/own_loop.py [BUDGET] [RUN_DIRECTORY]``.

An autoencoder has no targets in the usual sense, so the task gets ``fit=`` and ``evaluate=`` in place of ``loss=`` and
``score=``. Netwright calls them to train the baseline, to recover every candidate, and to score them.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import TensorDataset

import netwright

budget, out = (*sys.argv[1:], *("60s", "runs/own-loop")[len(sys.argv) - 1 :])

pixels = torch.tensor(load_digits().data, dtype=torch.float32) / 16
pixels = pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]
splits = {"train": pixels[:1100], "val": pixels[1100:1400], "test": pixels[1400:]}


def autoencoder() -> nn.Module:
    encoder = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 12))
    decoder = nn.Sequential(nn.Linear(12, 512), nn.ReLU(), nn.Linear(512, 64))
    return nn.Sequential(encoder, decoder)


def fit(model: nn.Module, *, budget: float | None, seed: int, teacher: nn.Module | None = None) -> None:
    """Train in place for about ``budget`` epochs, with noise on the inputs; a teacher's outputs count half."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(max(1, round((10 if budget is None else budget) * len(splits["train"]) / 64))):
        clean = splits["train"][torch.randint(len(splits["train"]), (64,), generator=generator)]
        output = model(clean + 0.1 * torch.randn(clean.shape, generator=generator))
        loss = mse_loss(output, clean)
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(clean)
            loss = (loss + mse_loss(output, wanted)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def evaluate(model: nn.Module, split: str) -> float:
    """Share of the variance of the pixels that comes back; 1 is perfect."""
    wanted = splits[split]
    with torch.no_grad():
        return 1 - float((model(wanted) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


task = netwright.Task(
    name="autoencoder",
    model=autoencoder,
    data=netwright.Data(*(TensorDataset(part, part) for part in splits.values())),
    fit=fit,
    evaluate=evaluate,
    recipe=netwright.Recipe(epochs=20),  # the baseline's budget; candidates get a quarter of it
)
result = netwright.optimize(task, target="size<=0.3x", keep="score>=-0.02", budget=budget, out=out)
print(result["explanation"])
