"""MACs against torch's own counter and against counts by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from netwright.compress._codebook_storage import StoredCodebooks, attach
from netwright.core.data import call
from netwright.core.graph.export import export_model
from netwright.core.graph.macs import count_macs, count_parameters, total_macs


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def counted_by_torch(model, inputs):
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call(model.eval(), inputs)
    return counter.get_total_flops() / 2


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, groups=4),
        nn.Conv2d(16, 16, 5, padding=4, dilation=2, groups=16),
        nn.ConvTranspose2d(16, 6, 3, stride=2),
        nn.ConvTranspose2d(6, 4, 2, groups=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


MODELS = {
    "convolutions": (conv_net, (3, 12, 10)),
    "one dimension": (lambda: nn.Sequential(nn.Conv1d(2, 6, 3, groups=2), nn.ConvTranspose1d(6, 3, 4, 2)), (2, 9)),
    "three dimensions": (lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.ConvTranspose3d(4, 2, 2)), (2, 5, 6, 7)),
    "linear on sequences": (lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), (4, 5, 6)),
    "matmul": (lambda: Function(lambda x: torch.matmul(x, x.transpose(-1, -2)) @ x), (4, 5, 6)),
    "bmm": (lambda: Function(lambda x: torch.bmm(x, x.transpose(1, 2))), (5, 6)),
    "baddbmm": (lambda: Function(lambda x: torch.baddbmm(x, x @ x.mT, x)), (5, 5)),
    "einsum": (lambda: Function(lambda x: torch.einsum("bhid,bhjd->bhij", x, x)), (2, 5, 6)),
    "einsum with dots": (lambda: Function(lambda x: torch.einsum("...id,...jd->...ij", x, x)), (2, 5, 6)),
    "einsum implicit": (lambda: Function(lambda x: torch.einsum("bij,bjk", x, x.mT)), (5, 6)),
    "einsum of three": (lambda: Function(lambda x: torch.einsum("bij,bjk,bkl->bil", x, x.mT, x)), (5, 6)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_against_torch(name, batch):
    build, shape = MODELS[name]
    model = build()
    program = export_model(model, torch.randn(2, *shape))
    assert total_macs(program, batch) == counted_by_torch(model, torch.randn(batch, *shape)) > 0


def test_addmm_and_mm_by_hand():
    bias, weight = torch.zeros(7), torch.zeros(6, 7)
    program = export_model(Function(lambda x: torch.addmm(bias, x, weight).mm(weight.T)), torch.zeros(2, 6))
    assert total_macs(program, 3) == 2 * 3 * 6 * 7


def test_attention_by_hand():
    class Attend(nn.Module):
        def forward(self, query, memory):
            return functional.scaled_dot_product_attention(query, memory, memory[..., :3])

    program = export_model(Attend(), (torch.randn(2, 4, 5, 8), torch.randn(2, 4, 9, 8)))
    assert total_macs(program) == 4 * 5 * 9 * (8 + 3)


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_by_hand(kind, gates):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = kind(6, 5, num_layers=2, bidirectional=True, batch_first=True)

        def forward(self, x):
            return self.cells(x)[0]

    program = export_model(Last(), torch.randn(2, 7, 6))
    first, second = gates * 5 * (6 + 5), gates * 5 * (10 + 5)
    assert count_macs(program) == {"cells": 7 * 2 * (first + second)}


@pytest.mark.parametrize(
    ("kind", "gates"),
    [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1), (lambda *sizes: nn.RNNCell(*sizes, nonlinearity="relu"), 1)],
)
def test_cells_by_hand(kind, gates):
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = kind(6, 5)

        def forward(self, x):
            state = self.cell(x)
            return self.cell(x, state) if isinstance(state, tuple) else self.cell(x, 2 * state)

    assert count_macs(export_model(Step(), torch.randn(2, 6)), 3) == {"cell": 2 * 3 * gates * 5 * (6 + 5)}


def test_forms_of_two_inputs_by_hand():
    weight = torch.randn(5, 6, 7)
    pairs = [
        (lambda x: functional.bilinear(x, torch.cat([x, x[:, :1]], 1), weight), 3 * 5 * 6 * 7),
        (
            lambda x: torch.tensordot(x.view(-1, 2, 3), weight.view(7, 3, 2, 5), ([-2, 2], [2, 1])),
            3 * (7 * 5) * (2 * 3),
        ),
        (lambda x: torch.inner(x, weight.view(5, 7, 6)), 3 * (5 * 7) * 6),
        (lambda x: torch.inner(x, torch.tensor(2.0)), 0),
    ]
    for function, expected in pairs:
        assert total_macs(export_model(Function(function), torch.randn(2, 6)), 3) == expected


def test_by_module_and_shared_modules():
    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
            self.head = nn.Linear(8, 2)
            self.own = nn.Parameter(torch.zeros(2, 2))

        def forward(self, left, right):
            pair = [self.body(image).mean((2, 3)) for image in (left, right)]
            return self.head(torch.cat(pair, 1)) @ self.own

    program = export_model(Siamese(), (torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5)))
    assert count_macs(program, 2) == {"body.0": 2 * 2 * 9 * 4 * 27, "head": 2 * 16, "": 2 * 4}


def test_a_traced_graph_counts_by_the_owner_of_the_weight():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    program = export_model(model, torch.randn(2, 3, 3, 3))
    again = export_model(torch.fx.GraphModule(inner := program.module(), inner.graph), torch.randn(2, 3, 3, 3))
    assert count_macs(again) == count_macs(program) == {"0": 108, "2": 8}


def test_tables_and_norms_cost_nothing():
    model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.GELU())
    program = export_model(model, torch.zeros(2, 3, dtype=torch.long))
    assert count_macs(program) == {}
    assert count_parameters(program) == 10 * 4 + 8


def test_parameters_shared_and_views():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10)
            self.head.weight = self.table.weight
            self.register_buffer("constant", torch.zeros(100))

        def forward(self, tokens):
            return self.head(self.table(tokens)) + self.constant.sum()

    program = export_model(Tied(), torch.zeros(2, 3, dtype=torch.long))
    assert count_parameters(program) == sum(value.numel() for value in Tied().parameters()) == 50


@pytest.mark.parametrize("shape", [(4, 8), (4, 2, 3, 3)])
def test_a_weight_read_out_of_a_codebook_counts_all_its_entries(shape):
    layer = nn.Linear(8, 4) if len(shape) == 2 else nn.Conv2d(2, 4, 3)
    rows, columns = 4, math.prod(shape[1:])
    reading = StoredCodebooks(torch.randint(0, 4, (rows, columns)), torch.zeros(rows), 2, shape)
    attach(layer, torch.randn(1, 4), reading)
    example = torch.zeros(2, 8) if len(shape) == 2 else torch.zeros(2, 2, 5, 5)
    assert count_parameters(export_model(layer, example)) == rows * columns + 4
