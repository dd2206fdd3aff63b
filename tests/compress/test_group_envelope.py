"""The group envelope: its proximal step against a convex program, its training against steps written out in NumPy."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, minimize
from sparse_reference import RATE, gradients, network, numbers, regression
from torch import nn

from netwright.compress._group_envelope_prox import envelope, envelope_prox
from netwright.compress._trainable_gate_hook import gated_places
from netwright.compress._unit_plan import Goal, goal_of
from netwright.compress.group_envelope import GroupEnvelope, _Proximal
from netwright.core.data import call
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.graph import Group, trace
from netwright.testing import check_transform, small_tasks
from tests.graph.zoo import build


def solved_prox(x: np.ndarray, k: int, strength: float) -> np.ndarray:
    """``min 1/2 |v - x|^2 + strength/2 sum |v_g|^2 / u_g`` over vectors and shares together, by a general solver."""
    groups, width = x.shape

    def objective(z: np.ndarray) -> tuple[float, np.ndarray]:
        v, u = z[: x.size].reshape(x.shape), z[x.size :]
        squares = (v**2).sum(1)
        value = 0.5 * ((v - x) ** 2).sum() + 0.5 * strength * (squares / u).sum()
        return value, np.concatenate([(v - x + strength * v / u[:, None]).ravel(), -0.5 * strength * squares / u**2])

    row = np.concatenate([np.zeros(x.size), np.ones(groups)])
    start = np.concatenate([0.5 * x.ravel(), np.full(groups, k / groups)])
    bounds = [(None, None)] * x.size + [(1e-7, 1.0)] * groups
    constraint = LinearConstraint(row, ub=k)
    options = {"ftol": 1e-14, "maxiter": 1000}
    found = minimize(
        objective, start, jac=True, bounds=bounds, constraints=[constraint], method="SLSQP", options=options
    )
    return found.x[: x.size].reshape(groups, width)


@pytest.mark.parametrize("seed", range(12))
def test_prox_is_the_solution_of_the_convex_program(seed) -> None:
    generator = np.random.default_rng(seed)
    groups, strength = int(generator.integers(2, 7)), float(10 ** generator.uniform(-1, 0.7))
    k = int(generator.integers(1, groups + 1))
    x = generator.normal(size=(groups, 3)) * generator.uniform(0.2, 3, size=(groups, 1))
    factors = envelope_prox(torch.tensor(np.linalg.norm(x, axis=1)), k, strength).numpy()
    np.testing.assert_allclose(factors[:, None] * x, solved_prox(x, k, strength), rtol=0, atol=2e-4)


@settings(max_examples=100)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20), st.floats(1e-3, 5), st.data())
def test_shares_meet_the_optimality_conditions(lengths, strength, data) -> None:
    """The shares add up to k; ``|x| / (u + strength)`` is one number where 0 < u < 1, more at 1, less at 0."""
    norms = torch.tensor(lengths, dtype=torch.float64)
    k = data.draw(st.integers(1, len(lengths)))
    factors = envelope_prox(norms, k, strength)
    shares = strength * factors / (1 - factors)
    assert float(shares.sum()) == pytest.approx(k, rel=1e-6)
    assert bool((shares <= 1 + 1e-9).all())
    slopes = norms / (shares + strength)
    inside = slopes[(shares > 1e-9) & (shares < 1 - 1e-9)]
    below, above = slopes[shares <= 1e-9], slopes[shares >= 1 - 1e-9]
    least = torch.cat([inside, above]).min()
    assert inside.numel() == 0 or float(inside.max() - inside.min()) < 1e-6 * float(inside.max())
    assert below.numel() == 0 or float(below.max()) <= float(least) * (1 + 1e-6)
    assert inside.numel() == 0 or above.numel() == 0 or float(above.min()) >= float(inside.max()) * (1 - 1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_envelope_is_the_biconjugate(seed) -> None:
    """``max_y <x, y> - 1/2 (sum of the k largest y_g^2)``: no vector gives more, and ``x / u`` gives as much."""
    generator = np.random.default_rng(seed)
    groups = int(generator.integers(2, 6))
    k = int(generator.integers(1, groups + 1))
    x = generator.uniform(0.1, 2, size=groups)

    def conjugate(y: np.ndarray) -> float:
        return 0.5 * float(np.sort(y**2)[-k:].sum())

    best = max(x @ y - conjugate(y) for y in generator.uniform(0, 3 * x.sum() / k, size=(20_000, groups)))
    value = float(envelope(torch.tensor(x), k))
    assert best <= value + 1e-9
    dual = x / naive_shares(x, k, 0.0)
    assert x @ dual - conjugate(dual) == pytest.approx(value, rel=1e-6)


def naive_shares(lengths: np.ndarray, k: int, strength: float) -> np.ndarray:
    """``min(1, max(0, eta |x| - strength))`` with sum k, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(middle * lengths - strength, 0, 1).sum() < k else (low, middle)
    return np.clip(high * lengths - strength, 0, 1)


def test_ends_of_the_range_are_known_penalties() -> None:
    norms = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(envelope(norms, 4), 0.5 * (norms**2).sum())
    torch.testing.assert_close(envelope(norms, 1), 0.5 * norms.sum() ** 2)
    torch.testing.assert_close(envelope_prox(norms, 4, 0.3), (norms > 0).double() / 1.3)
    # half the square of the sum: lengths less lambda times the sum of what remains
    left = norms * envelope_prox(norms, 1, 0.3)
    torch.testing.assert_close(left, (norms - 0.3 * left.sum()).clamp_min(0))


def test_training_is_gradient_steps_and_proximal_steps() -> None:
    task = regression()
    found = GroupEnvelope(3 / 7, strength=3.0, search=0.75)(task.model, task, budget=8)
    params = numbers(task.model)
    scale = np.linalg.norm(params[2], axis=0).mean()
    for step in range(8):
        if step == 6:
            kept = np.sort(np.argsort(-np.linalg.norm(params[2], axis=0))[:4])
            params = [params[0][kept], params[1][kept], params[2][:, kept], params[3]]
        params = [value - RATE * slope for value, slope in zip(params, gradients(params, task), strict=True)]
        if step < 6:
            shares = naive_shares(np.linalg.norm(params[2], axis=0) / scale, 4, 0.5)
            params[2] = params[2] * (shares / (shares + 0.5))
    for left, right in zip(numbers(found), params, strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-9)


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_exactly_k_units_stay(ratio) -> None:
    for task in small_tasks():
        groups = [group for group in trace(task.model, task.example()).groups if group.exact]
        smaller = GroupEnvelope(ratio, scope="global")(task.model, task, budget=1)
        gone = sum(group.size - units_left(task.model, smaller, group) for group in groups)
        assert gone == math.floor(ratio * sum(group.size for group in groups) + 1e-9)
        smaller = GroupEnvelope(ratio)(task.model, task, budget=1)
        for group in groups:
            assert group.size - units_left(task.model, smaller, group) == math.floor(ratio * group.size + 1e-9)


def units_left(model: nn.Module, smaller: nn.Module, group: Group) -> int:
    place = group.places[0]
    before, after = (value.state_dict()[place.parameter].shape[place.dim] for value in (model, smaller))
    return group.size - (before - after) // place.index.shape[1]


def test_every_group_keeps_its_longest() -> None:
    norms = {"a": torch.tensor([0.1, 0.2, 0.3]), "b": torch.tensor([5.0, 4.0, 3.0])}
    gone = {count: Goal(None, count).lowest(norms) for count in (3, 1)}
    assert {name: mask.nonzero().flatten().tolist() for name, mask in gone[3].items()} == {"a": [0, 1], "b": [2]}
    assert {name: mask.nonzero().flatten().tolist() for name, mask in gone[1].items()} == {"a": [0], "b": []}


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_scopes_share_the_number_out(scope) -> None:
    """Weights as they are, four units of "0" and four of "2": which units go, and what a step multiplies them by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    inputs = torch.randn(5, 3)
    graph = trace(model, inputs)
    first, second = (list(graph.groups)[place].name for place in (0, 1))
    with torch.no_grad():  # lengths relative to the layer's mean, first layer 0.1 0.7 0.8 2.4, second 0.6 0.9 1.1 1.4
        model[2].weight.copy_(torch.diag(torch.tensor([0.1, 0.7, 0.8, 2.4])))
        model[4].weight.copy_(torch.tensor([[0.6, 0.9, 1.1, 1.4], [0.0, 0.0, 0.0, 0.0]]))
    places = gated_places(graph, model, list(graph.groups), inputs)
    method = GroupEnvelope(0.5, strength=2.0, scope=scope)
    hook = _Proximal(method, model, places, goal_of(method, list(graph.groups)))
    lengths = {first: np.array([0.1, 0.7, 0.8, 2.4]), second: np.array([0.6, 0.9, 1.1, 1.4])}
    if scope == "layer":
        assert hook.shortest() == {first: [0, 1], second: [0, 1]}
        shares = {name: naive_shares(values, 2, 0.5) for name, values in lengths.items()}
    else:
        assert hook.shortest() == {first: [0, 1, 2], second: [0]}
        both = naive_shares(np.concatenate(list(lengths.values())), 4, 0.5)
        shares = {first: both[:4], second: both[4:]}
    hook.after_step(0, 4)
    for name, norms in hook.norms().items():
        factors = shares[name] / (shares[name] + 0.5)
        np.testing.assert_allclose(norms, factors * lengths[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["vgg", "resnet", "mobilenet-v2", "transformer", "lstm"])
def test_units_at_zero_are_units_gone(name) -> None:
    model, inputs = build(name)
    graph = trace(model, inputs)
    groups = [group for group in graph.groups if group.exact]
    hook = _Proximal(GroupEnvelope(0.5), model, gated_places(graph, model, groups, inputs), Goal(None, 1))
    lengths = torch.cat(list(hook.norms().values()))
    hook._method = Kept(torch.arange(len(lengths)) % 2 == 1)
    hook.after_step(0, 1)
    norms = hook.norms()
    gone = {name: (values == 0).nonzero().flatten().tolist() for name, values in norms.items()}
    smaller = graph.shrink(model, {name: units for name, units in gone.items() if units})
    for left, right in zip(outputs(model, inputs), outputs(smaller, inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


class Kept:
    """In place of the method: which units a step leaves as they are; it zeroes the others."""

    def __init__(self, kept: torch.Tensor) -> None:
        self.kept = kept

    def factors(self, norms: torch.Tensor, k: int, share: float) -> torch.Tensor:
        return self.kept.double()


@torch.no_grad()
def outputs(model: nn.Module, inputs: object) -> list[torch.Tensor]:
    found = call(model, inputs)
    return list(found) if isinstance(found, tuple) else [found]


def test_conforms() -> None:
    check_transform(lambda: GroupEnvelope(0.4), models=small_tasks()[:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratio": 1.0}, r"ratio must lie in \(0, 1\), got 1.0. 0.5 removes half of the units"),
        ({"strength": 0.0}, "strength must be a finite number, greater than 0"),
        ({"search": 0.0}, r"search must lie in \(0, 1\)"),
        ({"scope": "all"}, "scope must be 'global' or 'layer'"),
        ({"inexact": 1}, "inexact must be true or false"),
        ({"exclude": "fc"}, "exclude must be a sequence of names"),
    ],
)
def test_refuses_settings(changes, message) -> None:
    with pytest.raises(TransformError, match=f"GroupEnvelope.{message}"):
        GroupEnvelope(**changes)


def test_refuses_models_and_tasks() -> None:
    task = regression()
    with pytest.raises(TransformError, match=r"ratio=0\.99 is out of reach: with one unit left in each of the 2"):
        GroupEnvelope(0.99, scope="global")(small_tasks()[1].model, small_tasks()[1])
    with pytest.raises(TransformError, match=r"ratio=0\.05 would remove no unit; the smallest .* is 0\.1429"):
        GroupEnvelope(0.05)(task.model, task)
    with pytest.raises(TransformError, match="exclude names no group 'head'; there are 0"):
        GroupEnvelope(exclude=["head"])(task.model, task)
    with pytest.raises(NothingToPruneError, match=r"exclude=\['0'\] and inexact=False leave none to prune"):
        GroupEnvelope(exclude=["0"])(task.model, task)
    with pytest.raises(NothingToPruneError, match="Nothing in this model can be proved safe to remove"):
        GroupEnvelope()(nn.Linear(5, 3).double(), task)
    with pytest.raises(TransformError, match="trains by its own fit="):
        GroupEnvelope()(task.model, dataclasses.replace(task, fit=lambda model, **_: model))
    broken = network()
    broken[0].weight.data[0, 0] = float("inf")
    with pytest.raises(TransformError, match="values that are not finite"):
        GroupEnvelope()(broken, task)
