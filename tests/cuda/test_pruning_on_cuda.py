"""Gradients of networks in eval mode on a CUDA device, where cuDNN refuses those of its recurrent layers."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.compress import CHITA, SWAP, Prune
from netwright.core.data import Data
from netwright.core.task import Task

pytestmark = pytest.mark.cuda


class Recurrent(nn.Module):
    """Sequences ``(b, t, 4)`` to logits ``(b, 3)``."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.head = kind(4, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0][:, -1])


METHODS = [
    CHITA(0.8, stages=2, gradients=16, batch_size=4),
    SWAP(0.8, stages=2, gradients=16, batch_size=4),
    Prune(0.5, saliency="taylor", batches=2),
]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_recurrent_networks_are_pruned_as_on_the_cpu(method, kind) -> None:
    torch.manual_seed(0)
    model = Recurrent(kind).eval()
    splits = [TensorDataset(torch.randn(64, 5, 4), torch.randint(3, (64,))) for _ in range(3)]
    task = Task("words", model, Data(*splits), nn.functional.cross_entropy, lambda output, _: 0.0)
    here, there = method(model, task), method(copy.deepcopy(model).cuda(), task)
    assert {value.device.type for value in there.parameters()} == {"cuda"}
    assert left(here) == left(there)


def left(model: nn.Module) -> int:
    return sum(int(torch.count_nonzero(value)) for value in model.parameters() if value.ndim > 1)
