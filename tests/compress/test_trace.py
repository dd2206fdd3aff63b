"""Traced graphs train what the model trains, and keep its dropout where they are asked to."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.compress import DeepReDuce, Int8, LayerMerge
from netwright.compress._trace import trace
from netwright.core.data import Data
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.task import Task


def task_of(model: nn.Module, inputs: torch.Tensor) -> Task:
    splits = [TensorDataset(inputs, torch.arange(len(inputs)) % 3) for _ in range(3)]
    recipe = Recipe(epochs=1, batch_size=8)
    return Task("traced", model, Data(*splits), functional.cross_entropy, lambda output, _: 0.0, recipe=recipe)


class Tied(nn.Module):
    """The embedding's weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(3, 8), nn.Linear(8, 8), nn.Linear(8, 3, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(x)))).mean(1)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.again = self.inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.inner(self.first(x).relu()).relu()).relu())


@pytest.mark.parametrize("build", [Tied, Twice])
def test_what_has_two_names_trains(build):
    torch.manual_seed(0)
    model = build().eval()
    inputs = torch.randint(0, 3, (16, 5)) if build is Tied else torch.randn(16, 5)
    task = task_of(model, inputs)
    rounded = Int8(calibration_items=16)(model, task)
    before = {name: value.detach().clone() for name, value in rounded.named_parameters()}
    assert all(value.requires_grad for value in rounded.parameters())
    after = dict(fit(rounded, task).model.named_parameters())
    assert not any(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("build", [Tied, Twice])
def test_what_has_two_names_stays_frozen(build):
    torch.manual_seed(0)
    model = build().eval()
    frozen = model.embedding.weight if build is Tied else model.inner.weight
    frozen.requires_grad_(False)
    inputs = torch.randint(0, 3, (16, 5)) if build is Tied else torch.randn(16, 5)
    trains = {tuple(value.shape): value.requires_grad for value in trace(model, task_of(model, inputs)).parameters()}
    assert trains.pop(tuple(frozen.shape)) is False
    assert all(trains.values())


class Dropping(nn.Module):
    """Every kind of dropout, as module and as function; the last one drops in evaluation too if ``always``."""

    def __init__(self, in_place: bool = False, always: bool = False) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)
        self.relu, self.off, self.always = nn.ReLU(in_place), nn.Dropout(0.0), always
        self.channels, self.alpha, self.last = nn.Dropout2d(0.2), nn.AlphaDropout(0.3), nn.Dropout(0.4, in_place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.channels(self.relu(self.conv(functional.dropout(x, 0.1, self.training))))
        x = self.last(self.alpha(self.off(x)))
        x = functional.feature_alpha_dropout(x, 0.5, self.training).mean((2, 3))
        return self.head(functional.dropout(x, 0.6, self.training or self.always))


@pytest.mark.parametrize("in_place", [False, True])
def test_dropout_is_alive_where_asked_for(in_place):
    torch.manual_seed(0)
    model, inputs = Dropping(in_place).eval(), torch.randn(4, 3, 2, 2)
    module = trace(model, task_of(model, inputs), dropouts=True).eval()
    torch.testing.assert_close(module(inputs), model(inputs), rtol=0, atol=0)
    drops = [part for part in module.modules() if isinstance(part, nn.modules.dropout._DropoutNd)]
    kinds = [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.Dropout, nn.FeatureAlphaDropout, nn.Dropout]
    assert [type(part) for part in drops] == kinds
    assert [part.p for part in drops] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    for seed in range(3):
        torch.manual_seed(seed)
        given = model.train()(inputs)
        torch.manual_seed(seed)
        torch.testing.assert_close(module.train()(inputs), given)


def test_dropout_in_place_of_a_part():
    class Part(nn.Module):
        def forward(self, x):
            x = x + 1
            functional.dropout(x[:, 1:], 0.5, self.training, inplace=True)
            return x

    torch.manual_seed(0)
    model, inputs = Part(), torch.randn(50, 4)
    module = trace(model, task_of(model, inputs), dropouts=True)
    torch.testing.assert_close(module.eval()(inputs), inputs + 1, rtol=0, atol=0)
    kept = module.train()(inputs) != 0
    assert kept[:, 0].all()
    assert 0.3 < float(kept[:, 1:].double().mean()) < 0.7


def test_dropout_that_evaluation_has_stays():
    torch.manual_seed(0)
    model, inputs = Dropping(always=True).eval(), torch.randn(4, 3, 2, 2)
    module = trace(model, task_of(model, inputs), dropouts=True).eval()
    assert not torch.equal(module(inputs), module(inputs))


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 5, 5), (4, 3, 2, 5, 5)])
def test_dropout_of_channels_without_warnings(shape, recwarn):
    model = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}[len(shape)](0.5)
    inputs = torch.randn(shape)
    module = trace(model.eval(), task_of(model, inputs), dropouts=True).train()
    recwarn.clear()
    kept = module(inputs) != 0
    assert not recwarn.list
    assert 0 < int(kept.sum()) < kept.numel()
    assert torch.equal(kept.flatten(2).all(2), kept.flatten(2).any(2))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("method", [LayerMerge(0.9, cost="macs", items=16), DeepReDuce(0.5)])
def test_methods_that_train_a_graph_keep_dropout(method, in_place):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 1)]
    for _ in range(3):
        layers += [nn.BatchNorm2d(4), nn.ReLU(in_place), nn.Conv2d(4, 4, 3, padding=1)]
    model = nn.Sequential(*layers, nn.ReLU(in_place), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 3)).eval()
    task = task_of(model, torch.randn(16, 3, 4, 4))
    smaller = method(model, task, budget=0)
    assert [part.p for part in smaller.modules() if isinstance(part, nn.Dropout)] == [0.3]
    inputs = task.example(4)
    assert torch.equal(smaller(inputs), smaller(inputs))
    smaller.train()
    assert not torch.equal(smaller(inputs), smaller(inputs))
