"""SANIA against a NumPy transcription, dense Hessians, and its own invariance."""

import copy
import functools
import gc
import io
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netwright.core.errors import ClosureError, GradientError, SettingError
from netwright.optim.sania import SANIA, hutchinson_diagonal
from netwright.testing import check_optimizer


def softmax_problem(seed=0, scale=None, count=60, features=5, classes=3):
    """Features ``(n, d)`` times ``scale``, labels by a linear rule, a zero weight ``(d, classes)``; float64."""
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(count, features))
    labels = (inputs @ generator.normal(size=(features, classes))).argmax(1)
    inputs = inputs if scale is None else inputs * scale
    return torch.tensor(inputs), torch.tensor(labels), torch.zeros(features, classes, dtype=torch.float64)


def cross_entropy_closure(optimizer, weight, inputs, labels, graph=False):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(inputs @ weight, labels)
        if not graph:
            loss.backward()
        return loss

    return closure


def numpy_path(inputs, labels, steps, kind, beta, eps, optimum=0.0, lr=1.0):
    """The losses of SANIA on softmax regression, from the paper's equations, without torch."""
    inputs, labels = inputs.numpy(), labels.numpy()
    classes = labels.max() + 1
    weight = np.zeros((inputs.shape[1], classes))
    sum_of_squares, v, losses = np.zeros_like(weight), np.zeros_like(weight), []
    for t in range(1, steps + 1):
        logits = inputs @ weight
        probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        f = -np.log(probability[np.arange(len(labels)), labels]).mean() - optimum
        losses.append(f + optimum)
        g = inputs.T @ (probability - np.eye(classes)[labels]) / len(labels)
        sum_of_squares += g**2
        v = beta * v + (1 - beta) * g**2
        b = np.maximum(sum_of_squares if kind == "adagrad" else v / (1 - beta**t), eps)
        n = np.sum(g * g / b)
        tau = 1 - np.sqrt(1 - 2 * f / n) if 2 * f < n else 1.0
        weight = weight - lr * tau * g / b
    return np.array(losses)


@pytest.mark.parametrize("kind", ["adagrad", "adam"])
@pytest.mark.parametrize(("beta", "eps", "optimum", "lr"), [(0.9, 1e-12, 0.0, 1.0), (0.99, 1e-2, 0.3, 0.5)])
def test_path_follows_the_equations(kind, beta, eps, optimum, lr):
    inputs, labels, weight = softmax_problem()
    weight.requires_grad_()
    optimizer = SANIA([weight], kind, beta=beta, eps=eps, optimum=optimum, lr=lr)
    closure = cross_entropy_closure(optimizer, weight, inputs, labels)
    losses = [float(optimizer.step(closure)) for _ in range(50)]
    wanted = numpy_path(inputs, labels, 50, kind, beta, eps, optimum, lr)
    np.testing.assert_allclose(losses[:20], wanted[:20], rtol=1e-10)
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)  # the steps are long enough to amplify rounding
    assert len(set(losses)) == 50


@pytest.mark.parametrize("kind", ["adagrad", "adam"])
def test_loss_path_is_invariant_to_rescaled_features(kind):
    scale = 10.0 ** np.random.default_rng(1).uniform(-4, 4, size=5)
    paths = []
    for factor in (None, scale):
        inputs, labels, weight = softmax_problem(scale=factor)
        weight.requires_grad_()
        optimizer = SANIA([weight], kind, eps=1e-300)
        closure = cross_entropy_closure(optimizer, weight, inputs, labels)
        paths.append([float(optimizer.step(closure)) for _ in range(30)])
    np.testing.assert_allclose(paths[1], paths[0], rtol=1e-6)
    assert len(set(paths[0])) > 20


def test_power_of_two_scales_change_no_bit():
    paths = []
    for factor in (None, 2.0 ** np.array([-12, 5, 0, 9, -3])):
        inputs, labels, weight = softmax_problem(scale=factor)
        weight.requires_grad_()
        optimizer = SANIA([weight], eps=1e-300)
        closure = cross_entropy_closure(optimizer, weight, inputs, labels)
        paths.append([float(optimizer.step(closure)) for _ in range(30)])
    assert paths[0] == paths[1]


def test_floor_on_a_quadratic_reaches_half_the_loss_exactly():
    """With B = 1 everywhere the model is the loss itself: one step takes w^2/2 to its optimum, and not beyond."""
    weight = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    optimizer = SANIA([weight], eps=1.0)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    assert weight.abs().max() < 1e-12

    shifted = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    optimizer = SANIA([shifted], eps=1.0, optimum=0.08)

    def closure_with_optimum():
        optimizer.zero_grad()
        loss = shifted.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure_with_optimum)
    assert float(shifted.detach().square().sum() / 2) == pytest.approx(0.08, rel=1e-12)


def test_small_shares_lose_no_digits():
    """2 f / n of 1e-12 in float32: 1 - sqrt(1 - q) would be 0."""
    weight = torch.ones(1, requires_grad=True)
    optimizer = SANIA([weight], eps=1e-30)

    def closure():
        weight.grad = torch.ones(1)
        return torch.tensor(5e-13)

    before = weight.detach().clone().double()
    optimizer.step(closure)
    assert torch.equal(weight.detach().double(), before)  # the step of 5e-13 is below float32 here
    big = torch.zeros(1, requires_grad=True)
    optimizer = SANIA([big], eps=1e-30)

    def closure_at_zero():
        big.grad = torch.ones(1)
        return torch.tensor(5e-13)

    optimizer.step(closure_at_zero)
    assert float(big.detach()) == pytest.approx(-5e-13, rel=1e-6)


def test_all_parameters_share_one_step():
    inputs, labels, weight = softmax_problem()
    whole = weight.clone().requires_grad_()
    halves = [weight[:, :1].clone().requires_grad_(), weight[:, 1:].clone().requires_grad_()]
    one, two = SANIA([whole]), SANIA([{"params": halves[:1]}, {"params": halves[1:]}])

    def closure():
        two.zero_grad()
        loss = nn.functional.cross_entropy(inputs @ torch.cat(halves, 1), labels)
        loss.backward()
        return loss

    for _ in range(20):
        one.step(cross_entropy_closure(one, whole, inputs, labels))
        two.step(closure)
    torch.testing.assert_close(torch.cat(halves, 1), whole, rtol=1e-10, atol=1e-12)


def test_loss_below_the_optimum_stops():
    weight = torch.ones(2, requires_grad=True)
    optimizer = SANIA([weight], optimum=2.0)

    def closure():
        weight.grad = torch.ones(2)
        return torch.tensor(1.5)

    optimizer.step(closure)
    assert torch.equal(weight, torch.ones(2))


def test_zero_gradient_moves_nothing():
    weight = torch.ones(2, requires_grad=True)
    optimizer = SANIA([weight])

    def closure():
        weight.grad = torch.zeros(2)
        return torch.tensor(1.0)

    optimizer.step(closure)
    assert torch.equal(weight, torch.ones(2))


def quartic(size=6, seed=3):
    """A loss with a dense Hessian that varies from point to point, and a point."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    point = torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True)
    return (lambda x: ((mix @ x) ** 4).sum() / 24 + (mix[0] * x).sum() ** 2), point


def test_hutchinson_estimate_is_unbiased():
    """Mean of 1000 draws within 5 standard errors of diag(H), entry by entry, and far from H times ones."""
    loss, point = quartic()
    hessian = torch.func.hessian(loss)(point.detach())
    (grad,) = torch.autograd.grad(loss(point), [point], create_graph=True)
    torch.manual_seed(0)
    draws = 1000
    (estimate,) = hutchinson_diagonal([point], [grad], draws)
    exact = hessian.diagonal()
    error = ((hessian - torch.diag(exact)).square().sum(1) / draws).sqrt()
    assert bool(((estimate - exact).abs() <= 5 * error).all())
    assert bool(((hessian.sum(1) - exact).abs() > 20 * error).any())


def test_hutchinson_averages_over_all_signs_to_the_exact_diagonal(monkeypatch):
    loss, point = quartic(size=3)
    signs = iter([torch.tensor(sign, dtype=torch.float64) for sign in itertools.product([0.0, 1.0], repeat=3)])
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda self, probability: self.copy_(next(signs)))
    (grad,) = torch.autograd.grad(loss(point), [point], create_graph=True)
    (estimate,) = hutchinson_diagonal([point], [grad], 8)
    exact = torch.func.hessian(loss)(point.detach()).diagonal()
    torch.testing.assert_close(estimate, exact)


def test_signs_are_both_drawn_equally():
    """With H = ones - I, an entry of the estimate is its sign times the sum of the others' signs: -2, 0 or 2."""
    torch.manual_seed(0)
    seen = []
    for _ in range(400):
        point = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        loss = (point.sum() ** 2 - point.square().sum()) / 2
        (grad,) = torch.autograd.grad(loss, [point], create_graph=True)
        seen += hutchinson_diagonal([point], [grad], 1)[0].tolist()
    assert set(seen) == {-2.0, 0.0, 2.0}
    assert abs(sum(seen) / len(seen)) < 0.2


def test_hutchinson_with_a_diagonal_hessian_follows_the_equations():
    """For H = diag(c) every draw is exact, so the path is known."""
    curvature = np.array([100.0, 1.0, -0.01])
    target = np.array([1.0, -2.0, 0.5])
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = SANIA([weight], "hutchinson", beta=0.9, eps=1e-3, optimum=-1.0, samples=2)
    c, place = torch.tensor(curvature), torch.tensor(target)
    w = np.zeros(3)
    for _ in range(10):
        loss = optimizer.step(lambda: (c * (weight - place) ** 2).sum() / 2 / 100)
        f = (curvature * (w - target) ** 2).sum() / 200
        assert float(loss) == pytest.approx(f, rel=1e-10)
        g = curvature * (w - target) / 100
        b = np.maximum(np.abs(curvature) / 100, 1e-3)
        n = np.sum(g * g / b)
        tau = 1 - np.sqrt(1 - 2 * (f + 1) / n) if 2 * (f + 1) < n else 1.0
        w = w - tau * g / b
        np.testing.assert_allclose(weight.detach().numpy(), w, rtol=1e-9, atol=1e-12)


SCALES = torch.tensor([4.0, 0.125, 1.0, 32.0], dtype=torch.float64)


def rescaled_path(features, scales, kind):
    """Losses of least squares with the features ``(n, 4)`` multiplied by ``scales``, from one and the same function."""
    torch.manual_seed(3)
    start = torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=torch.float64)
    weight = (start / scales).requires_grad_()
    optimizer = SANIA([weight], kind, eps=1e-300)

    def closure():
        optimizer.zero_grad()
        loss = ((features * scales) @ weight - features.sum(1)).square().mean()
        if kind != "hutchinson":
            loss.backward()
        return loss

    return [float(optimizer.step(closure).detach()) for _ in range(6)]


def test_hutchinson_is_invariant_to_scales_only_where_its_draws_are_exact():
    """They are for a diagonal Hessian; else a draw mixes scales, and the path with rescaled features is another."""
    mixed = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    orthogonal = torch.linalg.qr(mixed).Q * 3
    same = torch.ones(4, dtype=torch.float64)
    for features, kind in ((orthogonal, "hutchinson"), (mixed, "adagrad"), (mixed, "adam")):
        np.testing.assert_allclose(
            rescaled_path(features, SCALES, kind), rescaled_path(features, same, kind), rtol=1e-6, atol=1e-12
        )
    plain, scaled = (np.array(rescaled_path(mixed, scales, "hutchinson")) for scales in (same, SCALES))
    assert scaled[0] == pytest.approx(plain[0])
    assert abs(scaled[1] - plain[1]) > 0.05 * plain[1]


def test_hutchinson_in_expectation_scales_as_a_squared_gradient(monkeypatch):
    mixed = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def estimate(scales, signs):
        draws = iter(torch.tensor(signs, dtype=torch.float64))
        monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda self, chance: self.copy_(next(draws)))
        point = (1 / scales).requires_grad_()
        loss = ((mixed * scales) @ point).square().mean()
        (grad,) = torch.autograd.grad(loss, [point], create_graph=True)
        return hutchinson_diagonal([point], [grad], len(signs))[0]

    same, every = torch.ones(4, dtype=torch.float64), list(itertools.product([0.0, 1.0], repeat=4))
    torch.testing.assert_close(estimate(SCALES, every), SCALES**2 * estimate(same, every))
    assert not torch.allclose(estimate(SCALES, every[:1]), SCALES**2 * estimate(same, every[:1]), rtol=0.1)


def test_hutchinson_running_mean():
    weight = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = SANIA([weight], "hutchinson", beta=0.75, eps=1e-12, optimum=-1e9)
    w, mean = 1.0, 0.0
    for t in range(1, 8):
        optimizer.step(lambda: (weight**4).sum())
        mean = 0.75 * mean + 0.25 * 12 * w**2
        w -= 4 * w**3 / (mean / (1 - 0.75**t))
        assert float(weight.detach()) == pytest.approx(w, rel=1e-10)


def test_hutchinson_leaves_no_graph_and_no_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = SANIA(model.parameters(), "hutchinson")
    inputs = torch.randn(16, 4)

    def living():
        gc.collect()
        return sum(1 for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter))

    counts = []
    for _ in range(2):
        for _ in range(4):
            loss = optimizer.step(lambda: model(inputs).square().mean())
            assert not loss.requires_grad
        counts.append(living())
    assert counts[0] == counts[1]
    assert all(param.grad is None for param in model.parameters())


def test_hutchinson_skips_what_the_loss_does_not_reach():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    linear = torch.ones(2, requires_grad=True)
    optimizer = SANIA([used, unused, linear], "hutchinson")
    optimizer.step(lambda: used.square().sum() + linear.sum())
    assert torch.equal(unused, torch.ones(2))
    assert unused not in optimizer.state
    assert not torch.equal(used, torch.ones(2))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), max_size=3),
    kind=st.sampled_from(["adagrad", "adam", "hutchinson"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_state_is_one_word_per_element(shape, kind, dtype):
    weight = torch.full(shape, 0.5, dtype=dtype, requires_grad=True)
    optimizer = SANIA([weight], kind)

    def closure():
        optimizer.zero_grad()
        loss = weight.float().square().sum()
        if kind != "hutchinson":
            loss.backward()
        return loss

    optimizer.step(closure)
    state = optimizer.state[weight]
    assert sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor)) == weight.numel()
    assert weight.dtype == dtype
    assert bool(weight.isfinite().all())


def test_resume_inside_a_hutchinson_run():
    model = nn.Linear(3, 2)
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def run(model, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            optimizer.step(lambda: model(inputs).square().mean())

    optimizer = SANIA(model.parameters(), "hutchinson", samples=3)
    run(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    again = SANIA(other.parameters(), "hutchinson", samples=3)
    again.load_state_dict(torch.load(file, weights_only=True))
    run(model, optimizer, range(4, 8))
    run(other, again, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preconditioner": "newton"}, "preconditioner must be 'adagrad' or 'adam' or 'hutchinson', got 'newton'"),
        ({"lr": -1.0}, "lr must be a number at least 0, got -1.0"),
        ({"beta": 1.0}, "beta must be a number at least 0 and less than 1, got 1.0"),
        ({"eps": 0.0}, "eps must be a number greater than 0, got 0.0"),
        ({"optimum": float("inf")}, "optimum must be a number"),
        ({"optimum": "low"}, "optimum must be a number"),
        ({"samples": 0}, "samples must be a positive integer, got 0"),
        ({"samples": True}, "samples must be a positive integer, got True"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(SettingError, match=message):
        SANIA([torch.ones(2, requires_grad=True)], **changes)


def test_negative_optimum_is_fine():
    assert SANIA([torch.ones(2, requires_grad=True)], optimum=-3.0).optimum == -3.0


def test_complex_parameters_are_refused():
    with pytest.raises(SettingError, match="view_as_real"):
        SANIA([torch.ones(2, dtype=torch.complex64, requires_grad=True)])


def test_bad_closures():
    weight = torch.ones(2, requires_grad=True)
    with pytest.raises(ClosureError, match=r"loss\.backward\(\)"):
        SANIA([weight]).step()
    with pytest.raises(ClosureError, match="no backward"):
        SANIA([weight], "hutchinson").step()
    with pytest.raises(ClosureError, match="scalar loss, got None"):
        SANIA([weight]).step(lambda: None)
    with pytest.raises(GradientError, match="no graph"):
        SANIA([weight], "hutchinson").step(lambda: torch.tensor(1.0))
    table = torch.ones(4, 2, requires_grad=True)
    with pytest.raises(GradientError, match="sparse"):
        SANIA([table], "hutchinson").step(
            lambda: nn.functional.embedding(torch.tensor([1]), table, sparse=True).square().sum()
        )
    assert torch.equal(table, torch.ones(4, 2))


@pytest.mark.parametrize("kind", ["adagrad", "adam", "hutchinson"])
def test_conformance(kind):
    eps = 1e-2 if kind == "hutchinson" else 1e-4
    skip = ["device"] if kind == "hutchinson" else []  # its signs come from the device's generator
    check_optimizer(functools.partial(SANIA, preconditioner=kind, eps=eps), coupled=True, sparse=False, skip=skip)
