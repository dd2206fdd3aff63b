"""Super-networks: extraction is slicing, masking is extraction, any class will do."""

import importlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import IntDistribution
from torch import nn
from torch.utils.data import TensorDataset

from netwright.core.batch_statistics import reestimate
from netwright.core.builtin.networks import CharTransformer, ResNet
from netwright.core.data import Data
from netwright.core.errors import SettingError
from netwright.core.graph import trace
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.search import LINASSampler, Measured, SearchSpace, SpaceError, SuperNet, run


def task_of(model, shape, classes=3, items=48, symbols=None):
    generator = torch.Generator().manual_seed(1)

    def split():
        if symbols is not None:
            inputs = torch.randint(symbols, (items, *shape), generator=generator)
            return TensorDataset(inputs, inputs)
        inputs = torch.randn(items, *shape, generator=generator)
        return TensorDataset(inputs, inputs.flatten(1)[:, :classes].argmax(1))

    def loss(output, target):
        return nn.functional.cross_entropy(output.flatten(0, -2), target.flatten())

    def score(output, target):
        return float((output.argmax(-1) == target).float().mean())

    return Task("elastic", model, Data(split(), split(), split()), loss, score, recipe=Recipe(epochs=2, batch_size=16))


def dense(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 5))
def test_a_sub_network_is_a_slice_of_the_longest_units(first, second, seed):
    """An independent slicing of the three matrices."""
    model = dense(seed)
    net = SuperNet(model, task_of(model, (6,)), least=0.25, levels=4)
    params = {"width/0": 3 + 3 * first, "width/2": 2 + 2 * second}
    w, v, u = (model[number].weight.detach().double().numpy() for number in (0, 2, 4))
    b, c, d = (model[number].bias.detach().double().numpy() for number in (0, 2, 4))

    def longest(before, bias, after, count):
        lengths = (before**2).sum(1) + bias**2 + (after**2).sum(0)
        return np.sort(np.argsort(-lengths, kind="stable")[:count])

    i = longest(w, b, v, params["width/0"])
    j = longest(v, c, u, params["width/2"])
    x = np.random.default_rng(seed).normal(size=(5, 6))
    hidden = np.maximum(x @ w[i].T + b[i], 0)
    expected = np.tanh(hidden @ v[np.ix_(j, i)].T + c[j]) @ u[:, j].T + d
    small = net.extract(params)
    assert sum(value.numel() for value in small.parameters()) == w[i].size + v[np.ix_(j, i)].size + u[:, j].size + len(
        i
    ) + len(j) + len(d)
    assert np.allclose(small(torch.tensor(x, dtype=torch.float32)).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "shape", "symbols"),
    [(ResNet(1, 8, 3), (1, 8, 8), None), (CharTransformer(7, context=6, dim=8, layers=2, heads=2), (6,), 7)],
    ids=["resnet", "transformer"],
)
def test_masked_weights_compute_what_the_sub_network_does(model, shape, symbols):
    model.eval()
    task = task_of(model, shape, symbols=symbols)
    net = SuperNet(model, task, least=0.3, levels=3, items=1)
    rng = np.random.default_rng(0)
    candidates = [net.smallest(), net.largest(), *(net.space.sample(rng) for _ in range(4))]
    weights = dict(net.model.named_parameters())
    inputs = task.example(4)
    for params in candidates:
        masked = {name: weights[name] * mask for name, mask in net.masks(params).items()}
        expected = torch.func.functional_call(net.model, masked, (inputs,))
        small = net.extract(params)
        copy_statistics(net.model, small)
        assert torch.allclose(small(inputs), expected, atol=1e-5), params


def copy_statistics(source, small):
    """Where no units went, batch norms are those of the super-network; here they are set to neutral in both."""
    for model in (source, small):
        for name, value in model.named_buffers():
            if "running" in name:
                value.fill_(1.0 if name.endswith("var") else 0.0)


def test_what_lies_in_an_absent_branch_does_not_count():
    model = ResNet(1, 8, 3)
    net = SuperNet(model, task_of(model, (1, 8, 8)), levels=2)
    params = {**net.largest(), "branch/blocks.0.conv1": False}
    assert "width/blocks.0.conv1" not in net.space.reduced(params)
    assert net.space.key(params) == net.space.key({**params, "width/blocks.0.conv1": 2})
    left = {name for name, _ in net.extract(params).named_parameters()}
    assert not any(name.startswith("blocks.0.conv") for name in left)


class Nested(nn.Module):
    """A residual branch within another one."""

    def __init__(self):
        super().__init__()
        self.enter, self.first = nn.Linear(6, 8), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.last, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.enter(x).relu()
        inner = self.first(x).relu()
        inner = inner + self.down(self.up(inner).relu())
        return self.head(x + self.last(inner))


def test_what_lies_in_branches_within_branches_counts_where_all_are_there():
    torch.manual_seed(0)
    net = SuperNet(Nested(), task_of(Nested(), (6,)), levels=2)
    outer, inner, width = "branch/first", "branch/up", "width/up"
    whole = net.largest()
    assert {outer, inner, width} <= whole.keys()
    for first, second in itertools.product((True, False), repeat=2):
        params = {**whole, outer: first, inner: second}
        counted = net.space.reduced(params)
        assert (inner in counted, width in counted) == (first, first and second)
        small = net.extract(counted)
        left = {name.partition(".")[0] for name, _ in small.named_parameters()}
        assert ("first" in left, "up" in left) == (first, first and second)
        x = torch.randn(4, 6)
        assert torch.allclose(small(x), net.extract(params)(x))
        masked = {name: dict(net.model.named_parameters())[name] * mask for name, mask in net.masks(counted).items()}
        assert torch.allclose(small(x), torch.func.functional_call(net.model, masked, (x,)), atol=1e-5)


def test_training_reaches_every_size():
    model = dense()
    task = task_of(model, (6,), items=256)
    net = SuperNet(model, task, least=0.3, levels=3)
    before = [Measured(net, task, seconds=0.01)(params)["score"] for params in (net.smallest(), net.largest())]
    given_weights = [value.clone() for value in model.parameters()]
    net.fit(Recipe(epochs=30, batch_size=32, optimizer_settings={"lr": 1e-2}, schedule_settings={"max_lr": 1e-2}))
    after = [Measured(net, task, seconds=0.01)(params)["score"] for params in (net.smallest(), net.largest())]
    assert min(after) > 0.75
    assert min(after) > max(before)
    assert all(map(torch.equal, given_weights, model.parameters())), "the given network stays as it was"


def test_training_of_the_whole_network_alone_is_ordinary_training():
    """With the draw switched off, the shared weights are those of fit."""
    from netwright.core.fit import fit
    from netwright.search.super_net import _Drawn

    model = dense()
    task = task_of(model, (6,))
    net = SuperNet(model, task)
    drawn = _Drawn(net.model, net, 0)
    drawn._ends, drawn._random = ({}, {}), net.largest
    fit(drawn, task, task.recipe, seed=3)
    plain = fit(dense(), task, task.recipe, seed=3).model
    assert all(map(torch.equal, net.model.parameters(), plain.parameters()))


def test_masks_of_the_graph_are_its_zeros():
    model = ResNet(1, 4, 3).eval()
    inputs = torch.randn(3, 1, 8, 8)
    graph = trace(model, inputs)
    units = {group.name: [0, group.size - 1] for group in graph.groups if group.size > 2}
    weights = dict(model.named_parameters())
    masked = {name: weights[name] * mask for name, mask in graph.masks(units).items()}
    zeroed = dict(graph.zero(model, units).named_parameters())
    for name, value in masked.items():
        assert torch.equal(value, zeroed[name]), name
    assert {name for name in weights if not torch.equal(weights[name], zeroed[name])} <= set(masked)


def test_statistics_are_means_over_the_batches():
    norm = nn.BatchNorm1d(2, momentum=0.3)
    seen = torch.randn(4, 5, 2)
    reestimate(norm, list(seen))
    assert torch.allclose(norm.running_mean, seen.mean((0, 1)), atol=1e-6)
    assert torch.allclose(norm.running_var, seen.var(1).mean(0), atol=1e-6)
    assert norm.momentum == 0.3
    assert not norm.training


class Own:
    """A super-network of a user's own class: the depth of a stack."""

    space = SearchSpace({"depth": IntDistribution(1, 4)})

    def __init__(self):
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layers = [nn.Linear(8, 8) for _ in range(4)]

    def extract(self, params):
        layers = [layer for each in self.layers[: params["depth"]] for layer in (nn.ReLU(), each)]
        return nn.Sequential(self.first, *layers, self.last)


def test_a_class_of_ones_own_is_searched_as_it_is():
    task = task_of(dense(), (6,))
    goals = {"score": "maximize", "macs": "minimize"}
    net = Own()
    found = run(net.space, Measured(net, task, seconds=0.01), goals, sampler=LINASSampler(net.space, seed=0))
    assert sorted(entry.params["depth"] for entry in found.evaluations) == [1, 2, 3, 4]
    assert min(found.front, key=lambda entry: entry.metrics["macs"]).params == {"depth": 1}


def test_an_invalid_sub_network_is_named():
    net = SuperNet(dense(), task_of(dense(), (6,)))
    with pytest.raises(SpaceError, match="width/0"):
        net.extract({"width/0": 1000, "width/2": 2})
    for wrong in ("3", True, 2.5, None):
        with pytest.raises(SpaceError, match="Decision 'width/0' must be one of"):
            net.extract({"width/0": wrong, "width/2": 2})
    whole = net.extract({"width/0": 3.0, "width/2": 2})
    assert torch.equal(whole[0].weight, net.extract({"width/0": 3, "width/2": 2})[0].weight)
    with pytest.raises(SpaceError, match="'width/2' is missing"):
        net.extract({"width/0": 3})
    with pytest.raises(SpaceError, match="no decision"):
        Measured(net, task_of(dense(), (6,)))({**net.largest(), "kernel": 3})


@pytest.mark.parametrize(
    ("change", "message"), [({"least": 0.0}, "least"), ({"levels": 1}, "levels"), ({"items": 0}, "items")]
)
def test_settings_out_of_range(change, message):
    with pytest.raises(SettingError, match=message):
        SuperNet(dense(), task_of(dense(), (6,)), **change)


def test_a_network_with_nothing_elastic_and_things_that_are_no_super_network():
    single = nn.Linear(6, 3)
    with pytest.raises(SettingError, match="Nothing in Linear is elastic"):
        SuperNet(single, task_of(single, (6,)))
    with pytest.raises(SettingError, match="is no super-network"):
        Measured(single, task_of(single, (6,)))
    with pytest.raises(SettingError, match="seconds must be positive"):
        Measured(Own(), task_of(single, (6,)), seconds=0)


def test_masks_of_no_candidate_are_refused():
    net = SuperNet(dense(), task_of(dense(), (6,)))
    for params, words in (
        ({"width/0": 5, "width/2": 2}, "'width/0' must be one of"),
        ({"width/9": 3}, "is no decision"),
    ):
        with pytest.raises(SpaceError, match=words):
            net.masks(params)


@pytest.mark.parametrize(("items", "sizes"), [(512, [128] * 4), (129, [65, 65]), (200, [100, 100]), (7, [7])])
def test_batch_norms_are_set_on_as_many_items_as_asked_for(items, sizes, monkeypatch):
    seen = []
    module = importlib.import_module("netwright.search.super_net")
    monkeypatch.setattr(module, "reestimate", lambda model, inputs: seen.extend(len(each) for each in inputs))
    net = SuperNet(dense(), task_of(dense(), (6,), items=600), items=items)
    net.extract(net.smallest())
    assert seen == sizes
