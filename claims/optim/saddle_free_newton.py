"""Saddle-free Newton against damped Newton in the same Krylov subspace, on a deep autoencoder."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from claims._training import arrays
from netwright.optim.saddle_free_newton import SaddleFreeNewton

PAPER = 72
CLAIM = (
    "Training an autoencoder of eight layers on 300 digits for 60 steps, saddle-free Newton ends at a lower mean "
    "squared error than Newton's method in the same Krylov subspaces, with the same grid of dampings."
)
BETTER = "lower"
SEEDS = 6

SIZES = (64, 48, 32, 16, 8, 16, 32, 48, 64)
GRID = tuple(10.0**power for power in range(2, -7, -1))


class DampedNewton(SaddleFreeNewton):
    """The same without absolute values."""

    @staticmethod
    def curvature(eigenvalues: Tensor) -> Tensor:
        """Steps are divided by the eigenvalues themselves."""
        return eigenvalues


def run(seed: int, *, smoke: bool = False) -> dict[str, float]:
    data = arrays("digits", seed=seed, train=50 if smoke else 300)
    images, held_out = data.train[0].flatten(1), data.test[0].flatten(1)
    found: dict[str, float] = {}
    for name, kind in (("method", SaddleFreeNewton), ("baseline", DampedNewton)):
        model = autoencoder(seed)
        optimizer = kind(model.parameters(), subspace=20, damping=GRID)
        train(model, optimizer, images, 5 if smoke else 60)
        with torch.no_grad():
            found[name] = float(mse_loss(model(images), images))
            found[f"{name}_test"] = float(mse_loss(model(held_out), held_out))
    found["mean_image"] = float(images.var(0, correction=0).mean())
    return found


def autoencoder(seed: int, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(SIZES):
        linear = nn.Linear(inputs, outputs)
        nn.init.normal_(linear.weight, std=scale * inputs**-0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def train(model: nn.Module, optimizer: SaddleFreeNewton, images: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.step(lambda: mse_loss(model(images), images))
