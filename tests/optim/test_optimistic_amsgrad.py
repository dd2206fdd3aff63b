"""Optimistic AMSGrad: equal to PyTorch's AMSGrad without predictions, and to a NumPy transcription with them."""

import copy
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
from netwright.optim.optimistic_amsgrad import OptimisticAMSGrad, extrapolation_weights
from netwright.testing import check_optimizer

START = np.array([0.5, 0.0, -1.0, 2.0, 1.5])
CURVATURE = np.array([4.0, 1.0, 0.25, 2.0, 0.5])


def numpy_path(steps, span, lr, betas, eps, decay, regularization, noise):
    """Optimistic points and bases, from a list of all gradients."""
    b1, b2 = betas
    base, w, theta, v, top = START.copy(), START.copy(), np.zeros(5), np.zeros(5), np.zeros(5)
    gradients, points, bases = [], [], []
    for t in range(1, steps + 1):
        g = CURVATURE * np.sin(w) + noise[t - 1] + decay * w
        gradients.append(g)
        theta = b1 * theta + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        top = np.maximum(top, v)
        d = np.sqrt(top / (1 - b2**t)) + eps
        base = base - lr / (1 - b1**t) * theta / d
        w = base
        if span and len(gradients) > span:
            recent = np.array(gradients[-span - 1 :])
            u = np.diff(recent, axis=0).T
            product = u.T @ u
            z = np.linalg.solve(product + regularization * np.linalg.norm(product, 2) * np.eye(span), np.ones(span))
            predicted = (z / z.sum()) @ recent[:-1]
            w = base - lr / (1 - b1 ** (t + 1)) * (b1 * theta + (1 - b1) * predicted) / d
        points.append(w)
        bases.append(base)
    return np.array(points), np.array(bases)


@pytest.mark.parametrize(
    ("span", "betas", "eps", "decay", "regularization"),
    [(1, (0.9, 0.999), 1e-8, 0.0, 1e-3), (3, (0.5, 0.9), 1e-2, 0.1, 1e-2), (5, (0.0, 0.99), 1e-8, 0.0, 1.0)],
)
def test_path_follows_the_equations(span, betas, eps, decay, regularization):
    noise = np.random.default_rng(0).normal(size=(50, 5)) * 0.1
    points, bases = numpy_path(50, span, 0.05, betas, eps, decay, regularization, noise)
    weights = [part.clone().requires_grad_() for part in torch.tensor(START).split([2, 3])]
    optimizer = OptimisticAMSGrad(
        [{"params": weights[:1]}, {"params": weights[1:]}],
        lr=0.05,
        betas=betas,
        eps=eps,
        weight_decay=decay,
        span=span,
        regularization=regularization,
    )

    def joined():
        return torch.cat([weight.detach() for weight in weights]).numpy()

    for t in range(50):
        full = torch.tensor(CURVATURE * np.sin(joined()) + noise[t])
        weights[0].grad, weights[1].grad = full[:2].clone(), full[2:].clone()
        optimizer.step()
        np.testing.assert_allclose(joined(), points[t], rtol=1e-7, atol=1e-9)
        with optimizer.at_base():
            np.testing.assert_allclose(joined(), bases[t], rtol=1e-7, atol=1e-9)
    assert not np.array_equal(points[-1], bases[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("span", "steps"), [(0, 30), (20, 20)])
def test_without_predictions_it_is_amsgrad_to_the_last_bit(dtype, maximize, span, steps):
    """With span=0, and while the history is too short."""
    torch.manual_seed(0)
    ours = [torch.randn(3, 4, dtype=dtype).requires_grad_(), torch.randn(5, dtype=dtype).requires_grad_()]
    theirs = copy.deepcopy(ours)
    common = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "maximize": maximize}
    one = OptimisticAMSGrad(ours, span=span, **common)
    two = torch.optim.Adam(theirs, amsgrad=True, foreach=False, fused=False, **common)
    for step in range(steps):
        if step == 10:
            one.param_groups[0]["lr"] = two.param_groups[0]["lr"] = 0.01
        for left, right in zip(ours, theirs, strict=True):
            left.grad = torch.randn_like(left) * left.detach()
            right.grad = left.grad.clone()
        one.step()
        two.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_weights_solve_the_constrained_least_squares_problem():
    """c minimizes |U c|^2 + lambda |U'U| |c|^2 among weights that sum to 1."""
    generator = np.random.default_rng(0)
    u = generator.normal(size=(7, 4)) * np.array([1.0, 0.1, 3.0, 0.5])
    gram = u.T @ u
    penalty = gram + 0.05 * np.linalg.norm(gram, 2) * np.eye(4)
    bordered = np.block([[2 * penalty, np.ones((4, 1))], [np.ones((1, 4)), np.zeros((1, 1))]])
    wanted = np.linalg.solve(bordered, np.r_[np.zeros(4), 1.0])[:4]
    found = extrapolation_weights(torch.tensor(gram), 0.05)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-10)


def test_extrapolation_finds_the_limit_of_a_linear_recurrence():
    """Gradients g_t = g + sum_k a_k r_k^t with three ratios: four differences tell the limit g."""
    ratios, limit = np.array([0.9, 0.5, -0.3]), np.array([1.0, -2.0, 0.5, 3.0])
    directions = np.random.default_rng(0).normal(size=(3, 4))
    sequence = np.array([limit + ratios**t @ directions for t in range(5)])
    u = np.diff(sequence, axis=0).T
    weights = extrapolation_weights(torch.tensor(u.T @ u), 1e-13).numpy()
    np.testing.assert_allclose(weights @ sequence[:-1], limit, atol=1e-5)


def test_degenerate_histories():
    assert extrapolation_weights(torch.zeros(3, 3, dtype=torch.float64), 1e-3).tolist() == pytest.approx([1 / 3] * 3)
    assert extrapolation_weights(torch.full((2, 2), math.nan, dtype=torch.float64), 1e-3) is None


def test_constant_gradient_is_predicted_exactly():
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = OptimisticAMSGrad([weight], lr=0.1, span=2)
    for _ in range(6):
        weight.grad = torch.tensor([1.0, -2.0], dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.7, 0.7], dtype=torch.float64), rtol=1e-6, atol=0)
    with optimizer.at_base():
        torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, 0.6], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_changes_from_outside_move_the_base_along(dtype):
    """What is written into the parameters between steps stays: the next step does not start from a stored base."""
    weight = torch.tensor([1.0, -2.0, 4.0], dtype=dtype, requires_grad=True)
    optimizer = OptimisticAMSGrad([weight], lr=0.125, span=1)
    for factor in (1.0, 2.0, 3.0, 4.0):
        weight.grad = torch.full_like(weight, factor)
        optimizer.step()
    with optimizer.at_base():
        base = weight.detach().clone()
    ahead = weight.detach() - base
    assert bool((ahead < 0).all())
    with torch.no_grad():
        weight.copy_(torch.tensor([16.0, 8.0, -32.0]))
    wanted = torch.tensor([16.0, 8.0, -32.0], dtype=dtype) - ahead
    with optimizer.at_base():
        assert torch.equal(weight, wanted)
    optimizer.param_groups[0]["lr"] = 0.0
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight, wanted)
    with optimizer.at_base():
        assert torch.equal(weight, wanted)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_the_way_back_to_the_base_is_exact(seed, dtype):
    """The base, taken from the state alone after the step, is that of a run whose last prediction is left out."""
    generator = torch.Generator().manual_seed(seed)
    start, grads = 3 + torch.rand(7, generator=generator), torch.randn(6, 7, generator=generator)
    found = []
    for without in (False, True):
        weight = start.to(dtype, copy=True).requires_grad_()
        optimizer = OptimisticAMSGrad([weight], lr=0.01, span=2)
        for time, grad in enumerate(grads):
            weight.grad = grad.to(dtype)
            if without and time == 5:
                optimizer._observe = lambda moved: None
            optimizer.step()
        with optimizer.at_base():
            found.append(weight.detach().clone())
    assert torch.equal(*found)


def test_at_base_gives_the_optimistic_point_back_even_after_an_error():
    weight = torch.zeros(2, requires_grad=True)
    optimizer = OptimisticAMSGrad([weight], lr=0.1, span=1)
    for factor in (1.0, 2.0, 3.0):
        weight.grad = torch.full((2,), factor)
        optimizer.step()
    before = weight.detach().clone()

    def fail_inside():
        with optimizer.at_base():
            assert not torch.equal(weight, before)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert torch.equal(weight, before)


def test_scale_of_the_loss_does_not_change_the_path():
    paths = []
    for scale in (1.0, 1e6):
        weight = torch.tensor(START + 0.1, requires_grad=True)
        optimizer = OptimisticAMSGrad([weight], lr=0.05, eps=0.0, span=3)
        for _ in range(20):
            weight.grad = scale * torch.tensor(CURVATURE) * weight.detach().sin()
            optimizer.step()
        paths.append(weight.detach())
    torch.testing.assert_close(paths[0], paths[1], rtol=1e-9, atol=1e-12)


def test_parameter_that_misses_a_step_keeps_a_clean_history():
    """Its difference of the missed step counts as zero, in the products and in its own prediction."""
    weights = [torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    optimizer = OptimisticAMSGrad(weights, lr=0.1, span=2)
    generator = torch.Generator().manual_seed(0)
    for step in range(8):
        for weight in weights:
            weight.grad = torch.randn(2, generator=generator, dtype=torch.float64)
        if step == 6:
            weights[1].grad = None
        optimizer.step()
    own = optimizer.state[weights[0]]
    stored = torch.cat([optimizer.state[weight]["differences"] for weight in weights], 1)
    torch.testing.assert_close(torch.tensor(own["gram"], dtype=torch.float64), stored @ stored.mT)
    assert torch.equal(optimizer.state[weights[1]]["differences"][5 % 2], torch.zeros(2, dtype=torch.float64))


def test_resume_keeps_products_of_float32_parameters():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    inputs = torch.randn(8, 3)

    def run(model, optimizer):
        for _ in range(6):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()

    optimizer = OptimisticAMSGrad(model.parameters(), lr=0.01, span=3)
    run(model, optimizer)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), model.state_dict()], file)
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    other = nn.Linear(3, 2)
    other.load_state_dict(weights)
    again = OptimisticAMSGrad(other.parameters(), lr=0.01, span=3)
    again.load_state_dict(state)
    run(model, optimizer)
    run(other, again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def after_steps(make, count=4):
    """An optimizer over two parameters, of which the first has no gradient."""
    params = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimizer = make(params)
    for factor in range(1, count + 1):
        params[1].grad = torch.full((3,), float(factor))
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("span", [0, 2, 5])
def test_the_state_of_another_span_is_refused(span):
    optimizer = after_steps(functools.partial(OptimisticAMSGrad, span=span))
    state = optimizer.state_dict()
    for other in {0, 1, 2, 5} - {span}:
        with pytest.raises(StateDictError, match=f"not saved with span={other}"):
            after_steps(functools.partial(OptimisticAMSGrad, span=other)).load_state_dict(state)
    fresh = after_steps(functools.partial(OptimisticAMSGrad, span=span), 0)
    fresh.load_state_dict(state)
    assert fresh.state_dict()["state"].keys() == state["state"].keys()
    optimizer.load_state_dict(after_steps(functools.partial(OptimisticAMSGrad, span=1), 0).state_dict())  # no steps yet


def test_foreign_states_are_refused():
    adam = after_steps(functools.partial(torch.optim.Adam, lr=0.1)).state_dict()
    for span in (0, 3):
        optimizer = after_steps(functools.partial(OptimisticAMSGrad, span=span), 0)
        with pytest.raises(StateDictError, match="not saved by OptimisticAMSGrad: it lacks max_exp_avg_sq"):
            optimizer.load_state_dict(adam)
    partial = after_steps(functools.partial(OptimisticAMSGrad, span=3)).state_dict()
    for name in ("gram", "differences"):
        torn = copy.deepcopy(partial)
        for state in torn["state"].values():
            state.pop(name, None)
        with pytest.raises(StateDictError, match="not saved with span=3"):
            after_steps(functools.partial(OptimisticAMSGrad, span=3), 0).load_state_dict(torn)


@settings(max_examples=25, deadline=None)
@given(shape=st.lists(st.integers(1, 4), max_size=3), span=st.integers(0, 4))
def test_state_words_per_element(shape, span):
    weight = torch.ones(shape, requires_grad=True)
    optimizer = OptimisticAMSGrad([weight], span=span)
    for _ in range(span + 2):
        weight.grad = torch.ones(shape)
        optimizer.step()
    words = sum(value.numel() for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor))
    assert words == weight.numel() * (5 + span if span else 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": -1.0}, "lr must be a number at least 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be a number at least 0 and less than 1, got 1.0"),
        ({"betas": 0.9}, "betas must be two numbers, got 0.9"),
        ({"eps": -1.0}, "eps must be a number at least 0"),
        ({"weight_decay": math.inf}, "weight_decay must be a number at least 0, got inf"),
        ({"span": -1}, "span must be an integer of at least 0, got -1"),
        ({"span": 2.0}, "span must be an integer of at least 0, got 2.0"),
        ({"regularization": 0.0}, "regularization must be a number greater than 0, got 0.0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(SettingError, match=message):
        OptimisticAMSGrad([torch.ones(2, requires_grad=True)], **changes)


def test_sparse_gradients_are_refused_before_anything_moves():
    table, other = torch.ones(4, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    (nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum() + other.sum()).backward()
    with pytest.raises(GradientError, match="sparse"):
        OptimisticAMSGrad([other, table]).step()
    assert torch.equal(other, torch.ones(2))


def test_conformance():
    """With lr = 0 the prediction is taken back, so parameters return to the base: no "schedule"."""
    check_optimizer(
        functools.partial(OptimisticAMSGrad, lr=0.01, span=2),
        coupled=True,
        complex=True,
        sparse=False,
        skip=["schedule"],
    )


def test_lr_zero_returns_to_the_base_and_stays():
    weight = torch.ones(3, requires_grad=True)
    optimizer = OptimisticAMSGrad([weight], lr=0.1, span=1)
    for factor in (1.0, 2.0, 0.0, 1.0):
        weight.grad = torch.full((3,), factor)
        if factor == 0.0:
            optimizer.param_groups[0]["lr"] = 0.0
            with optimizer.at_base():
                base = weight.detach().clone()
        optimizer.step()
    assert torch.equal(weight, base)


def test_nothing_grows():
    """Beside the suite's "memory": from early on, and in the entries of the state."""
    weight = torch.ones(4, requires_grad=True)
    optimizer = OptimisticAMSGrad([weight], span=2)

    def living():
        gc.collect()
        return sum(item.numel() for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter))

    counts = []
    for _ in range(2):
        for _ in range(10):
            weight.grad = torch.randn(4)
            optimizer.step()
        counts.append((living(), sum(len(state) for state in optimizer.state.values())))
    assert counts[0] == counts[1]
