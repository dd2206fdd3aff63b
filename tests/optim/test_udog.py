"""U-DoG against a NumPy transcription, the bound behind its damping, and the accelerated rate."""

import contextlib
import functools
import gc
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netwright.core.errors import ClosureError, GradientError, SettingError
from netwright.optim.dog import DoG
from netwright.optim.udog import UDoG
from netwright.testing import check_optimizer

HESSIAN = np.diag([4.0, 1.0, 0.25, 2.0]) + 0.1
TARGET = np.array([1.0, -2.0, 3.0, 0.5])
START = np.array([0.5, 0.0, -1.0, 2.0])


def numpy_path(steps, rho, damped, noise):
    """The output of every step, each as a sum over all that came before, and the sums behind it."""
    x0, y, xs, outputs, points = START, [START], [], [], []
    radii, alphas, omegas, ms, gs, ratios = [], [], [], [], [], []

    def damp(total, first):
        return total * (1 + math.log(total / first)) ** 2 if damped else total

    def gradient(point):
        points.append(point)
        return HESSIAN @ (point - TARGET) + noise[len(points) - 1]

    for t in range(steps):
        moved = [np.linalg.norm(z - x0) for z in [*y, *xs]]
        radii.append(max([rho * (1 + np.linalg.norm(x0)), *moved]))
        omegas.append(sum(radii))
        alphas.append(omegas[-1] / radii[-1])
        total = sum(omegas)
        ms.append(gradient((omegas[-1] * y[-1] + sum(w * x for w, x in zip(omegas, xs, strict=False))) / total))
        spread = sum(a**2 * np.sum((g - m) ** 2) for a, g, m in zip(alphas, gs, ms, strict=False))
        largest = max(a**2 * np.sum(m**2) for a, m in zip(alphas, ms, strict=True))
        first = np.sum(ms[0] ** 2)
        xs.append(y[-1] - alphas[-1] * radii[-1] / math.sqrt(damp(spread + largest, first)) * ms[-1])
        outputs.append(sum(w * x for w, x in zip(omegas, xs, strict=True)) / total)
        gs.append(gradient(outputs[-1]))
        change = alphas[t] ** 2 * np.sum((gs[-1] - ms[-1]) ** 2)
        final = damp(spread + change + largest, first)
        ratios.append(change / final)
        y.append(y[-1] - alphas[-1] * radii[-1] / math.sqrt(final) * gs[-1])
    return np.array(outputs), np.array(points), sum(ratios)


class Problem:
    """A noisy quadratic over several parameters, as a closure that counts its calls."""

    def __init__(self, sizes=(4,), noise=None):
        self.weights = [part.clone().requires_grad_() for part in torch.tensor(START).split(list(sizes))]
        self.noise = noise
        self.points = []

    def closure(self):
        x = self.joined()
        self.points.append(x)
        offset = 0 if self.noise is None else self.noise[len(self.points) - 1]
        full = torch.tensor(HESSIAN @ (x - TARGET) + offset)
        for weight, part in zip(self.weights, full.split([len(w) for w in self.weights]), strict=True):
            weight.grad = part.clone()
        return torch.tensor((x - TARGET) @ HESSIAN @ (x - TARGET) / 2)

    def joined(self):
        return torch.cat([weight.detach() for weight in self.weights]).numpy()


@pytest.mark.parametrize("form", [{}, {"fused": False}, {"foreach": True}])
@pytest.mark.parametrize(("rho", "damped"), [(1e-2, False), (1e-1, True)])
def test_path_follows_the_equations(form, rho, damped):
    noise = np.random.default_rng(0).normal(size=(80, 4))
    outputs, points, _ = numpy_path(40, rho, damped, noise)
    problem = Problem((3, 1), noise)
    groups = [{"params": problem.weights[:1]}, {"params": problem.weights[1:]}]
    optimizer = UDoG(groups, initial_movement=rho, damped=damped, **form)
    for t in range(40):
        loss = optimizer.step(problem.closure)
        np.testing.assert_allclose(problem.joined(), outputs[t], rtol=1e-8, atol=1e-10)
        first = problem.points[-2]
        assert float(loss) == pytest.approx((first - TARGET) @ HESSIAN @ (first - TARGET) / 2)
    np.testing.assert_allclose(problem.points, points, rtol=1e-8, atol=1e-10)
    assert np.linalg.norm(outputs[-1] - TARGET) < np.linalg.norm(START - TARGET)


def test_damping_bounds_the_sum_it_says():
    noise = np.random.default_rng(1).normal(size=(200, 4)) * 30
    assert numpy_path(100, 1e-2, True, noise)[2] <= 1
    assert numpy_path(100, 1e-2, False, noise)[2] > 2


def test_damping_keeps_noise_from_driving_the_iterates_away():
    """Where noise is all there is, the distance grows less when damped."""
    far = {}
    for damped in (False, True):
        noise = np.random.default_rng(2).normal(size=(800, 4)) * 1e3
        problem = Problem(noise=noise)
        optimizer = UDoG(problem.weights, initial_movement=1e-2, damped=damped)
        for _ in range(400):
            optimizer.step(problem.closure)
        far[damped] = optimizer.state[problem.weights[0]]["radius"]
    assert far[True] < 0.5 * far[False]


def slope(errors, start):
    """Least-squares slope of log error against log step, from step ``start`` on."""
    steps = np.arange(start, len(errors) + 1)
    return np.polyfit(np.log(steps), np.log(errors[start - 1 :]), 1)[0]


def errors_on_a_smooth_quadratic(make, steps, size=400):
    """Suboptimality where curvatures (i / n)^4 reach down to nearly 0, so that no rate is linear."""
    curvature = (torch.arange(1.0, size + 1, dtype=torch.float64) / size) ** 4
    x = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    optimizer = make([x])
    errors = []

    def error():
        return float((curvature * (x.detach() - 1) ** 2).sum() / 2)

    def closure():
        x.grad = curvature * (x.detach() - 1)
        return torch.tensor(error())

    for _ in range(steps):
        optimizer.step(closure)
        with optimizer.averaged() if hasattr(optimizer, "averaged") else contextlib.nullcontext():
            errors.append(error())
    return np.array(errors)


def test_rate_on_a_smooth_quadratic_is_accelerated():
    """The error falls faster than 1 / t^2, that of descent with the best constant step about as 1 / t."""
    accelerated = errors_on_a_smooth_quadratic(UDoG, 500)
    plain = errors_on_a_smooth_quadratic(DoG, 1000)
    descent = errors_on_a_smooth_quadratic(functools.partial(torch.optim.SGD, lr=1.0), 1000)
    assert slope(accelerated, 100) < -2
    assert -1.5 < slope(descent, 100) < -1
    assert accelerated[-1] < 0.1 * min(plain[-1], descent[-1])  # at the same number of gradients


def test_closure_is_called_twice_and_may_keep_its_gradients():
    """Gradients that the closure zeroes in place must not overwrite those of the first call."""
    paths = []
    for set_to_none in (True, False):
        weight = torch.tensor(START, requires_grad=True)
        optimizer = UDoG([weight], initial_movement=0.1)
        calls = []

        def closure(weight=weight, optimizer=optimizer, calls=calls, set_to_none=set_to_none):
            calls.append(1)
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = (weight**4).sum()
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        assert len(calls) == 10
        paths.append(weight.detach())
    assert torch.equal(*paths)


def test_gradient_after_a_step_is_that_of_the_parameters():
    problem = Problem()
    optimizer = UDoG(problem.weights, initial_movement=0.1)
    for _ in range(5):
        optimizer.step(problem.closure)
    np.testing.assert_allclose(problem.weights[0].grad.numpy(), HESSIAN @ (problem.joined() - TARGET), rtol=1e-12)
    before = problem.joined()
    with optimizer.averaged():
        np.testing.assert_array_equal(problem.joined(), before)


def test_parameter_that_drops_out_of_the_second_call():
    """Its second gradient counts as zero, so its y stays."""
    kept, dropped = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = UDoG([kept, dropped], initial_movement=0.1)
    calls = []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = kept.square().sum() + (dropped.square().sum() if len(calls) % 2 else 0.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(optimizer.state[dropped]["offset"], torch.zeros(2, dtype=torch.float64))
    assert not torch.equal(optimizer.state[kept]["offset"], torch.zeros(2, dtype=torch.float64))
    optimizer.step(closure)
    assert bool(dropped.isfinite().all())


def test_zero_gradient_moves_nothing():
    weight = torch.ones(3, requires_grad=True)
    optimizer = UDoG([weight], damped=True)

    def closure():
        weight.grad = torch.zeros(3)
        return torch.tensor(0.0)

    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize("form", [{}, {"fused": False}])
@pytest.mark.parametrize("damped", [False, True])
def test_gradients_that_are_not_numbers_show_in_the_parameters(form, damped):
    for first, second in ((math.nan, 1.0), (1.0, math.nan), (0.0, 1.0)):
        weight = torch.ones(3, requires_grad=True)
        optimizer = UDoG([weight], damped=damped, **form)
        values = iter((first, second, first, second))

        def closure(weight=weight, values=values):
            weight.grad = torch.full((3,), next(values))
            return torch.tensor(1.0)

        for _ in range(2):
            optimizer.step(closure)
        assert bool(weight.isfinite().all()) == (first == 0.0)


def test_resume_keeps_float32_state_of_half_precision():
    weight = torch.full((8,), 4.0, dtype=torch.bfloat16, requires_grad=True)
    other = weight.detach().clone().requires_grad_()
    optimizer, resumed = UDoG([weight], initial_movement=1e-4), UDoG([other], initial_movement=1e-4)

    def run(value, method):
        def closure():
            method.zero_grad()
            loss = value.float().square().sum()
            loss.backward()
            return loss

        for _ in range(10):
            method.step(closure)

    run(weight, optimizer)
    with torch.no_grad():
        other.copy_(weight)
    resumed.load_state_dict(optimizer.state_dict())
    for name in ("offset", "point"):
        assert resumed.state[other][name].dtype == torch.float32
        assert torch.equal(resumed.state[other][name], optimizer.state[weight][name])
        assert resumed.state[other][name] is not optimizer.state[weight][name]
    run(weight, optimizer)
    run(other, resumed)
    assert torch.equal(weight, other)


def test_tiny_movements_of_half_precision_add_up():
    """The first movements are below bfloat16's resolution; they must not be lost."""
    weight = torch.full((8,), 4.0, dtype=torch.bfloat16, requires_grad=True)
    optimizer = UDoG([weight], initial_movement=1e-5)

    def closure():
        optimizer.zero_grad()
        loss = weight.float().square().sum()
        loss.backward()
        return loss

    for _ in range(60):
        optimizer.step(closure)
    assert weight.dtype == torch.bfloat16
    assert float(weight.detach().abs().max()) < 0.5
    state = optimizer.state[weight]
    assert state["point"].dtype == state["offset"].dtype == torch.float32


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64]),
)
def test_state_words_per_element(shape, dtype):
    weight = torch.ones(shape, dtype=dtype, requires_grad=True)
    optimizer = UDoG([weight])

    def closure():
        optimizer.zero_grad()
        loss = weight.abs().float().square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    words = sum(value.numel() for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
    elements = weight.numel() * (2 if dtype.is_complex else 1)
    assert words == elements * (3 if dtype == torch.bfloat16 else 2)


def test_resume_keeps_float_sums_of_float32_parameters():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    inputs = torch.randn(8, 3)

    def run(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)

    optimizer = UDoG(model.parameters(), initial_movement=1e-3)
    run(model, optimizer)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), model.state_dict()], file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    other = nn.Linear(3, 2)
    other.load_state_dict(weights)
    again = UDoG(other.parameters(), initial_movement=1e-3)
    again.load_state_dict(state)
    run(model, optimizer)
    run(other, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"initial_movement": 0.0}, "initial_movement must be a number greater than 0, got 0.0"),
        ({"initial_movement": math.nan}, "initial_movement must be a number greater than 0, got nan"),
        ({"damped": 1}, "damped must be True or False, got 1"),
        ({"foreach": True, "fused": True}, "exclude each other"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(SettingError, match=message):
        UDoG([torch.ones(2, requires_grad=True)], **changes)


def test_bad_closures():
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(ClosureError, match=r"loss\.backward\(\)"):
        UDoG([weight]).step()
    with pytest.raises(ClosureError, match="scalar loss, got None"):
        UDoG([weight]).step(lambda: None)
    table = torch.ones(4, 2, requires_grad=True)

    def closure():
        loss = nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum()
        loss.backward()
        return loss

    with pytest.raises(GradientError, match="sparse"):
        UDoG([table]).step(closure)
    assert torch.equal(table, torch.ones(4, 2))


def test_conformance():
    check_optimizer(functools.partial(UDoG, initial_movement=1e-2), coupled=True, complex=True, sparse=False)


def test_nothing_grows():
    """Beside the suite's "memory": from early on, and in the entries of the state."""
    problem = Problem()
    optimizer = UDoG(problem.weights, initial_movement=1e-2)

    def living():
        gc.collect()
        return sum(item.numel() for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter))

    counts = []
    for _ in range(2):
        for _ in range(10):
            problem.points.clear()
            optimizer.step(problem.closure)
        counts.append((living(), sum(len(state) for state in optimizer.state.values())))
    assert counts[0] == counts[1]
