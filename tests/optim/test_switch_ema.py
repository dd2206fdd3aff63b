"""SwitchEMA against the recursion in NumPy and core's MovingAverage, and when parts of the model are exchanged."""

import contextlib
import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from netwright.core.average import MovingAverage
from netwright.core.errors import SettingError, StateDictError
from netwright.optim.switch_ema import SwitchEMA


def _network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


def _iterate(model, seed):
    """What an iteration does: moves weights, and the statistics of the batch norm by a pass in training mode."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    with torch.no_grad():
        model(torch.randn(4, 1, 4, 4, generator=generator))
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator).to(param.dtype), alpha=0.1)


def _same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items()) and first.keys() == second.keys()


@pytest.mark.parametrize("warmup", [True, False])
def test_equals_the_recursion_with_switches_written_with_numpy(warmup):
    model = nn.Linear(3, 2, dtype=torch.float64)
    average = SwitchEMA(model, 0.9, warmup=warmup)
    weight = model.weight.detach().numpy().copy()
    mean, draw = weight.copy(), np.random.default_rng(0)
    for epoch in range(3):
        for step in range(7):
            move = draw.normal(size=(2, 3))
            with torch.no_grad():
                model.weight.add_(torch.from_numpy(move))
            average.update(model)
            weight = weight + move
            count = 7 * epoch + step + 1
            keep = min(0.9, (1 + count) / (10 + count)) if warmup else 0.9
            mean = keep * mean + (1 - keep) * weight
        average.end_epoch(model)
        weight = mean.copy()
        np.testing.assert_allclose(model.weight.detach().numpy(), mean, rtol=1e-12, atol=1e-14)
    assert not np.allclose(model.weight.detach().numpy(), weight + move)


def test_without_switches_it_is_the_moving_average_of_core_to_the_last_bit():
    model = _network()
    mine, theirs = SwitchEMA(model, 0.99), MovingAverage(model, 0.99)
    for step in range(25):
        _iterate(model, step)
        mine.update(model)
        theirs.update(model)
    assert _same(mine.state_dict()["average"], theirs.state_dict()["average"])
    assert mine.state_dict()["steps"] == theirs.state_dict()["steps"] == 25
    missing = [name for name in dir(MovingAverage) if not name.startswith("_") and not hasattr(mine, name)]
    assert not missing


def test_the_switch_takes_the_statistics_of_batch_norm_along():
    model = _network()
    average = SwitchEMA(model, 0.9)
    for step in range(5):
        _iterate(model, step)
        average.update(model)
    expected = copy.deepcopy(average.state_dict()["average"])
    assert not torch.equal(model[1].running_var, expected["1.running_var"])
    average.end_epoch(model)
    assert _same(model.state_dict(), expected)
    assert int(model[1].num_batches_tracked) == 5
    _iterate(model, 99)
    assert not torch.equal(model[0].weight, expected["0.weight"])
    assert _same(average.state_dict()["average"], expected)  # the model moves on, the average does not follow yet


def test_data_gives_the_exact_statistics_of_the_averaged_weights():
    model = _network()
    average = SwitchEMA(model, 0.9)
    for step in range(5):
        _iterate(model, step)
        average.update(model)
    data = torch.randn(24, 1, 4, 4, generator=torch.Generator().manual_seed(7))
    average.end_epoch(model, [(part, None) for part in data.split(8)])
    found = model[0](data).detach()
    torch.testing.assert_close(model[1].running_mean, found.mean((0, 2, 3)))
    batches = torch.stack([model[0](part).detach().var((0, 2, 3)) for part in data.split(8)])
    torch.testing.assert_close(model[1].running_var, batches.mean(0))
    torch.testing.assert_close(average.state_dict()["average"]["1.running_mean"], model[1].running_mean)
    assert model.training


def test_every_switches_inside_update():
    model = nn.Linear(1, 1, bias=False)
    average = SwitchEMA(model, 0.5, warmup=False, every=3)
    nn.init.zeros_(model.weight)
    average.load_state_dict({"steps": 0, "average": {"weight": torch.zeros(1, 1)}})
    seen = []
    for _ in range(7):
        with torch.no_grad():
            model.weight += 1
        average.update(model)
        seen.append(model.weight.item())
    assert seen == [1.0, 2.0, 2.125, 3.125, 4.125, 4.25, 5.25]  # 0.5, 1.25, 2.125; 2.625, 3.375, 4.25 - 0.4375 + ...


def test_applied_and_put_into_on_the_model_and_on_a_copy():
    model = _network()
    average = SwitchEMA(model, 0.9)
    _iterate(model, 0)
    average.update(model)
    own, kept = copy.deepcopy(model.state_dict()), average.state_dict()["average"]
    with average.applied(model):
        assert _same(model.state_dict(), kept)
    assert _same(model.state_dict(), own)
    with contextlib.suppress(KeyError), average.applied(model):
        raise KeyError
    assert _same(model.state_dict(), own)
    other = _network(1)
    average.put_into(other)
    assert _same(other.state_dict(), kept)
    assert all(param.requires_grad and param.is_leaf for param in other.parameters())


@pytest.mark.parametrize("exchange", ["module", "parameter", "data", "type", "buffer"])
def test_it_notices_when_tensors_of_the_model_are_replaced(exchange):
    model = _network()
    average = SwitchEMA(model, 0.5, warmup=False)
    _iterate(model, 0)
    average.update(model)
    if exchange == "module":
        model[4] = nn.Linear(12, 2)
    elif exchange == "parameter":
        model[4].weight = nn.Parameter(torch.ones(2, 12))
    elif exchange == "data":
        model[4].weight.data = torch.ones(2, 12)
    elif exchange == "type":
        model.double()
    else:
        model[1].running_mean = torch.ones(3)
    expected = {
        name: (value if not value.is_floating_point() else (average.state_dict()["average"][name] + value) / 2)
        for name, value in copy.deepcopy(model.state_dict()).items()
    }
    average.update(model)
    for name, value in average.state_dict()["average"].items():
        torch.testing.assert_close(value, expected[name], check_dtype=False)
    assert average.state_dict()["average"]["4.weight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_of_half_precision_weights_do_not_stick(dtype):
    model = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.zeros_(model.weight)
    average = SwitchEMA(model, 0.999, warmup=False)
    nn.init.ones_(model.weight)
    for _ in range(1000):
        average.update(model)
    assert average.state_dict()["average"]["weight"].item() == pytest.approx(1 - 0.999**1000, rel=1e-3)
    average.put_into(model)
    assert model.weight.dtype == dtype
    assert model.weight.item() == pytest.approx(1 - 0.999**1000, rel=4e-3)


def test_complex_tied_frozen_and_integer_tensors():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
            self.second = nn.Linear(2, 2)
            self.third = nn.Linear(2, 2)
            self.third.weight = self.second.weight
            self.second.bias.requires_grad_(False)
            self.register_buffer("count", torch.zeros((), dtype=torch.long))
            self.register_buffer("scratch", torch.zeros(1), persistent=False)
            self.register_buffer("nothing", None)
            self.register_parameter("none", None)

    model = Odd()
    average = SwitchEMA(model, 0.5, warmup=False)
    before = model.second.weight.detach().clone()
    with torch.no_grad():
        model.first += 1 + 2j
        model.second.weight += 1
        model.count += 3
        model.scratch += 9
    average.update(model)
    average.end_epoch(model)
    assert model.first.tolist() == [0.5 + 1j, 0.5 + 1j]
    torch.testing.assert_close(model.second.weight.detach(), before + 0.5)  # once, though it has two names
    assert model.third.weight is model.second.weight
    assert int(model.count) == 3
    assert float(model.scratch) == 9.0
    assert set(average.state_dict()["average"]) == {"first", "second.weight", "second.bias", "third.bias", "count"}


def test_resumes_to_the_last_bit_from_a_file():
    model = _network()
    average = SwitchEMA(model, 0.99)
    for step in range(5):
        _iterate(model, step)
        average.update(model)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "average": average.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = _network(1)
    resumed = SwitchEMA(other, 0.99)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["average"])
    for step in range(5, 12):
        for net, kept in ((model, average), (other, resumed)):
            _iterate(net, step)
            kept.update(net)
        if step == 8:
            average.end_epoch(model)
            resumed.end_epoch(other)
    assert _same(average.state_dict()["average"], resumed.state_dict()["average"])
    assert _same(model.state_dict(), other.state_dict())


def test_it_holds_one_copy_of_the_state():
    model = _network()
    average = SwitchEMA(model)
    for step in range(3):
        _iterate(model, step)
        average.update(model)
    held = average.state_dict()["average"]
    assert sum(value.numel() for value in held.values()) == sum(v.numel() for v in model.state_dict().values())
    own = {value.data_ptr() for value in model.state_dict().values()}
    assert not own & {value.data_ptr() for value in held.values()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, "decay must be a number greater than 0 and less than 1, got 1.0"),
        ({"decay": 0.0}, "decay"),
        ({"decay": float("nan")}, "decay"),
        ({"decay": "0.9"}, "decay"),
        ({"every": 0}, "every must be a positive number of iterations or None, got 0"),
        ({"every": 2.5}, "every"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(SettingError, match=message):
        SwitchEMA(nn.Linear(1, 1), **arguments)


def test_models_that_do_not_fit_are_named():
    average = SwitchEMA(_network())
    with pytest.raises(StateDictError, match=r"only the (model|average) has '0.bias'"):
        average.put_into(nn.Sequential(nn.Conv2d(1, 3, 3, bias=False)))
    wrong = _network()
    wrong[0] = nn.Conv2d(1, 2, 3)
    with pytest.raises(
        StateDictError, match=r"'0.weight' has the shape \(2, 1, 3, 3\), its average has \(3, 1, 3, 3\)"
    ):
        average.update(wrong)
    with pytest.raises(StateDictError, match="needs 'steps' and 'average'"):
        average.load_state_dict({"average": {}})
    with pytest.raises(StateDictError, match="only the average has"):
        average.load_state_dict({"steps": 1, "average": {}})
