"""DARTS and its amended form: closed forms of a quadratic bilevel problem, an unrolled step, equality with eta = 0."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from netwright.core.errors import SettingError
from netwright.core.task import load_task
from netwright.search.amended_darts import AmendedDARTS, amended
from netwright.search.darts import DARTS, first_order, hessian_product, mixed_product, second_order
from netwright.search.relaxed import Mixed

torch.set_num_threads(1)


class Quadratic:
    """Lt = w'Aw/2 - w'Ba + c'w and Lv = |Cw - d|^2/2 + a'Ea/2 with w in two parts and a in one, in float64."""

    def __init__(self, seed, size=5, count=3, curvature=None):
        rng = np.random.default_rng(seed)
        root = rng.normal(size=(size, size))
        self.a = root @ root.T + 0.5 * np.eye(size) if curvature is None else curvature * np.eye(size)
        self.b, self.c = rng.normal(size=(size, count)), rng.normal(size=size)
        self.cc, self.d = rng.normal(size=(size, size)), rng.normal(size=size)
        self.e = np.diag(rng.uniform(0.5, 2.0, count))
        self.w, self.alpha = rng.normal(size=size), rng.normal(size=count)
        self.weights = [nn.Parameter(torch.tensor(self.w[:2])), nn.Parameter(torch.tensor(self.w[2:]))]
        self.alphas = [nn.Parameter(torch.tensor(self.alpha))]

    def train(self):
        w, (a,) = torch.cat(self.weights), self.alphas
        return w @ torch.tensor(self.a) @ w / 2 - w @ torch.tensor(self.b) @ a + torch.tensor(self.c) @ w

    def val(self):
        w, (a,) = torch.cat(self.weights), self.alphas
        return ((torch.tensor(self.cc) @ w - torch.tensor(self.d)) ** 2).sum() / 2 + a @ torch.tensor(self.e) @ a / 2

    def slope_val(self, w):
        return self.cc.T @ (self.cc @ w - self.d)

    def converge(self):
        """Put the weights where the training loss is least."""
        self.w = np.linalg.solve(self.a, self.b @ self.alpha - self.c)
        with torch.no_grad():
            for part, value in zip(self.weights, (self.w[:2], self.w[2:]), strict=True):
                part.copy_(torch.tensor(value))

    def exact(self):
        """The gradient of Lv(w*(a), a) in closed form."""
        best = np.linalg.solve(self.a, self.b @ self.alpha - self.c)
        return self.e @ self.alpha + self.b.T @ np.linalg.solve(self.a, self.slope_val(best))


def close(found, wanted):
    np.testing.assert_allclose(np.concatenate([part.detach().numpy().ravel() for part in found]), wanted, rtol=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.floats(0.001, 1.0))
def test_gradients_are_the_closed_forms(seed, exact, rate):
    p = Quadratic(seed)
    before = [part.detach().clone() for part in p.weights]
    close(first_order(p.val, p.alphas), p.e @ p.alpha)
    after = p.w - rate * (p.a @ p.w - p.b @ p.alpha + p.c)
    found = second_order(p.train, p.val, p.weights, p.alphas, rate, exact=exact)
    close(found, p.e @ p.alpha + rate * p.b.T @ p.slope_val(after))
    found = amended(p.train, p.val, p.weights, p.alphas, rate, exact=exact)
    close(found, p.e @ p.alpha + rate * p.b.T @ (p.a @ p.slope_val(p.w)))
    vector = [torch.tensor(p.d[:2]), torch.tensor(p.d[2:])]
    close(hessian_product(p.train, p.weights, vector, exact=exact), p.a @ p.d)
    close(mixed_product(p.train, p.weights, p.alphas, vector, exact=exact), -p.b.T @ p.d)
    assert all(torch.equal(part, value) for part, value in zip(p.weights, before, strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10.0))
def test_amended_gradient_beside_the_exact_one(seed, curvature):
    p = Quadratic(seed)
    p.converge()
    v = p.slope_val(p.w)
    curved = np.concatenate(
        [part.numpy() for part in hessian_product(p.train, p.weights, torch.tensor(v).split([2, 3]), exact=True)]
    )
    assert curved @ np.linalg.solve(p.a, v) == pytest.approx(v @ v)  # H v and H^-1 v agree
    p = Quadratic(seed, curvature=curvature)
    p.converge()
    amending = amended(p.train, p.val, p.weights, p.alphas, 1.0, exact=True)[0].numpy() - p.e @ p.alpha
    assert amending @ (p.exact() - p.e @ p.alpha) >= 0
    close(amended(p.train, p.val, p.weights, p.alphas, curvature**-2, exact=True), p.exact())  # H = h I


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 3.0))
def test_how_far_the_amended_gradient_is_from_the_exact_one(seed, eta):
    """The angle is at most 90 degrees, by Kantorovich less; the error is that of ``eta h`` for ``1 / h``."""
    p = Quadratic(seed, count=5)
    p.b = np.linalg.qr(p.b)[0]  # so that alphas see angles and lengths as weights do
    p.converge()
    spectrum, directions = np.linalg.eigh(p.a)
    apart = np.abs(eta * spectrum - 1 / spectrum)
    for v in (p.slope_val(p.w), directions[:, apart.argmax()]):
        p.cc, p.d = np.eye(5), p.w - v
        exact, plain = p.exact(), first_order(p.val, p.alphas)[0].numpy()
        found = amended(p.train, p.val, p.weights, p.alphas, eta, exact=True)[0].detach().numpy()
        size = np.linalg.norm(v)
        error = np.linalg.norm(found - exact)
        assert error <= size * apart.max() * (1 + 1e-6)
        condition = spectrum[-1] / spectrum[0]
        cosine = (found - plain) @ (exact - plain) / np.linalg.norm(found - plain) / np.linalg.norm(exact - plain)
        assert cosine >= 2 * condition / (1 + condition**2) * (1 - 1e-6) > 0
        careful = amended(p.train, p.val, p.weights, p.alphas, spectrum[-1] ** -2, exact=True)[0].detach().numpy()
        assert np.linalg.norm(careful - exact) < np.linalg.norm(plain - exact)
    assert error == pytest.approx(size * apart.max())  # the bound is attained


def test_alphas_may_disagree_where_the_hessian_does_not_commute():
    hessian, cross, v = np.diag([1.0, 100.0]), np.array([1.0, 1.0]), np.array([1.0, -0.5])
    assert (cross @ hessian @ v) * (cross @ np.linalg.solve(hessian, v)) < 0
    w, a = nn.Parameter(torch.zeros(2).double()), nn.Parameter(torch.zeros(1).double())

    def train():
        return (w * torch.tensor(hessian) @ w).sum() / 2 + a[0] * (w @ torch.tensor(cross))

    (found,) = amended(train, lambda: w @ torch.tensor(v) + 0 * a.sum(), [w], [a], 1.0, exact=True)
    assert float(found) == pytest.approx(-cross @ hessian @ v)


def test_descent_by_the_amended_gradient_solves_the_bilevel_problem():
    p = Quadratic(4, curvature=2.0)
    for _ in range(600):
        p.converge()
        (slope,) = amended(p.train, p.val, p.weights, p.alphas, 0.25)
        p.alpha = p.alpha - 0.1 * slope.numpy()
        with torch.no_grad():
            p.alphas[0].copy_(torch.tensor(p.alpha))
    response = np.linalg.solve(p.a, p.b)  # w* = response a - shift
    shift = np.linalg.solve(p.a, p.c)
    dense = np.linalg.solve(response.T @ p.cc.T @ p.cc @ response + p.e, response.T @ p.cc.T @ (p.cc @ shift + p.d))
    np.testing.assert_allclose(p.alpha, dense, rtol=1e-6)
    assert np.linalg.norm(p.exact()) < 1e-6
    assert np.linalg.norm(p.e @ p.alpha) > 0.1  # first order would not have stopped here


@pytest.mark.parametrize(("exact", "tolerance"), [(True, 1e-10), (False, 1e-4)])
def test_second_order_is_the_derivative_through_a_step(exact, tolerance):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    w = nn.Parameter(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    a = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))

    def loss(weight, inputs, targets):
        shares = a.softmax(0)
        return ((shares[0] * inputs + shares[1] * (inputs @ weight).tanh() - targets) ** 2).mean()

    (found,) = second_order(lambda: loss(w, x, y), lambda: loss(w, y, x), [w], [a], 0.7, exact=exact)
    (slope,) = torch.autograd.grad(loss(w, x, y), [w], create_graph=True)
    (wanted,) = torch.autograd.grad(loss(w - 0.7 * slope, y, x), [a])
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    (plain,) = first_order(lambda: loss(w, y, x), [a])
    assert not torch.allclose(plain, wanted, rtol=0.01)
    assert torch.equal(second_order(lambda: loss(w, x, y), lambda: loss(w, y, x), [w], [a], 0.0)[0], plain)


class Scalar(nn.Module):
    """One weight and one alpha, in float64."""

    def __init__(self):
        super().__init__()
        self.edge = Mixed({"a": nn.Identity(), "b": nn.Identity()})
        self.w = nn.Parameter(torch.tensor(1.5))
        self.double()


def test_an_iteration_moves_alphas_and_then_weights():
    net = Scalar()
    stepper = DARTS(lr=0.1, momentum=0.0, weight_decay=0.0, clip_norm=None)._stepper(net, 0)
    stepper.others = (SGD([net.edge.alpha], lr=0.2),)
    w, a = 1.5, 0.0
    for _ in range(5):
        loss = stepper.step(
            lambda n: lambda: (n.w * (1 + n.edge.alpha[0]) - 2) ** 2, lambda n: lambda: n.w * n.edge.alpha[0].cos(), 0
        )
        a += 0.2 * w * np.sin(a)
        assert loss == pytest.approx((w * (1 + a) - 2) ** 2)
        w -= 0.1 * 2 * (w * (1 + a) - 2) * (1 + a)
        assert [net.w.item(), net.edge.alpha[0].item()] == pytest.approx([w, a])


def network():
    torch.manual_seed(3)
    wide = nn.Sequential(nn.Linear(30, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Dropout(0.1))
    return nn.Sequential(Mixed({"skip": nn.Identity(), "wide": wide}), nn.Linear(30, 2))


def test_eta_zero_is_first_order_to_the_digit_and_eta_is_not():
    task, model = load_task("breast-cancer"), network()
    settings_of = {"epochs": 2, "alpha_lr": 0.1, "alpha_decay": 0.0}
    plain = DARTS(**settings_of).search(model, task)
    off = AmendedDARTS(eta=0.0, **settings_of).search(model, task)
    on = AmendedDARTS(eta=1.0, **settings_of).search(model, task)
    assert torch.equal(plain.alphas["0"], off.alphas["0"])
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, off.network.state_dict()[name])
    assert not torch.equal(plain.alphas["0"], on.alphas["0"])


@pytest.mark.parametrize("search", [DARTS(order=2), DARTS(order=2, exact=True), AmendedDARTS(exact=True)])
def test_running_statistics_are_those_of_the_weights_steps(search):
    stepper = search._stepper(network(), 0)
    net = stepper.networks[0]
    x = torch.randn(8, 30)
    stepper.step(lambda n: lambda: n(x).square().mean(), lambda n: lambda: n(x + 5).square().mean(), 0)
    norm = net[0].operations[1][1]
    assert int(norm.num_batches_tracked) == 1


@pytest.mark.parametrize(
    ("kind", "wrong", "words"),
    [
        (DARTS, {"order": 3}, "order must be 1 or 2, got 3"),
        (DARTS, {"alpha_lr": -1e-3}, "alpha_lr must be a positive, finite number"),
        (AmendedDARTS, {"eta": -0.1}, "eta must be a non-negative, finite number, got -0.1"),
        (AmendedDARTS, {"eta": float("nan")}, "got nan"),
        (AmendedDARTS, {"clip_norm": 0.0}, "clip_norm must be a positive"),
    ],
)
def test_bad_settings(kind, wrong, words):
    with pytest.raises(SettingError, match=words):
        kind(**wrong)
