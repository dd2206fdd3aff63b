"""The outputs of a layer, read from the shape of its weight, against what the layer puts out."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from netwright.report.layers import layer_rows
from netwright.report.run import Layer


class Conv1D(nn.Module):
    """The linear layer of GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


CASES = [
    (nn.Conv2d(6, 4, 3, groups=2), torch.zeros(2, 6, 5, 5)),
    (nn.Conv1d(6, 4, 1), torch.zeros(2, 6, 5)),
    (nn.Linear(6, 4), torch.zeros(2, 6)),
    (nn.ConvTranspose2d(6, 4, 3), torch.zeros(2, 6, 5, 5)),
    (nn.ConvTranspose1d(6, 4, 3, bias=False), torch.zeros(2, 6, 5)),
    (nn.ConvTranspose2d(6, 4, 3, groups=2), torch.zeros(2, 6, 5, 5)),
    (nn.ConvTranspose3d(6, 6, 1, groups=6), torch.zeros(2, 6, 2, 2, 2)),
    (Conv1D(6, 4), torch.zeros(2, 6)),
    (nn.BatchNorm2d(6), torch.zeros(2, 6, 5, 5)),
]


def row_of(module: nn.Module) -> Layer:
    shape, count = tuple(module.state_dict()["weight"].shape), sum(value.numel() for value in module.parameters())
    return Layer("x", type(module).__name__, shape, shape, 0, 0, count, count, "float32")


@pytest.mark.parametrize(("module", "x"), CASES, ids=[type(module).__name__ for module, _ in CASES])
def test_outputs_of_every_kind(module: nn.Module, x: torch.Tensor) -> None:
    layer, outputs = row_of(module), str(module(x).shape[1])
    for chosen_shape, chosen_parameters, after in (
        (layer.chosen_shape, layer.chosen_parameters, outputs),
        (None, 0, "0"),
    ):
        changed = replace(layer, chosen_shape=chosen_shape, chosen_parameters=chosen_parameters)
        (row,) = layer_rows([changed])
        assert (row.units.before, row.units.after) == (outputs, after)


@pytest.mark.parametrize("module", [nn.Embedding(11, 8), nn.EmbeddingBag(11, 8)])
def test_the_width_of_an_embedding_not_its_entries(module: nn.Module) -> None:
    (row,) = layer_rows([replace(row_of(module), chosen_shape=(11, 6), chosen_parameters=66)])
    assert (row.units.before, row.units.after, row.units.percent) == ("8", "6", 75.0)
