"""UnifiedBudget against cosine annealing, exact fractions at known angles, and a shape computed another way."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from netwright.core.errors import SettingError
from netwright.core.optimization import make_schedule
from netwright.core.recipe import Recipe
from netwright.optim.unified_budget import UnifiedBudget


def _optimizer(*lrs):
    return SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs], lr=1.0)


def _rates(schedule, optimizer, steps):
    """The rates with which the optimizer steps, and the one that is left."""
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return np.array([*seen, [group["lr"] for group in optimizer.param_groups]])


@pytest.mark.parametrize("eta_min", [0.0, 0.03])
def test_phi_2_is_cosine_annealing(eta_min):
    first, second = _optimizer(1.0, 0.1), _optimizer(1.0, 0.1)
    mine = _rates(UnifiedBudget(first, 37, phi=2.0, eta_min=eta_min), first, 37)
    torchs = _rates(CosineAnnealingLR(second, 37, eta_min=eta_min), second, 37)
    np.testing.assert_allclose(mine, torchs, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(
    ("phi", "expected"),
    [
        (1.0, [1, 6 / 7, 2 / 3, 2 / 5, 0]),  # 2u / (1 + u) with u = (1 + cos) / 2 = 1, 3/4, 1/2, 1/4, 0
        (2.0, [1, 3 / 4, 1 / 2, 1 / 4, 0]),
        (4.0, [1, 3 / 5, 1 / 3, 1 / 7, 0]),  # u / (2 - u)
        (0.5, [1, 12 / 13, 4 / 5, 4 / 7, 0]),  # 4u / (1 + 3u)
    ],
)
def test_known_fractions(phi, expected):
    """Iterations 0, 2, 3, 4 and 6 of 6 are at 0, 60, 90, 120 and 180 degrees."""
    optimizer = _optimizer(1.0)
    rates = _rates(UnifiedBudget(optimizer, 6, phi=phi), optimizer, 6)[:, 0]
    np.testing.assert_allclose(rates[[0, 2, 3, 4, 6]], expected, rtol=1e-12, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(
    phi=st.floats(0.01, 50),
    steps=st.integers(1, 60),
    eta_min=st.floats(0, 0.5),
    warmup=st.integers(0, 59),
    periods=st.integers(1, 4),
)
def test_the_shape_by_half_angles(phi, steps, eta_min, warmup, periods):
    """Divided by 4 cos²(θ/2), the equation is 1 / (1 + (φ/2) tan²(θ/2)): an independent way to the same rates."""
    warmup %= steps
    optimizer = _optimizer(2.0)
    rates = _rates(UnifiedBudget(optimizer, steps, phi, eta_min, warmup, periods), optimizer, steps + 2)[:, 0]
    for step, rate in enumerate(rates):
        if step < warmup:
            expected = 2.0 * (step + 1) / (warmup + 1)
        elif step >= steps:
            expected = eta_min
        else:
            whole, part = divmod((step - warmup) * periods, steps - warmup)
            assert whole < periods
            tangent = math.tan(math.pi * part / (steps - warmup) / 2)
            expected = eta_min + (2.0 - eta_min) / (1 + phi / 2 * tangent**2)
        assert rate == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_warmup_rises_to_the_top_and_every_iteration_is_in_its_place():
    optimizer = _optimizer(1.0)
    rates = _rates(UnifiedBudget(optimizer, 7, phi=2.0, warmup=3), optimizer, 9)[:, 0]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(rates[4:8], [(1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)], atol=1e-15)
    assert rates[8:].tolist() == [0.0, 0.0]


def test_periods_start_from_the_top_again():
    optimizer = _optimizer(1.0)
    rates = _rates(UnifiedBudget(optimizer, 12, phi=0.7, periods=3), optimizer, 12)[:, 0]
    np.testing.assert_allclose(rates[:4], rates[4:8], atol=1e-12)
    np.testing.assert_allclose(rates[:4], rates[8:12], atol=1e-12)
    assert rates[4] == 1.0
    assert rates[12] == 0.0


def test_larger_phi_falls_earlier():
    curves = []
    for phi in (0.1, 0.5, 1.0, 2.0, 5.0, 20.0):
        optimizer = _optimizer(1.0)
        curves.append(_rates(UnifiedBudget(optimizer, 20, phi=phi), optimizer, 20)[1:20, 0])
    assert np.all(np.diff(np.array(curves), axis=0) < 0)
    assert np.all(np.diff(np.array(curves), axis=1) < 0)


@pytest.mark.parametrize("cut", [0, 2, 9, 20])
def test_resumes_to_the_last_bit_from_a_file(cut):
    optimizer = _optimizer(1.0, 0.25)
    schedule = UnifiedBudget(optimizer, 20, phi=0.7, eta_min=0.01, warmup=4)
    _rates(schedule, optimizer, cut)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = _optimizer(9.0, 9.0)
    resumed = UnifiedBudget(other, 5)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert np.array_equal(_rates(resumed, other, 25), _rates(schedule, optimizer, 25))


def test_last_epoch_goes_on():
    optimizer = _optimizer(1.0)
    whole = _rates(UnifiedBudget(optimizer, 10), optimizer, 10)
    again = _optimizer(1.0)
    again.param_groups[0]["initial_lr"] = 1.0
    assert np.array_equal(_rates(UnifiedBudget(again, 10, last_epoch=5), again, 4), whole[6:])


def test_a_learning_rate_that_is_a_tensor_stays_one():
    lr = torch.tensor(0.5)
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = UnifiedBudget(optimizer, 4, phi=2.0)
    for expected in (0.5, 0.5 * (2 + 2**0.5) / 4, 0.25):
        assert optimizer.param_groups[0]["lr"] is lr
        assert float(lr) == pytest.approx(expected)
        optimizer.step()
        schedule.step()


def test_a_recipe_fills_in_the_number_of_iterations():
    recipe = Recipe(schedule="netwright.optim.unified_budget:UnifiedBudget", schedule_settings={"phi": 0.5})
    schedule = make_schedule(recipe, _optimizer(1.0), 123)
    assert isinstance(schedule, UnifiedBudget)
    assert schedule.total_steps == 123
    assert schedule.phi == 0.5


def test_state_holds_numbers_only():
    schedule = UnifiedBudget(_optimizer(1.0), 10)
    state = copy.deepcopy(schedule.state_dict())
    assert state["phi"] == 1.0
    assert all(isinstance(value, int | float | list | bool) for value in state.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be an integer of at least 1, got 0"),
        ({"total_steps": 2.0}, "total_steps"),
        ({"total_steps": True}, "total_steps"),
        ({"phi": 0.0}, "phi must be a number greater than 0, got 0.0"),
        ({"phi": -1.0}, "phi"),
        ({"phi": math.nan}, "phi"),
        ({"phi": math.inf}, "phi"),
        ({"eta_min": -0.1}, "eta_min"),
        ({"warmup": -1}, "warmup must be an integer of at least 0"),
        ({"warmup": 10}, "warmup must be less than total_steps=10, got 10"),
        ({"periods": 0}, "periods"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(SettingError, match=message):
        UnifiedBudget(_optimizer(1.0), **{"total_steps": 10, **arguments})
