"""HAO: the programme against exhaustive search, the model against a transcription, traces, pruning, bad input."""

import itertools
import math

import cloudpickle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, IntDistribution
from torch import nn

from netwright.core.builtin.networks import ResNet
from netwright.core.graph.export import export_model
from netwright.core.graph.macs import total_macs
from netwright.search import Rule, SearchSpace, SpaceError
from netwright.search._encoding import Encoding
from netwright.search.hao import ZU3EG, Convolution, Device, HAOMapper, MappingError, UnprovenError, convolutions

torch.set_num_threads(1)
UNROLLS, ROWS = (1, 3, 4, 8), (1, 2, 5)


def transcribed(layers, chosen, device):
    """Latency in ms, DSPs and buffer in KB of ``chosen[kind] = (P_in, P_out, R)``, from the docstrings' equations."""
    groups, used = [[]], set()
    for layer in layers:
        if layer.kind in used:
            groups.append([])
            used = set()
        groups[-1].append(layer)
        used.add(layer.kind)
    total = 0.0
    for group in groups:
        times, traffic = [], 0.0
        for place, layer in enumerate(group):
            p_in, p_out, rows = chosen[layer.kind]
            c, d, g = layer.channels_in, layer.channels_out, layer.groups
            steps = math.ceil(d / p_out) if g == c > 1 else g * math.ceil(c / g / p_in) * math.ceil(d / g / p_out)
            times.append(steps * layer.height * layer.width * layer.kernel**2)
            traffic += d * c / g * layer.kernel**2 * math.ceil(layer.height / rows) * layer.bits / 8
            if place == 0:
                traffic += c * layer.height * layer.width * layer.stride**2 * layer.bits / 8
            if place == len(group) - 1:
                traffic += d * layer.height * layer.width * layer.bits / 8
        seconds = max(max(times) / (device.clock_mhz * 1e6), traffic / (device.bandwidth_gbs * 1e9))
        total += 1000 * seconds
    dsps, buffer_kb = 0, 0.0
    for kind, (p_in, p_out, rows) in chosen.items():
        own = [layer for layer in layers if layer.kind == kind]
        bits = max(layer.bits for layer in own)
        dsps += math.ceil(p_in * p_out / (4 if bits <= 4 else 2 if bits <= 8 else 1))
        high = [(min(rows, layer.height) - 1) * layer.stride + layer.kernel for layer in own]
        tile = max(h * layer.channels_in * layer.width * layer.stride for h, layer in zip(high, own, strict=True))
        row = max(layer.channels_out * layer.width for layer in own)
        buffer_kb += (tile + 2 * p_in * p_out * own[0].kernel ** 2 + 2 * row) * bits / 8192
    return total, dsps, buffer_kb


def exhaustive(layers, device, unrolls=UNROLLS, tiles=ROWS):
    """The least latency of all configurations that fit; infinite where none does."""
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    choices = [
        list(itertools.product((1,) if kind.startswith("depthwise") else unrolls, unrolls, tiles)) for kind in kinds
    ]
    best = math.inf
    for combination in itertools.product(*choices):
        latency, dsps, buffer_kb = transcribed(layers, dict(zip(kinds, combination, strict=True)), device)
        if dsps <= device.dsps and buffer_kb <= device.buffer_kb:
            best = min(best, latency)
    return best


LAYER = st.builds(
    lambda inner, outer, side, kernel, stride, groups, bits: Convolution(
        inner * groups,
        (inner if groups == 4 and inner == 1 else outer) * groups,
        side,
        side,
        kernel,
        stride,
        groups,
        bits,
    ),
    st.sampled_from([1, 5, 12]),
    st.sampled_from([1, 4, 9]),
    st.integers(1, 9),
    st.sampled_from([1, 3]),
    st.integers(1, 2),
    st.sampled_from([1, 4]),
    st.sampled_from([4, 8, 16]),
)


@given(
    layers=st.lists(LAYER, min_size=1, max_size=6).filter(lambda found: len({layer.kind for layer in found}) <= 2),
    dsps=st.integers(1, 60),
    buffer_kb=st.floats(0.2, 6.0),
    bandwidth=st.floats(0.05, 5.0),
)
@settings(deadline=None, max_examples=40)
def test_the_programme_finds_what_exhaustive_search_finds(layers, dsps, buffer_kb, bandwidth):
    device = Device(dsps, buffer_kb, bandwidth)
    mapper, best = HAOMapper(device, UNROLLS, ROWS), exhaustive(layers, device)
    if math.isinf(best):
        with pytest.raises(MappingError, match="No configuration fits"):
            mapper.map(layers)
        return
    found = mapper.map(layers)
    assert found.latency_ms == pytest.approx(best, rel=1e-9)
    chosen = {kind: (engine.unroll_in, engine.unroll_out, engine.rows) for kind, engine in found.engines.items()}
    wanted = (found.latency_ms, found.dsps, found.buffer_kb)
    assert transcribed(layers, chosen, device) == pytest.approx(wanted, rel=1e-9)
    assert found.dsps <= dsps
    assert found.buffer_kb <= buffer_kb
    assert mapper.latency_ms(layers, found.engines) == pytest.approx(found.latency_ms)
    assert sum(found.subgraph_ms) == pytest.approx(found.latency_ms)


def test_three_kinds_with_scarce_resources():
    block = [
        Convolution(8, 24, 8, 8),
        Convolution(24, 24, 8, 8, kernel=3, groups=24, bits=4),
        Convolution(24, 8, 8, 8),
        Convolution(8, 16, 4, 4, kernel=3, stride=2),
    ]
    for dsps in (8, 16, 33):
        device = Device(dsps, 8.0, 0.5)
        assert HAOMapper(device, UNROLLS, ROWS).map(block).latency_ms == pytest.approx(exhaustive(block, device))
    assert HAOMapper(device, UNROLLS, ROWS).configurations(block) == 48 * 12 * 48


@pytest.mark.parametrize("dsps", [150, 700, 5000])
def test_sizes_far_apart_cost_no_accuracy(dsps):
    layers = [
        Convolution(512, 512, 56, 56, kernel=3),
        Convolution(512, 100, 56, 56),
        Convolution(3, 512, 56, 56, kernel=3, stride=2),
        Convolution(512, 3),
        Convolution(512, 512, 2, 2, kernel=3),
    ]
    device, unrolls, tiles = Device(dsps, 1e5, 400.0), (1, 3, 17, 64), (1, 7, 56)
    best = exhaustive(layers, device, unrolls, tiles)
    assert HAOMapper(device, unrolls, tiles).map(layers).latency_ms == pytest.approx(best, rel=1e-9)


def test_more_of_anything_is_never_slower():
    layers = convolutions(ResNet(1, 16, 10), torch.zeros(1, 1, 28, 28))
    least = HAOMapper(Device(40, 60.0, 1.0)).map(layers).latency_ms
    for device in (Device(80, 60.0, 1.0), Device(40, 120.0, 1.0), Device(40, 60.0, 2.0)):
        assert HAOMapper(device).map(layers).latency_ms <= least * (1 + 1e-9)
    double = HAOMapper(Device(40, 60.0, 2.0, clock_mhz=400.0)).map(layers).latency_ms
    assert double == pytest.approx(least / 2)
    assert HAOMapper(ZU3EG).map(layers).latency_ms < least


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        self.same = nn.Conv2d(8, 8, 3, padding="same", groups=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.same(self.first(x)).mean((2, 3)))


TOKENS = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12), nn.Flatten(), nn.Linear(12 * 7 * 3, 5))


@pytest.mark.parametrize(
    ("model", "shape"), [(ResNet(1, 8, 10), (1, 12, 12)), (Odd(), (3, 11, 9)), (TOKENS, (7, 3, 12))]
)
def test_traced_layers_have_the_macs_of_the_trace(model, shape):
    inputs = torch.zeros(2, *shape)
    layers = convolutions(model, inputs, bits=4)
    macs = sum(
        layer.channels_out * layer.channels_in // layer.groups * layer.height * layer.width * layer.kernel**2
        for layer in layers
    )
    assert macs == total_macs(export_model(model, inputs))
    assert {layer.bits for layer in layers} == {4}
    one = HAOMapper(Device(1000, 1e6, 1e6), unrolls=(1,), rows=(64,)).map(layers)
    assert one.latency_ms <= macs / 200_000


def test_restricted_space_keeps_exactly_the_networks_in_time():
    space = SearchSpace(
        {"width": IntDistribution(4, 32, step=4), "kernel": CategoricalDistribution((1, 3))},
        rules=[Rule("kernel", lambda p: p["kernel"] == 3 or p["width"] > 4, "narrow needs 3")],
        features=lambda p: [p["width"] ** 2],
    )
    device = Device(12, 3.0, 0.2)

    def workload(params):
        width = params["width"]
        return [Convolution(4, width, 6, 6, kernel=params["kernel"]), Convolution(width, 8, 6, 6)]

    mapper, limit = HAOMapper(device, UNROLLS, ROWS), 0.006
    left = cloudpickle.loads(cloudpickle.dumps(mapper.restrict(space, workload, limit)))
    kept = 0
    for width, kernel in itertools.product(range(4, 33, 4), (1, 3)):
        params = {"width": width, "kernel": kernel}
        best = exhaustive(workload(params), device)
        assert left.valid(params) == (best <= limit and space.valid(params))
        kept += left.valid(params)
        assert left.features(params) == pytest.approx([width**2, min(best, 1000 * limit)])
    assert 2 < kept < 14
    with pytest.raises(SpaceError, match="latency on the best hardware must be at most 1e-06 ms"):
        mapper.restrict(space, workload, 1e-6).sample(np.random.default_rng(0))


def test_a_programme_without_time_prunes_nothing_in_silence():
    """What is not proven may be a good network; what cannot fit is none."""
    space = SearchSpace({"width": IntDistribution(4, 64, step=4)})
    mapper = HAOMapper(ZU3EG, seconds=1e-6)

    def workload(params):
        width = params["width"]
        return [Convolution(width, width, 16, 16, kernel=3), Convolution(width, 8, 16, 16)]

    left = mapper.restrict(space, workload, 1e3)
    for ask in (left.valid, left.features, lambda params: mapper.map(workload(params))):
        with pytest.raises(UnprovenError, match=r"No proven optimum after 1e-06 s .* Raise seconds"):
            ask({"width": 64})
    tiny = HAOMapper(Device(1, 0.1, 1.0), seconds=1e-6).restrict(space, workload, 1e3)
    assert not tiny.valid({"width": 64})


@pytest.mark.parametrize("every", [False, True])
def test_the_limit_holds_where_the_first_decision_does_not_count(every):
    """A rule is asked only where the decision that it blames counts."""
    active = {"kernel": lambda p: p["wide"]}
    if every:
        active["wide"] = lambda p: True
    space = SearchSpace(
        {"kernel": CategoricalDistribution((1, 3)), "wide": CategoricalDistribution((False, True))}, active=active
    )

    def workload(params):
        return [Convolution(4, 32, 6, 6, kernel=params["kernel"] if params["wide"] else 5)]

    mapper = HAOMapper(Device(12, 30.0, 0.2), UNROLLS, ROWS)
    times = [mapper.map([Convolution(4, 32, 6, 6, kernel=kernel)]).latency_ms for kernel in (1, 3, 5)]
    left = mapper.restrict(space, workload, (times[1] + times[2]) / 2)
    assert all(left.valid({"kernel": kernel, "wide": True}) for kernel in (1, 3))
    assert not left.valid({"wide": False})
    encoding = Encoding(left)
    rows = np.array([encoding.genes({"kernel": kernel, "wide": wide}) for kernel in (1, 3) for wide in (True, False)])
    assert encoding.features(rows)[:, -1] == pytest.approx([times[0], times[2], times[1], times[2]])


def test_too_small_a_device_is_told_what_would_do():
    layers = [Convolution(4, 8, 6, 6, kernel=3), Convolution(8, 8, 6, 6)]
    with pytest.raises(MappingError, match=r"need 2 DSPs and 0\.3 KB .* dsps=2, buffer_kb=0\.4\."):
        HAOMapper(Device(1, 0.1, 1.0)).map(layers)
    assert HAOMapper(Device(2, 0.4, 1.0)).map(layers).dsps == 2
    with pytest.raises(MappingError, match=r"dsps=2, buffer_kb=50\."):
        HAOMapper(Device(1, 50.0, 1.0)).map(layers)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HAOMapper(ZU3EG).map([]), "network is empty"),
        (lambda: HAOMapper(ZU3EG, unrolls=()), "unrolls"),
        (lambda: HAOMapper(ZU3EG, rows=(0,)), "rows"),
        (lambda: HAOMapper(ZU3EG, seconds=0), "seconds"),
        (lambda: HAOMapper(ZU3EG).restrict(SearchSpace({"a": IntDistribution(0, 1)}), list, 0.0), "latency_ms"),
        (lambda: Device(0, 1.0, 1.0), "dsps must be positive"),
        (lambda: Device(1, 1.0, math.nan), "bandwidth_gbs"),
        (lambda: Convolution(0, 4), "channels_in"),
        (lambda: Convolution(4, 4, height=2.5), "height"),
        (lambda: Convolution(6, 4, groups=4), "groups must divide"),
        (lambda: Convolution(4, 4, bits=32), "bits must be at most 16"),
        (lambda: convolutions(nn.ReLU(), torch.zeros(1, 4)), "no convolution"),
        (lambda: convolutions(nn.Conv2d(1, 2, (1, 3)), torch.zeros(1, 1, 4, 4)), "kernel"),
        (lambda: convolutions(nn.Conv2d(1, 2, 3, dilation=2), torch.zeros(1, 1, 6, 6)), "dilation"),
        (lambda: convolutions(nn.ConvTranspose2d(1, 2, 3), torch.zeros(1, 1, 6, 6)), "cannot be mapped"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(MappingError, match=words):
        make()
