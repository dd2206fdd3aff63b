"""Which parameters count as matrices and kernels."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.compress import ActivatingPruner, GlobalSparseMomentum, SparseRecipe
from netwright.compress._weights import FlatWeights
from netwright.core.data import Data
from netwright.core.task import Task


class Mixed(nn.Module):
    """Matrices and kernels of odd shapes, beside scales and tokens stored with dimensions of one entry."""

    def __init__(self):
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((4, 1, 1), 1e-6))
        self.response = nn.Parameter(torch.full((1, 1, 1, 4), 1e-6))
        self.token, self.places = nn.Parameter(torch.full((1, 1, 4), 1e-6)), nn.Parameter(torch.randn(1, 5, 4))
        self.mixing = nn.Parameter(torch.randn(2, 1, 3))
        self.table, self.norm = nn.Embedding(6, 4), nn.LayerNorm([5, 4])
        self.one, self.scalar, self.last = nn.Linear(1, 4), nn.Conv2d(1, 1, 1), nn.Linear(4, 1)
        self.recurrent, self.attention = nn.LSTM(1, 2), nn.MultiheadAttention(4, 1, kdim=1, vdim=1)

    def forward(self, x):
        y = self.norm(self.one(x[:, None, None]) + self.places + self.token)
        y = (self.layer_scale * y.transpose(1, 2)).transpose(1, 2) + self.response[0]
        return self.last(y).sum((1, 2))[:, None].expand(-1, 2)


def test_scales_tokens_and_norms_stay_out():
    names = set(FlatWeights(Mixed()).parameters)
    recurrent = {f"recurrent.weight_{kind}_l0" for kind in ("ih", "hh")}
    attention = {f"attention.{name}_proj_weight" for name in "qkv"} | {"attention.out_proj.weight"}
    assert names == {"places", "mixing", "one.weight", "scalar.weight", "last.weight", *recurrent, *attention}


@pytest.mark.parametrize(
    "method",
    [SparseRecipe(0.9), GlobalSparseMomentum(0.9), ActivatingPruner(0.9)],
    ids=lambda each: type(each).__name__,
)
def test_pruning_leaves_small_scales_alone(method):
    model = Mixed()
    splits = [TensorDataset(torch.randn(8), torch.zeros(8).long()) for _ in range(3)]
    task = Task("mixed", model, Data(*splits), nn.functional.cross_entropy, lambda output, _: 0.0)
    sparse = method(model, task, budget=0)
    for name in ("layer_scale", "response", "token"):
        assert torch.equal(sparse.get_parameter(name), model.get_parameter(name))
    weights = FlatWeights(sparse).read()
    assert int((weights != 0).sum()) == round(0.1 * len(weights))
