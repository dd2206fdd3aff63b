"""DoG against a NumPy transcription of its equations."""

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

from netwright.core.errors import GradientError, SettingError, StateDictError
from netwright.optim.dog import DoG
from netwright.testing import check_optimizer

HESSIAN = np.diag([4.0, 1.0, 0.25, 2.0]) + 0.1
TARGET = np.array([1.0, -2.0, 3.0, 0.5])
START = np.array([0.5, 0.0, -1.0, 2.0])


def numpy_path(steps, rho, eps, decay, degree, lr=1.0, noise=None):
    """All iterates and averages, from lists of everything that was seen."""
    x, average, iterates, averages, squares = START.copy(), START.copy(), [START.copy()], [START.copy()], []
    for t in range(1, steps + 1):
        g = HESSIAN @ (x - TARGET) + (0 if noise is None else noise[t - 1]) + decay * x
        squares.append(np.sum(g**2))
        radius = max([rho * (1 + np.linalg.norm(START))] + [np.linalg.norm(old - START) for old in iterates])
        x = x - lr * radius / np.sqrt(np.sum(squares) + eps) * g
        iterates.append(x)
        share = (1 + degree) / (t + degree)
        average = (1 - share) * average + share * x
        averages.append(average)
    return np.array(iterates), np.array(averages)


def gradient(weights, noise=0.0):
    x = torch.cat([weight.detach() for weight in weights]).numpy()
    full = torch.tensor(HESSIAN @ (x - TARGET) + noise)
    for weight, part in zip(weights, full.split([len(weight) for weight in weights]), strict=True):
        weight.grad = part.clone()


def split(sizes=(4,)):
    return [part.clone().requires_grad_() for part in torch.tensor(START).split(list(sizes))]


def joined(weights):
    return torch.cat([weight.detach() for weight in weights]).numpy()


@pytest.mark.parametrize("form", [{}, {"fused": False}, {"foreach": True}])
@pytest.mark.parametrize(
    ("rho", "eps", "decay", "degree", "lr"), [(1e-2, 1e-8, 0.0, 8.0, 1.0), (1e-1, 1e-1, 0.3, 0.0, 0.5)]
)
def test_path_follows_the_equations(form, rho, eps, decay, degree, lr):
    noise = np.random.default_rng(0).normal(size=(60, 4))
    iterates, averages = numpy_path(60, rho, eps, decay, degree, lr, noise)
    weights = split((3, 1))
    groups = [{"params": weights[:1]}, {"params": weights[1:]}]
    optimizer = DoG(groups, lr, initial_movement=rho, eps=eps, weight_decay=decay, average=degree, **form)
    for t in range(60):
        gradient(weights, noise[t])
        optimizer.step()
        np.testing.assert_allclose(joined(weights), iterates[t + 1], rtol=1e-9, atol=1e-12)
        with optimizer.averaged():
            np.testing.assert_allclose(joined(weights), averages[t + 1], rtol=1e-9, atol=1e-12)


def test_first_step_has_the_stated_length():
    weights = split()
    optimizer = DoG(weights, initial_movement=1e-3, eps=0.0)
    gradient(weights)
    optimizer.step()
    length = np.linalg.norm(joined(weights) - START)
    assert length == pytest.approx(1e-3 * (1 + np.linalg.norm(START)), rel=1e-9)


def test_average_of_degree_zero_is_the_plain_mean():
    weights = split()
    optimizer = DoG(weights, initial_movement=0.1, average=0.0)
    seen = []
    for _ in range(20):
        gradient(weights)
        optimizer.step()
        seen.append(joined(weights))
    with optimizer.averaged():
        np.testing.assert_allclose(joined(weights), np.mean(seen, 0), rtol=1e-12)


def test_averaged_gives_the_iterate_back_even_after_an_error():
    weights = split()
    optimizer = DoG(weights, initial_movement=0.1)
    with optimizer.averaged():
        np.testing.assert_array_equal(joined(weights), START)
    for _ in range(5):
        gradient(weights)
        optimizer.step()
    before = joined(weights)

    def fail_inside():
        with optimizer.averaged():
            assert not np.array_equal(joined(weights), before)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    np.testing.assert_array_equal(joined(weights), before)


def test_without_average_nothing_is_swapped():
    weights = split()
    optimizer = DoG(weights, initial_movement=0.1, average=None)
    gradient(weights)
    optimizer.step()
    before = joined(weights)
    with optimizer.averaged():
        np.testing.assert_array_equal(joined(weights), before)


def test_finds_the_optimum_from_any_first_movement():
    for rho in (1e-8, 1e-4, 1e-1):
        weights = split()
        optimizer = DoG(weights, initial_movement=rho)
        for _ in range(600):
            gradient(weights)
            optimizer.step()
        with optimizer.averaged():
            assert np.linalg.norm(joined(weights) - TARGET) < 0.02


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("form", [{}, {"fused": False}, {"foreach": True}])
def test_a_parameter_without_a_gradient_counts_where_it_is(apart, form):
    """It is frozen after five steps: distances still contain it, and its average still approaches it."""
    weights = split((3, 1))
    groups = [{"params": weights[:1]}, {"params": weights[1:]}] if apart else [{"params": weights}]
    optimizer = DoG(groups, initial_movement=0.5, average=2.0, **form)
    iterates, averages, squares = [START], [START], []
    for t in range(1, 12):
        gradient(weights)
        if t > 5:
            weights[1].grad = None
        g = torch.cat([torch.zeros(len(w)).double() if w.grad is None else w.grad for w in weights]).numpy()
        squares.append(np.sum(g**2))
        radius = max([0.5 * (1 + np.linalg.norm(START))] + [np.linalg.norm(old - START) for old in iterates])
        iterates.append(iterates[-1] - radius / np.sqrt(np.sum(squares) + 1e-8) * g)
        averages.append(averages[-1] + 3 / (t + 2) * (iterates[-1] - averages[-1]))
        optimizer.step()
        assert optimizer.state[weights[0]]["radius"] == pytest.approx(radius, rel=1e-12)
        np.testing.assert_allclose(joined(weights), iterates[-1], rtol=1e-9, atol=1e-12)
        with optimizer.averaged():
            np.testing.assert_allclose(joined(weights), averages[-1], rtol=1e-9, atol=1e-12)
    assert abs(iterates[-1][3] - START[3]) > 0.5


@pytest.mark.parametrize("form", [{}, {"fused": False}, {"foreach": True}])
def test_tiny_movements_of_half_precision_add_up(form):
    """The path is that of float32 weights, whose first movements are below bfloat16's resolution."""

    def path(dtype):
        weight = torch.full((50,), 3.0, dtype=dtype, requires_grad=True)
        optimizer = DoG([weight], weight_decay=0.1, **form)
        for _ in range(200):
            optimizer.zero_grad()
            weight.float().square().mean().backward()
            optimizer.step()
        before = weight.detach().clone()
        with optimizer.averaged():
            average = weight.detach().clone()
        assert torch.equal(weight, before)
        return before, average

    for half, full in zip(path(torch.bfloat16), path(torch.float32), strict=True):
        assert half.dtype == torch.bfloat16
        assert abs(float(full[0]) - 3.0) > 0.1
        torch.testing.assert_close(half.float(), full, rtol=0.02, atol=0.02)


def test_half_precision_resumes_and_follows_what_others_write():
    weight = torch.full((8,), 4.0, dtype=torch.bfloat16, requires_grad=True)
    other = weight.detach().clone().requires_grad_()
    optimizer, resumed = DoG([weight]), DoG([other])

    def run(value, method):
        for _ in range(30):
            method.zero_grad()
            value.float().square().sum().backward()
            method.step()

    run(weight, optimizer)
    with torch.no_grad():
        other.copy_(weight)
    resumed.load_state_dict(optimizer.state_dict())
    assert {resumed.state[other][name].dtype for name in ("start", "average", "point")} == {torch.float32}
    run(weight, optimizer)
    run(other, resumed)
    assert torch.equal(weight, other)
    with torch.no_grad():
        weight.zero_()
    optimizer.zero_grad()
    optimizer.step()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, torch.zeros_like(weight))


def test_zero_gradient_moves_nothing():
    weights = split()
    optimizer = DoG(weights, eps=0.0)
    weights[0].grad = torch.zeros(4, dtype=torch.float64)
    optimizer.step()
    np.testing.assert_array_equal(joined(weights), START)


def test_resume_keeps_float_sums_of_float32_parameters():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    inputs = torch.randn(8, 3)

    def run(model, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    optimizer = DoG(model.parameters(), initial_movement=1e-3)
    run(model, optimizer)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), model.state_dict()], file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    other = nn.Linear(3, 2)
    other.load_state_dict(weights)
    again = DoG(other.parameters(), initial_movement=1e-3)
    again.load_state_dict(state)
    run(model, optimizer)
    run(other, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with optimizer.averaged(), again.averaged():
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_state_goes_on_only_where_an_average_is_kept_as_before():
    def moved(average):
        weight = torch.ones(3, requires_grad=True)
        optimizer = DoG([weight], average=average)
        weight.grad = torch.ones(3)
        optimizer.step()
        return optimizer

    with pytest.raises(StateDictError, match=r"holds no average of the iterates, and this DoG has average=8\.0"):
        moved(8.0).load_state_dict(moved(None).state_dict())
    with pytest.raises(StateDictError, match="holds an average of the iterates, and this DoG has average=None"):
        moved(None).load_state_dict(moved(0.0).state_dict())
    for average in (None, 0.0, 8.0):
        moved(average).load_state_dict(moved(average).state_dict())
    fresh = DoG([torch.ones(3, requires_grad=True)], average=None).state_dict()
    moved(8.0).load_state_dict(fresh)  # nothing has moved yet


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 4), max_size=3), average=st.sampled_from([None, 8.0]))
def test_state_words_per_element(shape, average):
    weight = torch.ones(shape, requires_grad=True)
    optimizer = DoG([weight], average=average)
    weight.grad = torch.ones(shape)
    optimizer.step()
    words = sum(value.numel() for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
    assert words == weight.numel() * (1 if average is None else 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr must be a number at least 0, got -1.0"),
        ({"initial_movement": 0.0}, "initial_movement must be a number greater than 0, got 0.0"),
        ({"eps": -1.0}, "eps must be a number at least 0"),
        ({"weight_decay": math.nan}, "weight_decay must be a number at least 0, got nan"),
        ({"average": -1.0}, "average must be a number at least 0, got -1.0"),
        ({"foreach": True, "fused": True}, "exclude each other"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(SettingError, match=message):
        DoG([torch.ones(2, requires_grad=True)], **changes)


def test_sparse_gradients_are_refused_before_anything_moves():
    table, other = torch.ones(4, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    (nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum() + other.sum()).backward()
    with pytest.raises(GradientError, match="sparse"):
        DoG([other, table]).step()
    assert torch.equal(other, torch.ones(2))


def test_conformance():
    check_optimizer(functools.partial(DoG, initial_movement=1e-2), coupled=True, complex=True, sparse=False)


def test_nothing_grows():
    """Beside the suite's "memory": from early on, and in the entries of the state."""
    weights = split()
    optimizer = DoG(weights, initial_movement=0.1)

    def living():
        gc.collect()
        return sum(item.numel() for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter))

    counts = []
    for _ in range(2):
        for _ in range(10):
            gradient(weights)
            optimizer.step()
        counts.append((living(), sum(len(state) for state in optimizer.state.values())))
    assert counts[0] == counts[1]
