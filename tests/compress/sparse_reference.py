"""A small regression task on one batch, and its network written out in NumPy."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.recipe import Recipe
from netwright.core.score import r2
from netwright.core.task import Task

ITEMS, INPUTS, HIDDEN, OUTPUTS = 12, 5, 7, 3
RATE = 0.2


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS)).double().eval()


def regression(model: nn.Module | None = None, **recipe) -> Task:
    """One iteration is one epoch, by plain descent with a constant learning rate."""
    generator = torch.Generator().manual_seed(3)

    def part(count: int) -> TensorDataset:
        inputs = torch.randn(count, INPUTS, generator=generator, dtype=torch.float64)
        return TensorDataset(inputs, inputs[:, :OUTPUTS].sin() + inputs[:, 1:2] ** 2)

    settings = {"optimizer": "torch.optim:SGD", "optimizer_settings": {"lr": RATE}, "schedule": None, "epochs": 4}
    settings = {**settings, "schedule_settings": {}, "batch_size": ITEMS, **recipe}
    data = Data(part(ITEMS), part(6), part(2))
    return Task("regression", model or network(), data, functional.mse_loss, r2, recipe=Recipe(**settings))


def numbers(model: nn.Module) -> list[np.ndarray]:
    """First matrix and bias, second matrix and bias."""
    return [value.detach().numpy().copy() for value in model.parameters()]


def gradients(params: list[np.ndarray], task: Task) -> list[np.ndarray]:
    """Of the mean squared error on all training items, by hand."""
    first, bias, second, second_bias = params
    x, y = (tensor.numpy() for tensor in task.data.train.tensors)
    hidden = np.tanh(x @ first.T + bias)
    slope = 2 * (hidden @ second.T + second_bias - y) / y.size
    back = (slope @ second) * (1 - hidden**2)
    return [back.T @ x, back.sum(0), slope.T @ hidden, slope.sum(0)]


def matrices(params: list[np.ndarray]) -> np.ndarray:
    """Both matrices as one vector."""
    return np.concatenate([params[0].ravel(), params[2].ravel()])


def put(params: list[np.ndarray], vector: np.ndarray) -> None:
    """Write one vector back into both matrices."""
    cut = params[0].size
    params[0] = vector[:cut].reshape(params[0].shape)
    params[2] = vector[cut:].reshape(params[2].shape)


def keep_largest(vector: np.ndarray, count: int) -> np.ndarray:
    """Whether an entry is among the ``count`` of largest magnitude, by sorting."""
    mask = np.zeros(len(vector), dtype=bool)
    mask[sorted(range(len(vector)), key=lambda at: -abs(vector[at]))[:count]] = True
    return mask


def on_support(hessian: np.ndarray, b: np.ndarray, support: list[int]) -> np.ndarray:
    """The lowest point of ``1/2 w'Hw - b'w`` among vectors that are zero outside a support."""
    found = np.zeros(len(b))
    found[support] = np.linalg.solve(hessian[np.ix_(support, support)], b[support])
    return found
