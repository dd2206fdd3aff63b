"""Low rank: against dense decompositions, layers against their reconstructed weight, ranks against every choice."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.compress._layer_inputs import Moments
from netwright.compress._low_rank_factors import cost_of, effective_rank, factorized, matrix_of, option_of
from netwright.compress._low_rank_layers import Layer, layers_of
from netwright.compress.low_rank import LowRank
from netwright.core.data import Data
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.graph import export_model
from netwright.core.graph.macs import total_macs
from netwright.core.task import Task
from netwright.testing import check_transform, small_tasks
from tests.graph.zoo import build


def task_for(model: nn.Module, inputs: object, items: int = 8) -> Task:
    """A task whose items are those of one batch, over and over."""

    class Items(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return items

        def __getitem__(self, index: int) -> object:
            if isinstance(inputs, dict):
                return {key: value[index % len(value)] for key, value in inputs.items()}, 0
            if isinstance(inputs, tuple):
                return tuple(value[index % len(value)] for value in inputs), 0
            return inputs[index % len(inputs)], 0

    return Task("one", model, Data(Items(), Items(), Items()), functional.cross_entropy, lambda o, t: 0.0)


@given(st.lists(st.floats(0.01, 9), min_size=1, max_size=8))
def test_effective_rank_is_the_exponential_of_the_entropy(values) -> None:
    share = np.array(values) / sum(values)
    naive = np.exp(-sum(p * np.log(p) for p in share))
    assert effective_rank(torch.tensor([*values, 0.0])) == pytest.approx(naive, rel=1e-6)
    assert 1 - 1e-9 <= naive <= len(values) + 1e-9


def test_linear_layer_is_the_truncated_svd() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(9, 6).double()
    option = option_of(Layer("", layer, (((1.0,), (1.0,)),)), "channel", "macs", None)
    u, s, v = np.linalg.svd(layer.weight.detach().numpy(), full_matrices=False)
    for rank in (1, 3, 6):
        made = factorized(layer, "channel", option.basis, option.mean, rank)
        dense = (made[1].weight @ made[0].weight).detach().numpy()
        np.testing.assert_allclose(dense, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-12)
        assert torch.equal(made[1].bias, layer.bias)


def test_outputs_are_as_near_as_the_principal_components_of_the_outputs() -> None:
    """The mean square error is the sum of the eigenvalues left out, the mean is kept, and no other map is nearer."""
    torch.manual_seed(0)
    layer = nn.Linear(9, 6).double()
    x = torch.randn(200, 9, dtype=torch.float64) @ torch.randn(9, 9, dtype=torch.float64) + 2
    y = layer(x).detach()
    moments = Moments(6, y.device)
    moments.add(y)
    option = option_of(Layer("", layer, (((1.0,), (1.0,)),)), "channel", "macs", moments)
    values = np.sort(np.linalg.eigvalsh(np.cov(y.numpy().T, bias=True)))[::-1]
    for rank in (1, 2, 4):
        got = factorized(layer, "channel", option.basis, option.mean, rank)(x).detach()
        error = float((got - y).square().sum(1).mean())
        assert error == pytest.approx(values[rank:].sum(), rel=1e-9)
        torch.testing.assert_close(got.mean(0), y.mean(0))
        plain = factorized(layer, "channel", *weights_only(layer), rank)(x).detach()
        assert error < float((plain - y).square().sum(1).mean())


def weights_only(layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    option = option_of(Layer("", layer, (((1.0,), (1.0,)),)), "channel", "macs", None)
    return option.basis, option.mean


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d]),
    spatial=st.booleans(),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same"]),
    mode=st.sampled_from(["zeros", "replicate"]),
    rank=st.integers(1, 6),
)
def test_convolutions_equal_their_reconstructed_weight(kind, spatial, stride, dilation, padding, mode, rank) -> None:
    torch.manual_seed(0)
    spatial = spatial and kind is nn.Conv2d
    stride = 1 if padding == "same" else stride
    layer = kind(2, 5, 3, stride, padding, dilation, padding_mode=mode).double()
    way = "spatial" if spatial else "channel"
    option = option_of(Layer("", layer, (((9.0, 9.0), (9.0, 9.0)),)), way, "parameters", None)
    rank = min(rank, option.full)
    u, s, v = torch.linalg.svd(matrix_of(layer, way).double(), full_matrices=False)
    near = (u[:, :rank] * s[:rank]) @ v[:rank]
    if spatial:  # (c, h, n, w)
        near = near.reshape(2, 3, 5, 3).permute(2, 0, 1, 3)
    dense = kind(2, 5, 3, stride, padding, dilation, padding_mode=mode).double()
    dense.weight = nn.Parameter(near.reshape(layer.weight.shape))
    dense.bias = layer.bias
    x = torch.randn(2, 2, *[9] * (layer.weight.ndim - 2), dtype=torch.float64)
    torch.testing.assert_close(factorized(layer, way, option.basis, option.mean, rank)(x), dense(x))


def test_costs_are_those_counted() -> None:
    """What a layer and its two parts cost is what the count of operations of the exported models says."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 7, (3, 5), (2, 1), (1, 0)), nn.Flatten(2), nn.Linear(42, 20)).eval()
    x = torch.randn(2, 3, 12, 11)
    model[2] = nn.Linear(model[:2](x).shape[-1], 20)
    conv, linear = layers_of("test", model, x)
    assert cost_of(conv, "macs") + cost_of(linear, "macs") == total_macs(export_model(model, x))
    for layer, ways in ((conv, ("channel", "spatial")), (linear, ("channel",))):
        inputs = x if layer is conv else model[:2](x).detach()
        for way in ways:
            option = option_of(layer, way, "macs", None)
            made = factorized(layer.module, way, option.basis, option.mean, 2)
            assert 2 * option.unit == total_macs(export_model(made, inputs))


@pytest.mark.parametrize("rule", ["effective", "uniform"])
@pytest.mark.parametrize("count", ["macs", "parameters"])
def test_budget_is_met_and_nearly_spent(rule, count) -> None:
    for task in small_tasks()[:2]:
        whole = total_macs(export_model(task.model, task.example())) if count == "macs" else parameters(task.model)
        smaller = LowRank(0.3, rule=rule, count=count)(task.model, task)
        left = total_macs(export_model(smaller, task.example())) if count == "macs" else parameters(smaller)
        assert 0.5 * whole <= left <= 0.71 * whole + (400 if count == "parameters" else 200)  # norms, attention


def parameters(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters() if value.ndim > 1)


def test_common_factor_is_the_largest_of_all() -> None:
    """Ranks are those of an exhaustive search over the factor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 14), nn.ReLU(), nn.Linear(14, 12), nn.ReLU(), nn.Linear(12, 10)).eval()
    task = task_for(model, torch.randn(8, 16))
    smaller = LowRank(0.4, metric="weights")(model, task)
    dense = [m for m in model if isinstance(m, nn.Linear)]
    effective = [effective_rank(torch.linalg.svdvals(m.weight.detach().double())) for m in dense]
    budget = 0.6 * sum(m.weight.numel() for m in dense)

    def cost(ranks: list[int]) -> int:
        return sum(min(m.weight.numel(), r * sum(m.weight.shape)) for m, r in zip(dense, ranks, strict=True))

    def at(factor: float) -> list[int]:
        pairs = zip(dense, effective, strict=True)
        return [max(1, min(min(m.weight.shape), round(factor * e))) for m, e in pairs]

    best = max((f for f in np.arange(0, 3, 1e-3) if cost(at(f)) <= budget), default=0)
    got = [m[0].out_features if isinstance(m, nn.Sequential) else 99 for m in smaller if not isinstance(m, nn.ReLU)]
    wanted = [r if r * sum(m.weight.shape) < m.weight.numel() else 99 for m, r in zip(dense, at(best), strict=True)]
    assert got == wanted


@pytest.mark.parametrize("name", ["resnext", "transformer", "hf-gpt2", "two-inputs"])
def test_works_on_architectures(name) -> None:
    model, inputs = build(name)
    task = task_for(model, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for metric in ("outputs", "weights"):
        smaller = LowRank(0.05, metric=metric)(model, task)
        assert total_macs(export_model(smaller, task.example())) < total_macs(export_model(model, task.example()))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_full_rank_would_change_nothing() -> None:
    """Layers whose matrices have low rank are written exactly, however much goes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 16)).eval()
    with torch.no_grad():
        for layer, inputs in zip((model[0], model[2]), (20, 16), strict=True):
            layer.weight.copy_(torch.randn(16, 2) @ torch.randn(2, inputs) / 4)
    x = torch.randn(32, 20)
    for metric, ratio in itertools.product(("outputs", "weights"), (0.4, 0.7)):
        smaller = LowRank(ratio, metric=metric)(model, task_for(model, x, 32))
        torch.testing.assert_close(smaller(x), model(x), rtol=1e-4, atol=1e-4)


def test_conforms() -> None:
    check_transform(lambda: LowRank(0.3))


def test_layers_whose_weight_others_look_at_stay_whole() -> None:
    model, inputs = build("transformer")
    names = [layer.name for layer in layers_of("test", model, inputs)]
    assert names
    assert not [name for name in names if "linear1" in name or "linear2" in name]
    assert all(type(module) in (nn.Linear, nn.Conv2d) for name, module in model.named_modules() if name in names)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": 0.0}, r"ratio must lie in \(0, 1\), got 0.0"),
        ({"ratio": 1.0}, r"ratio must lie in \(0, 1\), got 1.0"),
        ({"rule": "best"}, "rule must be 'effective' or 'uniform', got 'best'"),
        ({"metric": "loss"}, "metric must be 'outputs' or 'weights'"),
        ({"scheme": "tucker"}, "scheme must be 'auto' or 'channel' or 'spatial'"),
        ({"count": "bytes"}, "count must be 'macs' or 'parameters'"),
        ({"least_share": 2.0}, "least_share must be a finite number, at least 0 and at most 1"),
        ({"calibration_items": 0}, "calibration_items must be a positive integer, got 0"),
        ({"exclude": "fc"}, r"exclude must be a sequence of names; write \('fc',\)"),
    ],
)
def test_refuses_settings(given, message) -> None:
    with pytest.raises(TransformError, match=f"LowRank.{message}"):
        LowRank(**given)


def test_refuses_models() -> None:
    task = small_tasks()[1]
    with pytest.raises(
        TransformError, match=r"ratio=0.99 is out of reach: with rank one everywhere 0.9\d\d of all oper"
    ):
        LowRank(0.99)(task.model, task)
    with pytest.raises(TransformError, match=r"exclude names 'head', which Sequential does not have. Its modules"):
        LowRank(exclude=["head"])(task.model, task)
    with pytest.raises(NothingToPruneError, match=r"has no linear layer or .* outside exclude=\['0', '2', '4'\]"):
        LowRank(exclude=["0", "2", "4"])(task.model, task)
    data = TensorDataset(torch.full((64, 20), 3e38), torch.zeros(64).long())
    broken = dataclasses.replace(task, data=Data(data, task.data.val, task.data.test))
    with pytest.raises(TransformError, match="activations at 0 are not finite on training data"):
        LowRank()(task.model, broken)
