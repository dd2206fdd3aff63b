"""Which parameters count as matrices and kernels."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.compress import CHITA, SWAP, ActivatingPruner, GlobalSparseMomentum, SparseRecipe
from netwright.compress._weights import FlatWeights, differentiable
from netwright.core.data import Data
from netwright.core.errors import TransformError
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


def small_task() -> tuple[nn.Module, Task]:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    splits = [TensorDataset(torch.randn(16, 4), torch.zeros(16).long()) for _ in range(3)]
    return model, Task("small", model, Data(*splits), nn.functional.cross_entropy, lambda output, _: 0.0)


GREEDY = [
    (CHITA(0.995), "56 weights", 1 - 1 / 56),
    (SWAP(0.995), "56 weights", 1 - 1 / 56),
    (SparseRecipe(0.995), "56 weights", 1 - 1 / 56),
    (SparseRecipe(0.98, scope="layer"), "24 weights of 2.weight", 1 - 1 / 24),
    (GlobalSparseMomentum(0.995), "56 weights", 1 - 1 / 56),
    (ActivatingPruner(0.995), "56 weights", 1 - 1 / 56),
]


@pytest.mark.parametrize(("method", "what", "highest"), GREEDY, ids=lambda value: type(value).__name__)
def test_a_ratio_that_leaves_nothing_is_refused_with_the_highest_that_leaves_one(method, what, highest):
    model, task = small_task()
    with pytest.raises(TransformError, match=f"ratio={method.ratio} would leave none of {what}. The highest") as caught:
        method(model, task)
    said = float(str(caught.value).split("leaves one is ")[1].rstrip("."))
    assert said == pytest.approx(highest, abs=1e-6)
    if not isinstance(method, CHITA | SWAP):
        sparse = dataclasses.replace(method, ratio=said)(model, task, budget=0)
        left = [int((value != 0).sum()) for value in sparse.parameters() if value.ndim > 1]
        assert (left[1] if what.endswith("2.weight") else sum(left)) == 1


def test_the_highest_ratio_of_many_weights_is_below_one():
    weights = FlatWeights(nn.Linear(2000, 2000))
    with pytest.raises(TransformError, match=r"leaves one is 0\.99999975\."):
        weights.require_left("it", 0.9999999)


@pytest.mark.parametrize("layer", [nn.LSTM(2, 3), nn.GRU(2, 3), nn.RNN(2, 3), nn.Linear(2, 3)])
def test_cudnn_is_off_where_recurrent_layers_are_differentiated(layer):
    before = torch.backends.cudnn.enabled
    with differentiable(nn.Sequential(layer)):
        assert torch.backends.cudnn.enabled == (isinstance(layer, nn.Linear) and before)
    assert torch.backends.cudnn.enabled == before
