"""RARTS: a naive transcription of its three moves, the stationary point of a quadratic, shared alphas, bad settings."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from netwright.core.errors import SettingError
from netwright.core.task import load_task
from netwright.search.rarts import RARTS
from netwright.search.relaxed import Mixed, alphas

torch.set_num_threads(1)


class Vectors(nn.Module):
    """A vector of weights and one of alphas, in float64."""

    def __init__(self, w, alpha):
        super().__init__()
        self.edge = Mixed({name: nn.Identity() for name in "abc"})
        self.w = nn.Parameter(torch.tensor(w))
        self.double()
        with torch.no_grad():
            self.edge.alpha.copy_(torch.tensor(alpha))


def plain(net, lam, beta, rate, alpha_rate):
    """The iterations of RARTS with plain gradient steps."""
    stepper = RARTS(lr=rate, momentum=0.0, weight_decay=0.0, clip_norm=None, lam=lam, beta=beta)._stepper(net, 0)
    stepper.others = (SGD([net.edge.alpha], lr=alpha_rate),)
    return stepper


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 3.0), st.floats(0.0, 3.0))
def test_moves_are_those_of_gauss_and_seidel(seed, lam, beta):
    rng = np.random.default_rng(seed)
    w, a = rng.normal(size=3), rng.normal(size=3)
    net = Vectors(w, a)
    stepper = plain(net, lam, beta, 0.01, 0.02)  # small enough that nothing diverges, whatever is drawn
    y = w.copy()
    for _ in range(4):  # Lv = sum sin(y a), Lt = sum (w a - 1)^2
        loss = stepper.step(
            lambda n: lambda: ((n.w * n.edge.alpha - 1) ** 2).sum(),
            lambda n: lambda: (n.w * n.edge.alpha).sin().sum(),
            0,
        )
        assert loss == pytest.approx(((w * a - 1) ** 2).sum())
        y = y - 0.01 * (np.cos(y * a) * a + beta * (y - w))
        w = w - 0.01 * (lam * 2 * (w * a - 1) * a + beta * (w - y))
        a = a - 0.02 * (np.cos(y * a) * y + lam * 2 * (w * a - 1) * w)
        found = [stepper.networks[1].w, net.w, net.edge.alpha]
        for part, wanted in zip(found, (y, w, a), strict=True):
            np.testing.assert_allclose(part.detach().numpy(), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("lam", "beta"), [(0.3, 2.0), (2.0, 0.0)])
def test_it_ends_at_the_stationary_point_of_a_quadratic(lam, beta):
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(3, 3)), rng.normal(size=(3, 3))
    c, d = rng.normal(size=3), rng.normal(size=3)
    net = Vectors(rng.normal(size=3), rng.normal(size=3))
    stepper = plain(net, lam, beta, 0.15, 0.1)

    def loss(target, cross):  # |u - P a - c|^2 / 2 + |a|^2 / 2
        t, m = torch.tensor(target), torch.tensor(cross)
        return lambda n: lambda: ((n.w - m @ n.edge.alpha - t) ** 2).sum() / 2 + (n.edge.alpha**2).sum() / 2

    for _ in range(800):
        stepper.step(loss(d, q), loss(c, p), 0)
    one = np.eye(3)
    matrix = np.block(
        [
            [(1 + beta) * one, -beta * one, -p],
            [-beta * one, (lam + beta) * one, -lam * q],
            [-p.T, -lam * q.T, p.T @ p + lam * q.T @ q + (1 + lam) * one],
        ]
    )
    y, w, a = np.split(np.linalg.solve(matrix, np.concatenate([c, lam * d, -p.T @ c - lam * q.T @ d])), 3)
    for part, wanted in zip([stepper.networks[1].w, net.w, net.edge.alpha], (y, w, a), strict=True):
        np.testing.assert_allclose(part.detach().numpy(), wanted, rtol=1e-5, atol=1e-7)
    assert np.linalg.norm(y - w) > 0.05


def network():
    wide = nn.Sequential(nn.Linear(30, 30), nn.BatchNorm1d(30), nn.Tanh())
    return nn.Sequential(Mixed({"skip": nn.Identity(), "wide": wide}), nn.Linear(30, 2))


def test_both_copies_share_their_alphas_and_see_each_half():
    model = network()
    stepper = RARTS()._stepper(model, 0)
    first, second = stepper.networks
    assert alphas(first)["0"] is alphas(second)["0"]
    assert first[1].weight is not second[1].weight
    seen = []

    def half(name):
        def of(net):
            def loss():
                seen.append((name, net is first))
                return net(torch.randn(8, 30)).square().mean()

            return loss

        return of

    stepper.step(half("train"), half("held"), 0)
    assert seen == [("held", False), ("train", True), ("held", False), ("train", True)]
    assert int(first[0].operations[1][1].num_batches_tracked) == 1


def test_alphas_that_the_network_holds_elsewhere_too_are_shared():
    class Cells(nn.Module):
        def __init__(self):
            super().__init__()
            self.alphas = nn.ParameterList([torch.zeros(2)])
            kinds = ({"skip": nn.Identity(), "linear": nn.Linear(3, 3)} for _ in range(2))
            self.edges = nn.Sequential(*(Mixed(kind, alpha=self.alphas[0]) for kind in kinds))

        def forward(self, x):
            return self.edges(x)

    stepper = RARTS()._stepper(Cells(), 0)
    first, second = stepper.networks
    assert first.alphas[0] is second.alphas[0] is second.edges[1].alpha
    assert first.edges[0].operations[1].weight is not second.edges[0].operations[1].weight
    x = torch.randn(8, 3)
    before = first.alphas[0].detach().clone()
    stepper.step(lambda n: lambda: n(x).square().mean(), lambda n: lambda: (n(x) - 1).square().mean(), 0)
    assert not torch.equal(first.alphas[0], before)
    assert torch.equal(first.alphas[0], second.edges[0].alpha)


def test_the_pull_keeps_copies_together():
    def distance(beta):
        torch.manual_seed(0)
        stepper = RARTS(beta=beta)._stepper(network(), 0)
        x = torch.randn(16, 30)
        for _ in range(20):
            stepper.step(lambda n: lambda: (n(x) - 1).square().mean(), lambda n: lambda: n(x + 1).square().mean(), 0)
        first, second = stepper.networks
        return (first[1].weight - second[1].weight).norm().item()

    assert distance(5.0) < 0.5 * distance(0.0)


def test_it_finds_what_is_better_on_real_data():
    blocked = nn.Sequential(nn.Linear(30, 1, bias=False), nn.Linear(1, 30, bias=False), nn.Threshold(1e9, 0.0))
    model = nn.Sequential(Mixed({"blocked": blocked, "skip": nn.Identity()}), nn.Linear(30, 2))
    result = RARTS(epochs=6, alpha_lr=0.1).search(model, load_task("breast-cancer"))
    assert result.choices == {"0": "skip"}
    assert result.skip_share == 1.0
    assert result.scores[-1] > 0.9


@pytest.mark.parametrize("wrong", [{"lam": -1.0}, {"beta": -0.1}, {"beta": float("inf")}, {"alpha_decay": -1.0}])
def test_bad_settings(wrong):
    with pytest.raises(SettingError, match=f"RARTS: {next(iter(wrong))} must be a non-negative, finite number"):
        RARTS(**wrong)
