"""Rounding to integers, and the ranges that calibration finds, against numpy and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netwright.compress._observe import Observer, grid, mse_range, percentile_range
from netwright.compress._quantizers import ActivationQuantizer, Integers, WeightQuantizer, weight_scale
from netwright.core.errors import TransformError

UINT8, INT8 = Integers.activation("uint8"), Integers.activation("int8")


# Arithmetic


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30),
    low=st.floats(-50, 50),
    width=st.floats(0.01, 100),
    kind=st.sampled_from(["uint8", "int8"]),
)
def test_activation_rounding_against_float64(values, low, width, kind):
    integers = Integers.activation(kind)
    scale, zero = grid(low, low + width, integers)
    assert integers.low <= zero <= integers.high
    found = ActivationQuantizer(scale, zero, integers)(torch.tensor(values)).double().numpy()
    naive = np.clip(np.round(np.array(values) / scale) + zero, integers.low, integers.high)
    naive = (naive - zero) * scale
    assert np.abs(found - naive).max() <= scale * 1.001  # a tie may fall to either side
    inside = np.clip(values, (integers.low - zero) * scale, (integers.high - zero) * scale)
    assert np.abs(found - inside).max() <= scale * 0.5001 + 1e-5


@pytest.mark.parametrize("integers", [UINT8, INT8])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 1e-30), (0.0, 0.0)])
def test_grid_holds_zero_and_the_range(integers, low, high):
    scale, zero = grid(low, high, integers)
    ends = (np.array([integers.low, integers.high]) - zero) * scale
    assert ends[0] <= 0 <= ends[1]
    assert ends[0] <= min(low, 0) + scale / 2
    assert ends[1] >= max(high, 0) - scale / 2


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("kind", "reach"), [("int8", 127), ("int8", 63), ("uint8", 127), ("uint8", 7), ("int8", 1)])
def test_weight_rounding_against_float64(per_channel, kind, reach):
    torch.manual_seed(1)
    weight = torch.randn(6, 4, 3, 3) * torch.tensor([0.01, 1, 5, 0.2, 1, 0.0])[:, None, None, None]
    integers = Integers.weight(kind, reach)
    found = WeightQuantizer(weight, 0, integers, per_channel)(weight).double().numpy()
    exact = weight.double().numpy()
    largest = np.abs(exact).max((1, 2, 3), keepdims=True) if per_channel else np.abs(exact).max()
    scale = np.maximum(largest, 1e-12) / reach
    np.testing.assert_allclose(found, np.round(exact / scale) * scale, atol=np.max(scale) * 1e-3)
    assert len(np.unique(np.round(found / scale))) <= 2 * reach + 1


def test_weight_scales_follow_training_and_rest_in_evaluation():
    weight = torch.randn(3, 4)
    module = WeightQuantizer(weight, 0, Integers.weight("int8", 127), True)
    module.eval()(weight * 2)
    torch.testing.assert_close(module.scale, weight.abs().amax(1) / 127)
    module.train()(weight * 2)
    torch.testing.assert_close(module.scale, weight.abs().amax(1) * 2 / 127)
    assert weight_scale(weight, 1, 127, True).shape == (4,)


def test_gradients_pass_straight_through():
    x = torch.tensor([-3.0, 0.1, 0.7, 9.0], requires_grad=True)
    ActivationQuantizer(*grid(-1.0, 1.0, UINT8), UINT8)(x).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


# Calibration


def test_observer_minmax_against_numpy():
    observer, parts = Observer("here", "Int8"), [torch.randn(5, 3) for _ in range(4)]
    for part in parts:
        assert observer(part) is part
    every = np.concatenate([part.numpy() for part in parts])
    assert observer.range("minmax", UINT8) == (every.min(), every.max())


def observed(values, calibration):
    observer = Observer("here", "Int8")
    observer(values)
    observer.start_histogram()
    observer(values)
    return observer.range(calibration, UINT8)


def test_percentile_leaves_outliers_out():
    values = torch.cat([torch.linspace(-1, 2, 100_001), torch.tensor([50.0])])
    low, high = observed(values, "percentile")
    assert low == pytest.approx(-1, abs=0.05)
    assert high == pytest.approx(2, abs=0.05)
    assert observed(torch.relu(values), "percentile")[0] == 0


def test_mse_range_beats_minmax_and_any_other_fraction():
    torch.manual_seed(0)
    values = torch.cat([torch.randn(500_000), torch.tensor([20.0, -20.0])])

    def error(low, high):
        rounded = ActivationQuantizer(*grid(low, high, UINT8), UINT8)(values)
        return float((rounded - values).square().mean())

    low, high = observed(values, "mse")
    bounds = float(values.min()), float(values.max())
    assert error(low, high) < 0.9 * error(*bounds)
    others = [error(bounds[0] * share, bounds[1] * share) for share in np.linspace(0.2, 1, 30)]
    assert error(low, high) <= 1.05 * min(others)


def test_ranges_of_plain_histograms():
    counts = np.zeros(2048)
    counts[:1024] = 1000
    low, high = percentile_range(counts, 0.0, 4.0)
    assert (low, high) == (0.0, pytest.approx(2.0, abs=0.01))
    assert mse_range(counts, 0.0, 4.0, UINT8)[1] == pytest.approx(2.0, abs=0.1)


def test_observer_names_where_activations_are_not_finite():
    with pytest.raises(TransformError, match="activations at relu_3 are not finite"):
        Observer("relu_3", "EasyQuant")(torch.tensor([1.0, float("nan")]))
