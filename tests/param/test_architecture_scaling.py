"""architecture_scaling against paths listed one by one, closed forms, and measured variances."""

import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from netwright.core.errors import SettingError, TraceError
from netwright.param.architecture_scaling import architecture_scaling

_WIDTH = 4


class Wired(nn.Module):
    """``edges[j][i]`` says how vertex ``i`` enters ``j + 1``: 0 not at all, 1 as it is, 2 by a layer.

    With ``before``, sums are of pre-activations: a layer reads the activated vertex and its result is summed.
    """

    def __init__(self, edges, width=_WIDTH, before=False):
        super().__init__()
        self.edges, self.before = edges, before
        self.stem, self.readout = nn.Linear(3, width), nn.Linear(width, 2)
        self.layers = nn.ModuleDict(
            {f"{i}_{j}": nn.Linear(width, width) for j, row in enumerate(edges) for i, e in enumerate(row) if e == 2}
        )

    def vertices(self, x):
        found = [self.stem(x) if self.before else functional.relu(self.stem(x))]
        for j, row in enumerate(self.edges):
            terms = []
            for i, edge in enumerate(row):
                if edge == 2 and self.before:
                    terms.append(self.layers[f"{i}_{j}"](functional.relu(found[i])))
                elif edge == 2:
                    terms.append(functional.relu(self.layers[f"{i}_{j}"](found[i])))
                elif edge:
                    terms.append(found[i])
            found.append(sum(terms) if j % 2 else sum(terms[1:], terms[0]))  # with and without a leading zero
        return found

    def forward(self, x):
        last = self.vertices(x)[-1]
        return self.readout(functional.relu(last) if self.before else last)


def _listed(edges):
    """The depths of all paths, one by one."""
    found = []

    def walk(vertex, depth):
        if vertex == len(edges):
            found.append(depth + 1)
        for j in range(vertex, len(edges)):
            if edges[j][vertex]:
                walk(j + 1, depth + (edges[j][vertex] == 2))

    walk(0, 1)
    return found


def _connected(draw, nodes, choices=(0, 1, 2)):
    """A random graph in which every vertex is read and reads."""
    while True:
        rows = [[draw.choice(choices) for _ in range(j + 1)] for j in range(nodes - 1)]
        read = {i for row in rows for i, edge in enumerate(row) if edge}
        if all(any(row) for row in rows) and read == set(range(nodes - 1)):
            return rows


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_paths_of_random_graphs_are_those_listed_one_by_one(seed, nodes):
    edges = _connected(random.Random(seed), nodes)
    scaling = architecture_scaling(Wired(edges), torch.zeros(2, 3))
    listed = _listed(edges)
    assert scaling.depths == {depth: listed.count(depth) for depth in sorted(set(listed))}
    assert scaling.paths == len(listed)
    assert scaling.relative_lr == pytest.approx(float(Fraction(sum(depth**3 for depth in listed))) ** -0.5)


def _summands(edges):
    """How many terms each vertex sums: a sum that only another sum reads is part of it, as a traced graph has it."""
    same = [0]  # the vertex that each one is: another where nothing but that one enters, as it is
    for j, row in enumerate(edges):
        entering = [i for i, edge in enumerate(row) if edge]
        alone = len(entering) == 1 and row[entering[0]] == 1
        same.append(same[entering[0]] if alone else j + 1)
    readers = [[] for _ in same]
    for j, row in enumerate(edges):
        if same[j + 1] == j + 1:
            for i, edge in enumerate(row):
                if edge:
                    readers[same[i]].append(j)
    counts = [1]
    for j, row in enumerate(edges):
        nested = [edge == 1 and len(readers[same[i]]) == 1 for i, edge in enumerate(row)]
        parts = [counts[same[i]] if nested[i] else 1 for i, edge in enumerate(row) if edge]
        counts.append(counts[same[j + 1]] if same[j + 1] != j + 1 else sum(parts))
    return counts


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10**6))
def test_in_degrees_of_random_graphs(seed):
    edges = _connected(random.Random(seed), 5)
    variances = architecture_scaling(Wired(edges), torch.zeros(2, 3)).variances
    degrees = _summands(edges)
    assert variances["stem.weight"] == pytest.approx(2 / 3)
    assert variances["readout.weight"] == pytest.approx(1 / _WIDTH**2)
    for j, row in enumerate(edges):
        for i, edge in enumerate(row):
            if edge == 2:
                assert variances[f"layers.{i}_{j}.weight"] == pytest.approx(2 / (_WIDTH * degrees[i]))


def test_sums_of_pre_activations_are_charged_to_the_layers_that_write_them():
    edges = [[2], [2, 2], [0, 2, 2]]
    variances = architecture_scaling(Wired(edges, before=True), torch.zeros(2, 3)).variances
    for j, row in enumerate(edges):
        for i, edge in enumerate(row):
            if edge:
                degree = sum(other > 0 for other in row)
                assert variances[f"layers.{i}_{j}.weight"] == pytest.approx(2 / (_WIDTH * degree))


@pytest.mark.parametrize("depth", [1, 2, 3, 7])
def test_a_chain_has_one_path_and_the_closed_form(depth):
    layers = [module for _ in range(depth - 1) for module in (nn.Linear(3, 3), nn.ReLU())]
    scaling = architecture_scaling(nn.Sequential(*layers, nn.Linear(3, 3)), torch.zeros(2, 3))
    assert scaling.depths == {depth: 1}
    assert scaling.relative_lr == pytest.approx(depth**-1.5)
    assert [layer.last for layer in scaling.layers] == [False] * (depth - 1) + [True]


def test_the_rates_of_two_networks():
    shallow = architecture_scaling(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), torch.zeros(2, 3))
    edges = [[2], [1, 2]]
    wired = architecture_scaling(Wired(edges), torch.zeros(2, 3))  # by the skip, and by both layers
    assert wired.depths == {2: 1, 4: 1}
    assert wired.lr_for(shallow, 0.3) == pytest.approx(0.3 * math.sqrt(8 / (8 + 64)))
    assert shallow.lr_for(shallow, 0.3) == pytest.approx(0.3)


def test_kernels_slow_down():
    def conv(side):
        body = nn.Sequential(
            nn.Conv2d(2, 4, side, padding=side // 2), nn.ReLU(), nn.Conv2d(4, 4, side, padding=side // 2, groups=2)
        )
        return nn.Sequential(body, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    scalings = {side: architecture_scaling(conv(side), torch.zeros(2, 2, 8, 8)) for side in (1, 3, 5)}
    for side, scaling in scalings.items():
        assert scaling.kernel == pytest.approx(side)
        assert scaling.relative_lr == pytest.approx(27**-0.5 / side)
        assert scaling.variances["0.0.weight"] == pytest.approx(2 / (2 * side**2))
        assert scaling.variances["0.2.weight"] == pytest.approx(2 / (2 * side**2))  # four channels in two groups
    assert scalings[5].lr_for(scalings[3], 0.1) == pytest.approx(0.1 * 3 / 5)


def test_other_layers():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 6)
            self.up = nn.ConvTranspose1d(6, 4, 4, stride=2)
            self.flat = nn.Parameter(torch.zeros(4, 5))
            self.head = nn.Linear(5, 2)

        def forward(self, x):
            y = functional.relu(self.up(self.embed(x).transpose(1, 2))).mean(2)
            return self.head(torch.tanh(y @ self.flat))

    scaling = architecture_scaling(Odd(), torch.zeros(2, 3, dtype=torch.long))
    assert scaling.depths == {4: 1}
    assert [(layer.weight, layer.fan_in) for layer in scaling.layers] == [
        ("embed.weight", 1.0),
        ("up.weight", 12.0),  # 6 channels, 4 taps of which every second meets a given output
        ("flat", 4.0),
        ("head.weight", 5.0),
    ]


def test_paths_of_many_residual_blocks_are_counted_and_not_listed():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            for _ in range(60):
                x = x + functional.relu(self.layer(x))
            return x

    scaling = architecture_scaling(Deep(), torch.zeros(2, 2))
    assert scaling.paths == 2**60
    assert scaling.depths == {depth: math.comb(60, depth) for depth in range(61)}
    cubes = sum(math.comb(60, depth) * depth**3 for depth in range(61))
    assert scaling.relative_lr == pytest.approx(math.exp(-0.5 * math.log(cubes)))


@pytest.mark.parametrize("before", [True, False])
def test_the_variance_of_pre_activations_is_preserved(before):
    edges = [[2], [2, 2], [2, 2, 2], [0, 2, 0, 2]]
    width = 256
    model = Wired(edges, width, before)
    scaling = architecture_scaling(model, torch.zeros(2, 3))
    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    kept, plain = [], []
    for seed in range(4):
        scaling.initialize(model, seed)
        kept.append(_power(model, inputs))
        for name, param in model.named_parameters():
            if name.startswith("layers") and name.endswith("weight"):
                nn.init.kaiming_normal_(param, generator=torch.Generator().manual_seed(seed))
        plain.append(_power(model, inputs))
    ratio = math.exp(sum(map(math.log, kept)) / len(kept))
    # Activations are not centred: a sum of d of them exceeds d times the square of one by (d - 1)/pi, which the
    # in-degree leaves aside; sums of pre-activations are exact for wide layers.
    low, high = (0.85, 1.18) if before else (0.9, 2.4)
    assert low < ratio < high
    assert min(plain) > 3 * ratio


@torch.no_grad()
def _power(model, inputs):
    """The mean square of the pre-activations of the last vertex over that of the stem."""
    found = model.vertices(inputs)
    last = [
        layer(found[int(key[0])]) for key, layer in model.layers.items() if key.endswith(f"_{len(model.edges) - 1}")
    ]
    ends = [found[-1]] if model.before else last
    return float(torch.stack(ends).square().mean() / model.stem(inputs).square().mean())


def test_initialization_draws_the_stated_variances():
    model = Wired([[2], [2, 2]], width=200)
    norm = nn.LayerNorm(3)
    norm.weight.data.fill_(7)
    net = nn.Sequential(norm, model)
    scaling = architecture_scaling(net, torch.zeros(2, 3))
    scaling.initialize(net, seed=3)
    for name, variance in scaling.variances.items():
        values = net.get_parameter(name).detach().double()
        assert float(values.square().mean()) == pytest.approx(variance, rel=6 / math.sqrt(values.numel()))
    assert all(not param.any() for name, param in model.named_parameters() if name.endswith("bias"))
    assert norm.weight.tolist() == [7, 7, 7]
    again = nn.Sequential(nn.LayerNorm(3), Wired([[2], [2, 2]], width=200))
    scaling.initialize(again, seed=3)
    assert torch.equal(again[1].stem.weight, model.stem.weight)
    scaling.initialize(again, seed=4)
    assert not torch.equal(again[1].stem.weight, model.stem.weight)


def test_tied_weights_take_the_lesser_variance():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(functional.relu(self.first(x)))

    model = Tied()
    scaling = architecture_scaling(model, torch.zeros(2, 3))
    assert scaling.variances == {"first.weight": pytest.approx(1 / 9)}
    scaling.initialize(model)
    assert not model.second.bias.any()


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x, y):
            joined = torch.cat([self.a(x), y], 1)[:, :3]
            return self.b(joined), self.c(self.a(x).relu())

    scaling = architecture_scaling(Two(), (torch.zeros(2, 3), torch.zeros(2, 3)))
    assert scaling.depths == {1: 1, 2: 2}


def test_what_the_rule_says_nothing_about():
    example = torch.zeros(2, 3)
    with pytest.raises(SettingError, match="no path from an input to an output of ReLU"):
        architecture_scaling(nn.ReLU(), example)
    with pytest.raises(SettingError, match="the rule says nothing of gru with weights"):
        architecture_scaling(nn.GRU(3, 3, batch_first=True), torch.zeros(2, 4, 3))
    with pytest.raises(SettingError, match="computed from several tensors"):
        architecture_scaling(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), example)

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError):
        architecture_scaling(Branching(), example)

    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return torch.cond(self.layer(x).sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))

    with pytest.raises(SettingError, match="does not look inside"):
        architecture_scaling(Switching(), example)
    scaling = architecture_scaling(nn.Linear(3, 2), example)
    with pytest.raises(SettingError, match="Sequential has no parameter 'weight'"):
        scaling.initialize(nn.Sequential(nn.Linear(3, 2)))
    for wrong in (0.0, -1.0, math.nan, math.inf, "1", True):
        with pytest.raises(SettingError, match="base_lr must be a positive number"):
            scaling.lr_for(scaling, wrong)
