"""OptEx: kernel regression against scikit-learn and dense algebra, whole steps against NumPy, switched off."""

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
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern
from torch import nn

from netwright.core.errors import ClosureError, GradientError, SettingError, StateDictError
from netwright.core.fit import fit
from netwright.core.recipe import Recipe
from netwright.core.task import load_task
from netwright.optim._gradient_history import GradientHistory, matern, regression_weights
from netwright.optim._points import flatten, split
from netwright.optim.optex import OptEx, Replicas, _best
from netwright.testing import check_optimizer

SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.8)
ADAM = functools.partial(torch.optim.Adam, lr=0.05)
CURVATURE = torch.tensor([1.0, 3.0, 0.3, 8.0, 0.7], dtype=torch.float64)
START = torch.tensor([2.0, -1.0, 4.0, 0.5, -3.0], dtype=torch.float64)


def value_of(x):
    """A loss that is not quadratic."""
    return (CURVATURE * x * x).sum() / 2 + (2 * x).cos().sum()


def problem(make, **given):
    x = START.clone().requires_grad_()
    optimizer = OptEx(make([x]), **given)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = value_of(x)
        loss.backward()
        calls.append(x.detach().clone())
        return loss

    return x, optimizer, closure, calls


def cloud(count, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("length_scale", [0.3, 2.0])
def test_kernel_is_that_of_scikit_learn(length_scale):
    left, right = cloud(6, 3), cloud(4, 3, 1)
    ours = matern(torch.cdist(left, right) ** 2, length_scale)
    np.testing.assert_allclose(ours, Matern(length_scale, nu=2.5)(left.numpy(), right.numpy()), rtol=1e-10)


@pytest.mark.parametrize("noise", [1e-6, 0.1])
def test_predictions_are_those_of_scikit_learn(noise):
    points, grads, where = cloud(12, 3), cloud(12, 3, 1), cloud(5, 3, 2)
    history = GradientHistory(20)
    for point, grad in zip(points, grads, strict=True):
        history.add(point, grad)
    predict = history.predictor(4, 1.3, noise)
    peer = GaussianProcessRegressor(Matern(1.3, nu=2.5), alpha=noise, optimizer=None).fit(points.numpy(), grads.numpy())
    ours = torch.stack([predict(entry) for entry in where])
    np.testing.assert_allclose(ours, peer.predict(where.numpy()), rtol=1e-7, atol=1e-9)


def test_old_points_give_way_and_tables_stay_true():
    points, grads = cloud(17, 4), cloud(17, 4, 1)
    history = GradientHistory(6)
    for point, grad in zip(points, grads, strict=True):
        history.add(point, grad)
    assert len(history) == 6
    kept_x, kept_g = points[-6:].numpy(), grads[-6:].numpy()
    kernel = Matern(0.9, nu=2.5)
    where = cloud(1, 4, 3)
    dense = kernel(where.numpy(), kept_x) @ np.linalg.inv(kernel(kept_x, kept_x) + 1e-3 * np.eye(6)) @ kept_g
    np.testing.assert_allclose(history.predictor(2, 0.9, 1e-3)(where[0]), dense[0], rtol=1e-8)


def test_without_noise_it_interpolates():
    points, grads = cloud(8, 3), cloud(8, 3, 1)
    history = GradientHistory(8)
    for point, grad in zip(points, grads, strict=True):
        history.add(point, grad)
    predict = history.predictor(2, 1.0, 0.0)
    for point, grad in zip(points, grads, strict=True):
        torch.testing.assert_close(predict(point), grad, rtol=1e-8, atol=1e-8)


def test_points_that_coincide_do_not_break_it():
    history = GradientHistory(5)
    for _ in range(3):
        history.add(torch.ones(2), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(history.predictor(2, None, None)(torch.zeros(2)), torch.tensor([1.0, 2.0]))
    history.add(torch.zeros(2), torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(history.predictor(2, 1.0, 0.0)(torch.ones(2)), torch.tensor([1.0, 2.0]))
    assert bool(history.predictor(2, None, None)(torch.ones(2)).isfinite().all())


def test_what_is_not_finite_is_not_remembered():
    history = GradientHistory(5)
    history.add(torch.ones(2), torch.tensor([math.nan, 1.0]))
    history.add(torch.tensor([math.inf, 0.0]), torch.ones(2))
    assert len(history) == 0


def test_settings_are_chosen_by_predicting_forward():
    """The choice has the least error among all pairs, computed densely."""
    points = torch.linspace(0, 4, 12, dtype=torch.float64)[:, None].repeat(1, 2)
    grads = torch.stack([points[:, 0].sin(), points[:, 1] ** 2], 1)
    history = GradientHistory(12)
    for point, grad in zip(points, grads, strict=True):
        history.add(point, grad)
    chosen = history.predictor(3, None, None)
    x, g = points.numpy(), grads.numpy()
    unit = np.median([np.linalg.norm(a - b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    errors = {}
    for scale in (0.25, 1, 4, 16, 64, 256):
        for noise in (1e-6, 1e-3, 1e-1):
            kernel = Matern(scale * unit, nu=2.5)
            weights = kernel(x[9:], x[:9]) @ np.linalg.inv(kernel(x[:9], x[:9]) + noise * np.eye(9))
            errors[scale * unit, noise] = ((weights @ g[:9] - g[9:]) ** 2).sum()
    best = min(errors, key=errors.get)
    assert chosen.length_scale == pytest.approx(best[0], rel=0.1)  # torch's median is the lower of the middle two
    assert chosen.noise == best[1]


def test_errors_of_prediction_fall_with_history_on_a_quadratic():
    matrix = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    points, where = cloud(81, 3), 0.5 * cloud(20, 3, 1)
    errors = []
    for count in (3, 9, 27, 81):
        history = GradientHistory(81)
        for point in points[:count]:
            history.add(point, matrix @ point)
        predict = history.predictor(1, None, None)
        gaps = [(predict(entry) - matrix @ entry).norm() / (matrix @ entry).norm() for entry in where]
        errors.append(float(torch.stack(gaps).median()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 8 * errors[3]


@pytest.mark.parametrize("make", [SGD, ADAM, functools.partial(torch.optim.AdamW, lr=0.1, amsgrad=True)])
def test_parallelism_of_one_is_the_inner_optimizer_to_the_last_digit(make):
    x, optimizer, closure, _ = problem(make, parallelism=1)
    plain = START.clone().requires_grad_()
    alone = make([plain])
    schedules = [torch.optim.lr_scheduler.ExponentialLR(entry, 0.9) for entry in (optimizer, alone)]
    for _ in range(15):
        optimizer.step(closure)
        alone.zero_grad()
        value_of(plain).backward()
        alone.step()
        for schedule in schedules:
            schedule.step()
    assert torch.equal(x, plain)
    assert optimizer.own_state()["count"] == 0


def slope(x):
    return CURVATURE.numpy() * x - 2 * np.sin(2 * x)


def height(x):
    return (CURVATURE.numpy() * x * x).sum() / 2 + np.cos(2 * x).sum()


def naive(steps, select, *, ahead, capacity, length_scale, noise, lr=0.05, inertia=0.8):
    """OptEx over SGD with momentum, written with plain lists in NumPy."""
    x, buffer, past = START.numpy().copy(), None, []
    kernel = Matern(length_scale, nu=2.5)

    def inner(x, buffer, g):
        buffer = g if buffer is None else inertia * buffer + g
        return x - lr * buffer, buffer

    for _ in range(steps):
        trail = [(x, buffer)]
        if past:
            old_x, old_g = np.array([p for p, _ in past]), np.array([g for _, g in past])
            solved = np.linalg.solve(kernel(old_x, old_x) + noise * np.eye(len(past)), old_g)
            for _ in range(ahead - 1):
                x, buffer = inner(x, buffer, (kernel(x[None], old_x) @ solved)[0])
                trail.append((x, buffer))
        grads = [slope(p) for p, _ in trail]
        measures = {
            "loss": [height(p) for p, _ in trail],
            "gradient": [np.linalg.norm(g) for g in grads],
            "last": [-i for i in range(len(trail))],
        }
        place = int(np.argmin(measures[select]))
        past = (past + [(p, g) for (p, _), g in zip(trail, grads, strict=True)])[-capacity:]
        x, buffer = inner(*trail[place], grads[place])
    return x


@pytest.mark.parametrize("select", ["loss", "gradient", "last"])
@pytest.mark.parametrize(("ahead", "capacity"), [(4, 50), (3, 5)])
def test_steps_equal_a_transcription_in_numpy(select, ahead, capacity):
    given = {"history": capacity, "length_scale": 5.0, "noise": 1e-2}
    x, optimizer, closure, _ = problem(SGD, parallelism=ahead, select=select, **given)
    for _ in range(12):
        optimizer.step(closure)
    expected = naive(12, select, ahead=ahead, capacity=capacity, length_scale=5.0, noise=1e-2)
    np.testing.assert_allclose(x.detach(), expected, rtol=1e-7)


def test_it_reaches_further_in_as_many_sequential_steps():
    found = {}
    for parallelism in (1, 4):
        _, optimizer, closure, calls = problem(functools.partial(torch.optim.SGD, lr=0.02), parallelism=parallelism)
        losses = [float(optimizer.step(closure).detach()) for _ in range(30)]
        found[parallelism] = losses
        assert len(calls) == (30 if parallelism == 1 else 1 + 4 * 29)
    assert found[4][8] < found[1][20]


def test_the_best_point_is_among_the_finite_ones():
    assert _best([3.0, 1.0, 2.0], [1.0, 2.0, 0.5], "loss") == 1
    assert _best([3.0, 1.0, 2.0], [1.0, 2.0, 0.5], "gradient") == 2
    assert _best([3.0, 1.0, 2.0], [1.0, 2.0, 0.5], "last") == 2
    assert _best([3.0, math.nan, 2.0], [1.0, 2.0, 0.5], "loss") == 2
    assert _best([3.0, 1.0, 2.0], [1.0, 2.0, math.inf], "last") == 0
    assert _best([math.nan, math.inf], [1.0, 1.0], "loss") == 0


@pytest.mark.parametrize("select", ["loss", "last"])
def test_an_interrupted_step_leaves_everything_as_it_was(select):
    x, optimizer, closure, calls = problem(ADAM, select=select)
    for _ in range(3):
        optimizer.step(closure)
    before = x.detach().clone(), copy.deepcopy(optimizer.state_dict())

    def broken():
        if len(calls) == 12:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(broken)
    assert torch.equal(x, before[0])
    after = optimizer.state_dict()
    assert all(torch.equal(after["state"][0][name], kept) for name, kept in before[1]["state"][0].items())
    assert after["OptEx"]["count"] == before[1]["OptEx"]["count"]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()


@pytest.mark.parametrize("threads", [1, 3])
def test_replicas_find_the_gradients_that_the_closure_finds(threads):
    inputs, targets = cloud(20, 3), cloud(20, 2, 1)
    model, twin = network(), network()
    alone = OptEx(SGD(model.parameters()), parallelism=3)
    parallel = OptEx(SGD(twin.parameters()), parallelism=3, evaluate=Replicas(twin, threads=threads))

    def closure():
        alone.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss.detach()

    for _ in range(6):
        loss = parallel.step(lambda copied: (copied(inputs) - targets).square().mean())
        torch.testing.assert_close(alone.step(closure), loss)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert int(twin[1].num_batches_tracked) == 6  # the first copy's statistics come back: one update per step


def test_an_evaluation_of_ones_own_sees_all_points_at_once():
    seen = []

    def evaluate(parameters, points, closure):
        seen.append(len(points))
        assert closure is None
        return [(value_of(point[0]), [CURVATURE * point[0] - 2 * (2 * point[0]).sin()]) for point in points]

    x = START.clone().requires_grad_()
    optimizer = OptEx(SGD([x]), parallelism=3, evaluate=evaluate, length_scale=5.0, noise=1e-2)
    assert optimizer.closure_kind == "optional"
    for _ in range(4):
        optimizer.step()
    np.testing.assert_allclose(
        x.detach(), naive(4, "loss", ahead=3, capacity=50, length_scale=5.0, noise=1e-2), rtol=1e-9
    )
    assert seen == [1, 3, 3, 3]


@pytest.mark.parametrize("make", [SGD, ADAM])
@pytest.mark.parametrize("select", ["loss", "last"])
def test_resumes_to_the_last_bit_past_a_full_history(make, select):
    given = {"parallelism": 3, "history": 7, "select": select}
    x, optimizer, closure, _ = problem(make, **given)
    for _ in range(5):
        optimizer.step(closure)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    y, resumed, again, _ = problem(make, **given)
    with torch.no_grad():
        y.copy_(x)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(5):
        optimizer.step(closure)
        resumed.step(again)
    assert torch.equal(x, y)


def test_memory_is_that_of_the_history():
    _, optimizer, closure, _ = problem(SGD, parallelism=4, history=6, dimensions=2)
    for _ in range(5):
        optimizer.step(closure)
    own = optimizer.own_state()
    assert own["points"].shape == (6, 2)
    assert own["grads"].shape == (6, 5)
    assert own["squared"].shape == own["products"].shape == (6, 6)


def test_few_coordinates_measure_distance():
    """With all coordinates but one, equal in all points, the path is the same as with all."""
    paths = []
    for dimensions in (None, 5):
        x, optimizer, closure, _ = problem(SGD, dimensions=dimensions)
        for _ in range(5):
            optimizer.step(closure)
        paths.append(x.detach().clone())
    assert torch.equal(*paths)
    x, optimizer, closure, _ = problem(SGD, dimensions=2)
    for _ in range(5):
        optimizer.step(closure)
    assert bool(x.isfinite().all())
    assert not torch.equal(x, paths[0])


def test_other_trained_parameters_start_a_new_history():
    _, optimizer, closure, calls = problem(SGD, parallelism=3)
    for _ in range(3):
        optimizer.step(closure)
    late = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer.add_param_group({"params": [late]})
    before = len(calls)

    def both():
        closure()
        loss = late.square().sum()
        loss.backward()
        return loss.detach()

    optimizer.step(both)
    assert len(calls) == before + 1
    assert optimizer.own_state()["points"].shape == (1, 7)
    assert bool((late < 1).all())


def test_it_plugs_into_a_recipe():
    task = load_task("breast-cancer")
    settings = {"base": "torch.optim:SGD", "base_settings": {"lr": 0.05}, "parallelism": 2, "history": 4}
    recipe = Recipe(
        optimizer="netwright.optim.optex:OptEx.over",
        optimizer_settings=settings,
        schedule="torch.optim.lr_scheduler:CosineAnnealingLR",
        schedule_settings={},
        epochs=2,
    )
    result = fit(task.build(seed=0), task, Recipe.from_json(recipe.to_json()))
    assert result.history[-1].val_score > 0.8
    assert result.history[-1].train_loss < result.history[0].train_loss


@pytest.mark.parametrize(
    "given",
    [
        {"base": "torch.optim:SGD", "base_settings": {"lr": 0.1, "momentum": 0.5}, "parallelism": 2},
        {"base_settings": {"lr": 0.1}, "parallelism": 3, "length_scale": 2.0, "noise": 1e-3, "select": "last"},
    ],
)
def test_conforms(given):
    # memory: what Python holds takes a thousand steps to settle, and each costs several evaluations; tested below
    make = functools.partial(OptEx.over, history=5, **given)
    check_optimizer(make, coupled=True, complex=True, sparse=False, skip=["memory"])


def test_nothing_grows_over_many_steps():
    """Neither tensors nor objects; bytes that Python holds take a thousand steps to settle, so they are not counted."""
    _, optimizer, closure, calls = problem(SGD, parallelism=2, history=5, length_scale=5.0, noise=1e-2)
    sizes = []
    for step in range(201):
        optimizer.step(closure)
        calls.clear()
        if step in (50, 200):
            gc.collect()
            objects = gc.get_objects()
            sizes.append((sum(item.numel() for item in objects if type(item) is torch.Tensor), len(objects)))
            del objects
    assert sizes[1][0] <= sizes[0][0]
    assert sizes[1][1] <= sizes[0][1] + 20


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=5),
    st.lists(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64]), min_size=5, max_size=5),
)
def test_points_survive_the_way_to_a_vector_and_back(shapes, dtypes):
    tensors = [torch.randn(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]
    back = split(flatten(tensors, torch.float64), tensors)
    for tensor, again in zip(tensors, back, strict=True):
        assert again.dtype == tensor.dtype
        assert torch.equal(tensor, again)


def test_regression_weights_are_dense_algebra():
    points, where = cloud(7, 2), cloud(3, 2, 1)
    ours = regression_weights(torch.cdist(points, points) ** 2, torch.cdist(where, points) ** 2, 1.1, 0.05)
    kernel = Matern(1.1, nu=2.5)
    dense = kernel(where.numpy(), points.numpy()) @ np.linalg.inv(kernel(points.numpy()) + 0.05 * np.eye(7))
    np.testing.assert_allclose(ours, dense, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parallelism": 0}, "parallelism must be an integer of at least 1, got 0"),
        ({"parallelism": 2.0}, "parallelism must be an integer"),
        ({"history": 0}, "history must be an integer of at least 1"),
        ({"dimensions": 0}, "dimensions must be an integer of at least 1"),
        ({"select": "best"}, "select must be 'loss', 'gradient' or 'last', got 'best'"),
        ({"length_scale": 0.0}, "length_scale must be a number greater than 0"),
        ({"length_scale": math.nan}, "length_scale must be"),
        ({"noise": -1.0}, "noise must be a number at least 0"),
        ({"evaluate": 3}, r"evaluate must be a function or Replicas\(model\)"),
    ],
)
def test_bad_settings_are_refused(given, message):
    with pytest.raises(SettingError, match=message):
        problem(SGD, **given)


def test_bad_use_is_refused():
    x, optimizer, _, _ = problem(SGD)
    with pytest.raises(ClosureError, match=r"OptEx\.step needs a closure"):
        optimizer.step()
    with pytest.raises(ClosureError, match="must return a scalar loss"):
        optimizer.step(lambda: torch.ones(2))
    assert torch.equal(x, START)
    with pytest.raises(SettingError, match="LBFGS evaluates a closure in its step"):
        OptEx(torch.optim.LBFGS([x]))
    with pytest.raises(SettingError, match="couples all parameters and needs them on one device"):
        OptEx(SGD([torch.zeros(1, requires_grad=True), torch.zeros(1, device="meta", requires_grad=True)]))
    table = torch.zeros(4, 2, requires_grad=True)
    sparse = OptEx(torch.optim.SGD([table], lr=0.1))

    def looked_up():
        loss = nn.functional.embedding(torch.tensor([1]), table, sparse=True).sum()
        loss.backward()
        return loss

    with pytest.raises(GradientError, match="sparse"):
        sparse.step(looked_up)


def test_bad_replicas_are_refused():
    model = network()
    with pytest.raises(SettingError, match=r"model must be an nn.Module, got int"):
        Replicas(3)
    with pytest.raises(SettingError, match="threads must be a positive integer, got 0"):
        Replicas(model, threads=0)
    optimizer = OptEx(SGD(model.parameters()), evaluate=Replicas(network()))
    with pytest.raises(SettingError, match="parameters that are not the model's"):
        optimizer.step(lambda copied: copied(cloud(4, 3)).mean())
    with pytest.raises(SettingError, match="a closure that takes a model"):
        OptEx(SGD(model.parameters()), evaluate=Replicas(model)).step()


@pytest.mark.parametrize("threads", [1, 2])
def test_replicas_follow_the_model_in_what_the_optimizer_does_not_move(threads):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.0), nn.Linear(4, 1)).double()
    head, inputs = list(model[3].parameters()), cloud(6, 3)
    replicas = Replicas(model, threads)

    def evaluated():
        points = [[param.detach() + shift for param in head] for shift in (0.0, 1.0)]
        return replicas(head, points, lambda copied: copied(inputs).square().mean())

    evaluated()
    model[1].eval()
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[0].bias.add_(1)
        model[1].running_mean.fill_(0.5)
    model[0].requires_grad_(False)
    first, second = evaluated()
    wanted = model(inputs).square().mean()
    torch.testing.assert_close(first[0], wanted.detach())
    for got, grad in zip(first[1], torch.autograd.grad(wanted, head), strict=True):
        torch.testing.assert_close(got, grad)
    assert second[0] != first[0]
    for copied in replicas._copies:
        assert [p.requires_grad for p in copied.parameters()] == [False, False, True, True, True, True]
        assert [part.training for part in copied.modules()] == [part.training for part in model.modules()]


def test_foreign_states_are_refused():
    _, optimizer, closure, _ = problem(SGD, history=8)
    optimizer.step(closure)
    saved = optimizer.state_dict()
    with pytest.raises(StateDictError, match="remembers 8 points, this OptEx 9"):
        problem(SGD, history=9)[1].load_state_dict(saved)
    with pytest.raises(StateDictError, match="5 coordinates, this OptEx takes 2"):
        problem(SGD, history=8, dimensions=2)[1].load_state_dict(saved)
    with pytest.raises(StateDictError, match="has no entry 'OptEx'"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
