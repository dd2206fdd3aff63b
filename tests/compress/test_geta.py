"""GETA: training against a NumPy transcription, bit constraints at every step, and the integers that are stored."""

import copy
import dataclasses

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_reference import RATE, gradients, network, numbers, regression
from test_hesso import lowest, scale, score, vectors
from torch import nn

from netwright.compress._geta_hook import JointTraining, forget_rate, forget_step
from netwright.compress._learned_quantizer import LearnedGrid, grid_slopes, on_grid, step_of, width_of
from netwright.compress.geta import GETA
from netwright.core.artifact import export_onnx
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.fit import fit
from netwright.testing import check_transform, small_tasks

NAMES = ["0.weight", "2.weight"]
WIDE = 7.0  # with 16 bits residuals of rounding magnify the last digits a thousandfold at every step


def trained(method: GETA, task, steps: int) -> tuple[nn.Module, JointTraining]:
    model = copy.deepcopy(task.model)
    recipe = task.recipe.replace(epochs=steps)
    hook = method.hook(model, NAMES, method._plan(model, task), recipe, steps)
    fit(model, task, recipe, validate=False, hook=hook)
    hook.finish()
    return model, hook


def shown(x, d, q):
    return np.sign(x) * d * np.round(np.minimum(np.abs(x), q) / d)


def rest_of(x, d, q):
    scaled = np.minimum(np.abs(x), q) / d
    return np.sign(x) * (np.round(scaled) - scaled)


def naive(task, steps: int, goal: int, periods: int, low: int, high: int):
    """Stages at 0.1, 0.3 and 0.7 of the steps; widths start at ``WIDE``."""
    first, prune, settle = int(0.1 * steps), int(0.3 * steps), int(0.7 * steps)
    length = (settle - prune) // periods
    params = numbers(task.model)
    q = [np.abs(params[i]).max() for i in (0, 2)]
    d = [r / (2.0 ** (WIDE - 1) - 1) for r in q]
    gone, fading, widths = set(), set(), None
    for step in range(steps):
        view = [value.copy() for value in params]
        for i in (0, 1):
            view[2 * i] = shown(params[2 * i], d[i], q[i])
        grads = gradients(view, task)
        full = vectors(grads)
        part = (step - prune) % length
        if goal and prune <= step < settle and part == 0:
            scores = score(vectors(view), full)
            scores[sorted(gone)] = -np.inf
            fading = lowest(scores, round(goal * ((step - prune) // length + 1) / periods)) - gone
        upper = WIDE
        if first <= step < prune:
            upper -= (WIDE - high) * min(1.0, ((step - first) * periods // (prune - first) + 1) / periods)
        upper = float(high) if step >= prune else upper
        for i in (0, 1):
            x, g = params[2 * i], grads[2 * i]
            by_step, by_reach = (g * rest_of(x, d[i], q[i])).sum(), (g * np.sign(x) * (np.abs(x) >= q[i])).sum()
            levels = q[i] / d[i]
            grads[2 * i] = g * (np.abs(x) < q[i])
            d[i] = max(d[i] - RATE * by_step / np.sqrt(x.size * levels), 0.5 * d[i])
            q[i] = max(q[i] - RATE * by_reach / np.sqrt(x.size), 0.5 * q[i])
            if widths:
                d[i] = q[i] / (2.0 ** (widths[i] - 1) - 1)
            else:
                d[i] = np.clip(d[i], q[i] / (2.0 ** (upper - 1) - 1), q[i] / (2.0 ** (low - 1) - 1))
        gamma, chosen = 0.0, sorted(fading)
        if prune <= step < settle and chosen:
            clipped = np.concatenate([np.clip(params[0], -q[0], q[0]), params[1][:, None]], 1)[chosen].ravel()
            rest = np.concatenate([rest_of(params[0], d[0], q[0]), 0 * params[1][:, None]], 1)[chosen].ravel()
            g = full[chosen].ravel()
            gamma = 1 / (length - part)
            if clipped @ g < 0:
                gamma = min(1.0, 0.001 * RATE * (g @ g) / -(clipped @ g))
            least, most = q[0] / (2.0 ** (upper - 1) - 1), q[0] / (2.0 ** (low - 1) - 1)
            d[0] = most
            if rest @ g < 0:
                d[0] = 0.9 * 0.999 * RATE * (g @ g) / (-gamma * (rest @ g))
                while d[0] < least:
                    gamma, d[0] = 0.8 * gamma, d[0] / 0.8
                d[0] = min(d[0], most)
        for unit in gone:
            grads[0][unit], grads[1][unit] = 0.0, 0.0
        for value, grad in zip(params, grads, strict=True):
            value -= RATE * grad
        for unit in chosen if prune <= step < settle else []:
            params[0][unit] -= gamma * view[0][unit]
            params[1][unit] -= gamma * view[1][unit]
        if prune <= step < settle and part == length - 1:
            gone |= fading
        scale(params, gone, 0.0)
        if step + 1 >= settle and widths is None:
            widths = [min(high, max(low, int(np.floor(np.log2(q[i] / d[i] + 1) + 1.5)))) for i in (0, 1)]
            d = [q[i] / (2.0 ** (widths[i] - 1) - 1) for i in (0, 1)]
    for i in (0, 1):
        params[2 * i] = shown(params[2 * i], d[i], q[i])
    return params, gone, widths


@pytest.mark.parametrize(
    ("ratio", "goal", "periods", "low", "high", "seed"),
    [(0.6, 4, 2, 3, 6, 0), (0.3, 2, 1, 2, 5, 1), (0.75, 5, 4, 4, 5, 2), (0.0, 0, 4, 3, 6, 3)],
)
def test_training_is_the_equations(ratio, goal, periods, low, high, seed, monkeypatch) -> None:
    monkeypatch.setattr("netwright.compress._geta_hook.WIDE", WIDE)
    task = regression(network(seed))
    method = GETA(ratio, periods=periods, least_bits=low, most_bits=high)
    model, hook = trained(method, task, 40)
    params, gone, widths = naive(task, 40, goal, periods, low, high)
    assert hook.units() == ({"0": sorted(gone)} if gone else {})
    assert [hook.widths[name] for name in NAMES] == widths
    for value, wanted in zip(model.parameters(), params, strict=True):
        torch.testing.assert_close(value.detach(), torch.from_numpy(wanted), rtol=1e-7, atol=1e-9)


class Watched:
    """Passes a hook's calls on and looks at the grids after each."""

    def __init__(self, hook: JointTraining, model: nn.Module, bits: tuple[int, int], stages: list[int]) -> None:
        self.hook, self.bits, self.stages, self.seen = hook, bits, stages, []
        self.weights = {name: model.get_parameter(name) for name in hook.grids}

    def before_step(self, step, total):
        self.hook.before_step(step, total)

    def after_step(self, step, total):
        self.hook.after_step(step, total)
        low, high = self.bits
        upper = 16 if step < self.stages[0] else high if step >= self.stages[1] else self.hook.bounds(step)[1]
        for name, grid in self.hook.grids.items():
            assert low - 1e-9 <= width_of(grid.step, grid.reach) <= upper + 1e-9
            steps = self.weights[name].detach().double() / grid.step
            assert (steps - steps.round()).abs().max() < 1e-2
            assert steps.abs().max() <= 2.0 ** (upper - 1) - 0.5
            if step >= self.stages[2]:
                assert width_of(grid.step, grid.reach) == pytest.approx(self.hook.widths[name], abs=1e-9)
        self.seen.append(upper)


@pytest.mark.parametrize(("low", "high"), [(2, 4), (4, 8), (5, 5)])
@pytest.mark.parametrize("position", [0, 1])
def test_bit_constraints_hold_at_every_step(low, high, position) -> None:
    task = small_tasks()[position]
    model = copy.deepcopy(task.model)
    method = GETA(0.5, least_bits=low, most_bits=high)
    names = [name for name, value in model.named_parameters() if value.ndim > 1]
    recipe = task.recipe.replace(epochs=10)
    hook = method.hook(model, names, method._plan(model, task), recipe, 40)
    watched = Watched(hook, model, (low, high), [4, 12, 28])
    fit(model, task, recipe, validate=False, hook=watched)
    assert len(watched.seen) == 40
    assert (watched.seen[0], watched.seen[-1]) == (16, high)


@given(st.integers(0, 10_000), st.integers(1, 20))
def test_forgetting_descends(seed, left) -> None:
    """The step of gradient and forgetting together lowers the loss to first order, whatever the angles."""
    generator = torch.Generator().manual_seed(seed)
    c, g = (torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(2))
    r = torch.rand(9, generator=generator, dtype=torch.float64) - 0.5
    rate, bounds = 0.05, (0.01, 0.4)
    gamma, step = forget_rate(c, g, rate, left), 0.0
    step, gamma = forget_step(r, g, rate, gamma, bounds)
    assert bounds[0] <= step <= bounds[1]
    slope = float(g @ (-rate * g - gamma * (c + step * r)))
    assert slope <= -0.09 * rate * float(g @ g)


@given(st.integers(0, 10_000), st.floats(2, 8))
def test_slopes_are_those_of_autograd(seed, width) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(30, generator=generator, dtype=torch.float64) for _ in range(2))
    reach = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    step = torch.tensor(step_of(width, 1.0), dtype=torch.float64, requires_grad=True)
    scaled = torch.minimum(x.abs(), reach) / step
    rounded = x.sign() * step * (scaled + (scaled.round() - scaled).detach())
    (g * rounded).sum().backward()
    assert torch.allclose(rounded.detach(), on_grid(x, step.item(), 1.0))
    assert grid_slopes(x, g, step.item(), 1.0) == pytest.approx((step.grad.item(), reach.grad.item()), abs=1e-9)
    assert LearnedGrid.of(x, width).width == pytest.approx(width)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_file_holds_integers_of_the_learned_widths(position, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("netwright.core.onnx_export._NARROW", 0)  # a byte each, to read them here
    task = small_tasks()[position]
    small = GETA(0.4, least_bits=3, most_bits=5)(task.model, task, budget=3)
    widths = GETA.widths(small)
    export_onnx(small, task.example(), tmp_path / "model.onnx")
    stored = [onnx.numpy_helper.to_array(item) for item in onnx.load(tmp_path / "model.onnx").graph.initializer]
    stored = [value for value in stored if value.dtype == np.int8 and value.ndim > 1]
    assert len(stored) == len(widths) >= 3
    assert all(3 <= width <= 5 for width in widths.values())
    shapes = {tuple(sorted(small.get_parameter(name).shape)): [] for name in widths}
    for name, width in widths.items():
        shapes[tuple(sorted(small.get_parameter(name).shape))].append(width)
    for value in stored:
        assert np.abs(value.astype(int)).max() <= 2 ** (max(shapes[tuple(sorted(value.shape))]) - 1) - 1


def test_without_training_it_cuts_and_rounds() -> None:
    task = small_tasks()[1]
    small = GETA(0.5, scope="layer", most_bits=8)(task.model, task, budget=0)
    assert set(GETA.widths(small).values()) == {8}
    assert small.get_parameter("0.weight").shape == (16, 20)
    whole = GETA(0.0)(task.model, task, budget=0)
    x = task.example(2)
    assert (whole(x) - task.model(x)).abs().max() < 0.05 * task.model(x).abs().max()


def test_conforms() -> None:
    check_transform(lambda: GETA(0.4), models=small_tasks()[1:2], onnx_tolerance=0.02)
    check_transform(lambda: GETA(0.3, most_bits=6), models=small_tasks()[:1], onnx_tolerance=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.0}, r"GETA.ratio must lie in \[0, 1\)"),
        ({"most_bits": 9}, "GETA needs least_bits <= most_bits <= 8, for integer kernels take bytes; got 4 and 9"),
        ({"least_bits": 1}, "GETA.least_bits must be an integer of at least 2"),
        ({"least_bits": 6, "most_bits": 5}, "GETA needs least_bits <= most_bits <= 8"),
        ({"periods": 0}, "GETA.periods must be a positive integer"),
        ({"prune": 0.8}, "GETA needs start < prune < stop, got 0.1, 0.8 and 0.7"),
        ({"scope": "all"}, "GETA.scope must be 'global' or 'layer'"),
        ({"exclude": "fc"}, "GETA.exclude must be a sequence of names"),
        ({"exclude": None}, "GETA.exclude must be a sequence of names, got None"),
    ],
)
def test_refuses_settings(settings, message) -> None:
    with pytest.raises(TransformError, match=message):
        GETA(**settings)


def test_refuses_models_and_tasks() -> None:
    task = small_tasks()[1]
    with pytest.raises(TransformError, match="exclude names no group 'head'; there are 0, 2"):
        GETA(exclude=["head"])(task.model, task)
    with pytest.raises(TransformError, match="out of reach: with one unit left in each of the 2 groups at most"):
        GETA(0.99, scope="global")(task.model, task)
    with pytest.raises(NothingToPruneError, match=r"exclude=\['0', '2'\] leaves none"):
        GETA(exclude=["0", "2"])(task.model, task)
    with pytest.raises(TransformError, match="trains by its own fit="):
        GETA()(task.model, dataclasses.replace(task, fit=lambda model, **_: model))
    broken = copy.deepcopy(task.model)
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(TransformError, match="values that are not finite"):
        GETA()(broken, task)
