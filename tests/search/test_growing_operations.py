"""What is left of a network's operations, against core's count of the smaller network."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.core.builtin.networks import CharTransformer
from netwright.core.data import Data
from netwright.core.graph import export_model
from netwright.core.graph.macs import total_macs
from netwright.core.score import accuracy
from netwright.core.task import Task
from netwright.search import GrowingNetwork
from netwright.search._growing_structure import Structure

SEQUENCES = torch.randn(4, 24, 6, generator=torch.Generator().manual_seed(0))
PLANES = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Attending(nn.Module):
    """An attention of one module, between linear layers."""

    def __init__(self, **changes):
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(6, 16), nn.Linear(16, 32), nn.Linear(32, 3)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **changes)

    def forward(self, x):
        y = self.first(x)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        return self.last(torch.relu(self.hidden(y.mean(1))))


class Products(nn.Module):
    """Products of activations whose lengths go with units, once, and as Gram matrices twice."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 10)
        self.last = nn.Linear(10, 3)

    def forward(self, x):
        scores = torch.einsum("bld,bmd->blm", self.query(x), self.key(x))
        gram = self.value(x).transpose(1, 2) @ self.value(x)
        return self.last(((scores / 24) @ self.value(x)) @ gram).mean(1)


class Convolutions(nn.Module):
    """Depthwise, transposed, and on two inputs side by side."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.up, self.last = nn.ConvTranspose2d(10, 5, 2, stride=2), nn.Linear(5, 3)

    def forward(self, x):
        y = torch.cat([self.left(x), self.right(x)], 1).relu()
        return self.last(self.up(self.depthwise(y).relu()).mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (Attending, SEQUENCES),
        (lambda: Attending(bias=False), SEQUENCES),
        (lambda: CharTransformer(20, context=12, dim=16, layers=2, heads=4), torch.zeros(4, 12).long()),
        (Products, SEQUENCES),
        (Convolutions, PLANES),
    ],
    ids=["attention", "attention without biases", "transformer", "products", "convolutions"],
)
def test_what_is_left_is_what_core_counts(network, inputs):
    torch.manual_seed(0)
    model = network().eval()
    structure = Structure(model, inputs, ())
    assert structure.total == total_macs(export_model(model, inputs))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        hard = {each.name: (torch.rand(each.size, generator=generator) < 0.6).double() for each in structure.groups}
        for value in hard.values():
            value[0] = 1.0
        left = structure.macs(hard)
        assert left == total_macs(export_model(structure.build(model, hard), inputs)) < structure.total


def test_a_network_with_attention_keeps_its_budget():
    def split():
        return TensorDataset(SEQUENCES.repeat(12, 1, 1), torch.arange(48) % 3)

    task = Task("sequences", Attending, Data(split(), split(), split()), functional.cross_entropy, accuracy)
    grown = GrowingNetwork(0.4, rounds=2)(task.build(0), task, budget=2, seed=0)
    assert grown.macs == total_macs(export_model(grown.model, SEQUENCES)) <= 0.4 * grown.full_macs
