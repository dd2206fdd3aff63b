"""Graph hypernetworks: slices against indices, scale against Kaiming, gradients by differences, bad input."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.errors import ArtifactError, SettingError, TraceError
from netwright.core.task import Task
from netwright.search._ghn_decoder import Decoder, fitted, normalized
from netwright.search._ghn_fit import network_loss
from netwright.search._ghn_graph import Node, network_graph
from netwright.search._ghn_networks import random_networks
from netwright.search.graph_hypernetwork import GraphHyperNetwork


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def small(**changes):
    return GraphHyperNetwork(3, **({"largest": (8, 8, 3, 3), "features": 8} | changes))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = functional.relu(self.stem(x))
        return self.head((self.inner(x) + x).mean((2, 3)).view(x.shape[0], -1))


@settings(deadline=None, max_examples=40)
@given(st.tuples(*[st.integers(1, 9)] * 2, *[st.integers(1, 3)] * 2), st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_slices_and_tiles_against_indices(shape, channels):
    values = torch.arange(float(channels[0] * channels[1] * 9)).view(*channels, 3, 3)
    found = fitted(values, shape)
    assert tuple(found.shape) == shape
    for place in np.ndindex(*shape):
        assert found[place] == values[place[0] % channels[0], place[1] % channels[1], place[2], place[3]]


@pytest.mark.parametrize("shape", [(3, 2, 1, 1), (5, 4, 3, 3), (2, 4, 1, 3)])
def test_decoding_a_part_is_a_part_of_decoding_all(shape):
    torch.manual_seed(0)
    decoder, states = Decoder(8, (5, 4, 3, 3), 2), torch.randn(6, 8)
    cut = tuple(slice(size) for size in shape)
    torch.testing.assert_close(
        decoder.matrices(states, shape), decoder.matrices(states, (5, 4, 3, 3))[(slice(None), *cut)]
    )


def test_predicted_layers_keep_variance_like_kaiming():
    values = torch.randn(64, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(16, 32, 12, 12, generator=torch.Generator().manual_seed(1))
    for gain in (1.0, 2.0):
        weight = normalized(values, Node("convolution", "w", None, (64, 32, 3, 3), gain))
        assert float(functional.conv2d(inputs, weight).var()) == pytest.approx(gain, rel=0.1)
        assert float(weight.std()) == pytest.approx((gain / (32 * 9)) ** 0.5, rel=0.02)
    norm = normalized(torch.tensor([[-4.0, 0.0, 4.0], [-9.0, 0.0, 9.0]]), Node("norm", "w", "b", (3, 1, 1, 1)))
    torch.testing.assert_close(norm[0], 2 / (1 + torch.exp(-torch.tensor([-2.0, 0.0, 2.0]))))
    torch.testing.assert_close(norm[1], torch.tanh(torch.tensor([-1.8, 0.0, 1.8])))


def test_fresh_predictions_have_the_scale_of_their_layers():
    network = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 3))
    weights = [small(seed=seed).predict(network) for seed in range(20)]
    for layer, gain in ((0, 2.0), (2, 1.0)):  # 2 before the rectifier
        variance = torch.stack([model[layer].weight.var() for model in weights]).mean()
        assert variance.item() == pytest.approx(gain / 72, rel=0.35)


def test_the_graph_of_a_residual_network():
    graph = network_graph(Residual())
    kinds = [node.operation for node in graph.nodes]
    assert kinds[:6] == ["input", "convolution", "bias", "rectifier", "depthwise", "norm"]
    assert kinds[6:] == ["rectifier", "sum", "global_pool", "classifier", "bias"]
    assert (3, 7) in graph.edges
    assert (6, 7) in graph.edges
    assert len(graph.edges) == 11
    assert [node.gain for node in graph.nodes if node.operation in ("convolution", "depthwise")] == [2.0, 2.0]
    assert graph.nodes[5] == Node("norm", "inner.1.weight", "inner.1.bias", (4, 1, 1, 1))


def test_gradients_through_predicted_weights_by_differences():
    ghn, model = small().double(), Residual().double().train()
    batch = torch.rand(6, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    graph = ghn.graph(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss():
        return network_loss(tiny(), model, ghn([graph])[0], batch)

    torch.autograd.backward(loss())
    for name in ("operations.weight", "gnn.far.0.weight", "gnn.cell.weight_hh", "decoder.weights.weight"):
        value = ghn.get_parameter(name)
        place = np.unravel_index(int(value.grad.abs().argmax()), value.shape)
        sides = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                value[place] += step
                sides.append(float(loss()))
                value[place] -= step
        assert float(value.grad[place]) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def tiny(seed=0, count=64):
    generator = torch.Generator().manual_seed(seed)

    def split():
        targets = torch.arange(count) % 3
        return TensorDataset(torch.rand(count, 1, 4, 4, generator=generator) + targets.view(-1, 1, 1, 1), targets)

    return Task("tiny", Residual, Data(split(), split(), split()), functional.cross_entropy, lambda o, t: 0.0)


def test_training_repeats_and_helps_a_network_it_has_not_seen():
    networks, runs = [Residual(), nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))], []
    for _ in range(2):
        ghn = small()
        losses = ghn.fit(tiny(), networks, steps=100, meta_batch=2, batch_size=32, lr=3e-3, seed=4)
        runs.append((losses, ghn))
    assert runs[0][0] == runs[1][0]
    assert np.mean(runs[0][0][-10:]) < 0.8 * np.mean(runs[0][0][:5])
    unseen = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))
    inputs, targets = tiny(1).data.val.tensors
    rate = [float((model(inputs).argmax(1) == targets).float().mean()) for model in (ghn.predict(unseen), unseen)]
    assert rate[0] > rate[1] + 0.2


def test_running_statistics_are_those_of_the_batches():
    model, inputs = Residual(), [torch.rand(8, 1, 4, 4), 2 * torch.rand(8, 1, 4, 4)]
    ghn = small()
    predicted, by_batch = ghn.predict(model, inputs), ghn.predict(model)
    seen = [predicted.inner[0](functional.relu(predicted.stem(batch))) for batch in inputs]
    wanted = torch.stack([part.mean((0, 2, 3)) for part in seen]).mean(0)
    torch.testing.assert_close(predicted.inner[1].running_mean, wanted)
    torch.testing.assert_close(predicted.inner[1].running_var, torch.stack([p.var((0, 2, 3)) for p in seen]).mean(0))
    torch.testing.assert_close(by_batch(inputs[0]), predicted.train()(inputs[0]))
    assert predicted.inner[1].momentum == 0.1


def test_what_is_saved_is_loaded(tmp_path):
    ghn, model = small(cutoff=3, seed=5), Residual()
    ghn.save(tmp_path / "ghn")
    again = GraphHyperNetwork.load(tmp_path / "ghn")
    for one, two in zip(ghn.predict(model).parameters(), again.predict(model).parameters(), strict=True):
        assert torch.equal(one, two)
    settings_file = tmp_path / "ghn" / "hypernetwork.json"
    settings_file.write_text(json.dumps({"classes": 3}))
    with pytest.raises(ArtifactError, match="does not hold the settings"):
        GraphHyperNetwork.load(tmp_path / "ghn")
    with pytest.raises(ArtifactError, match="does not hold the settings"):
        GraphHyperNetwork.load(tmp_path / "nowhere")


def test_random_networks_differ_and_repeat():
    ghn = GraphHyperNetwork(10, largest=(8, 8, 3, 3), features=8)
    graphs = [ghn.graph(network) for network in random_networks(20, 0)]
    assert len({(graph.nodes, graph.edges) for graph in graphs}) >= 18
    assert [ghn.graph(network) for network in random_networks(3, 0)] == graphs[:3]
    wide = random_networks(1, 3)[0]
    assert ghn.predict(wide)(torch.rand(2, 1, 8, 8)).isfinite().all()  # 8 channels tiled to its widths


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Loose(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (Branching(), TraceError, "Control flow"),
        (Loose(), SettingError, "'scale' outside of a layer"),
        (nn.Sequential(nn.LSTM(3, 3)), SettingError, "Layer '0' is a LSTM"),
        (nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten(), nn.Linear(4, 3)), SettingError, "0.weight has a kernel of 5"),
        (nn.Linear(4, 7), SettingError, "has 7 outputs"),
        (nn.Sequential(nn.ReLU()), SettingError, "no parameter to predict"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), SettingError, "no parameter of its own"),
    ],
)
def test_networks_that_are_not_supported_are_named(model, error, words):
    model = model if not isinstance(model, nn.Linear) else nn.Sequential(model)
    with pytest.raises(error, match=words):
        small().predict(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": 6}, "divisible by 4"),
        ({"cutoff": 0}, "cutoff"),
        ({"largest": (8, 8, 3)}, "largest="),
        ({"rounds": float("nan")}, "rounds"),
    ],
)
def test_bad_settings(change, words):
    with pytest.raises(SettingError, match=words):
        small(**change)


@pytest.mark.parametrize(
    ("change", "words"), [({"lr": float("nan")}, "lr"), ({"steps": 0}, "steps"), ({"clip_norm": -1.0}, "clip_norm")]
)
def test_bad_training(change, words):
    with pytest.raises(SettingError, match=words):
        small().fit(tiny(), [Residual()], **change)
    with pytest.raises(SettingError, match="at least one architecture"):
        small().fit(tiny(), [])
