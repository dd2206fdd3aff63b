"""OTO: training against a NumPy transcription of the half-space step, the cut against the network before it."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from sparse_reference import HIDDEN, RATE, gradients, network, numbers, regression
from torch import nn
from torch.nn import functional

from netwright.compress._unit_plan import goal_of, plan, step_sizes
from netwright.compress._unit_vectors import UnitVectors
from netwright.compress.oto import OTO, HalfSpace, _leaves, _shrunk
from netwright.core.data import Data
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.fit import fit
from netwright.core.graph import trace
from netwright.core.graph.agreement import outputs
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.testing import check_transform, small_tasks
from tests.graph.zoo import build


def trained(method: OTO, task: Task, steps: int) -> tuple[nn.Module, HalfSpace]:
    """The full network after training, not cut."""
    model = copy.deepcopy(task.model)
    found = plan(method, model, task)
    recipe = task.recipe.replace(epochs=steps)
    hook = HalfSpace(method, UnitVectors(model, found.places), found, recipe, steps)
    fit(model, task, recipe, validate=False, hook=hook)
    hook.finish()
    return model, hook


def vectors(params: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([params[0], params[1][:, None]], 1)


def put(params: list[np.ndarray], x: np.ndarray) -> None:
    params[0], params[1] = x[:, :-1].copy(), x[:, -1].copy()


def naive(task: Task, steps: int, begin: int, end: int, goal: int, strength: float, epsilon: float, prox: bool):
    """Plain descent on the regression's network with the projections of the docstring."""
    params, gone, projected = numbers(task.model), set(), 0
    for step in range(steps):
        grads = gradients(params, task)
        x = vectors(params)
        if step == begin:
            weight = strength * np.linalg.norm(x, axis=1).mean() / (RATE * (end - begin))
        for value, grad in zip(params, grads, strict=True):
            value -= RATE * grad
        trial = vectors(params)
        if begin <= step < end:
            for unit in range(HIDDEN):
                if prox:
                    trial[unit] *= max(0.0, 1 - RATE * weight / np.linalg.norm(trial[unit]))
                elif np.linalg.norm(x[unit]) > 0:
                    trial[unit] -= RATE * weight * x[unit] / np.linalg.norm(x[unit])
            if not prox:
                square = (x**2).sum(1)
                out = [u for u in range(HIDDEN) if u not in gone and trial[u] @ x[u] < epsilon * square[u]]
                out.sort(key=lambda u: trial[u] @ x[u] / square[u])
                gone |= set(out[: goal - len(gone)])
        trial[sorted(gone)] = 0
        if step == end - 1:
            projected = int((trial == 0).all(1).sum())
            rest = sorted((u for u in range(HIDDEN) if u not in gone), key=lambda u: np.linalg.norm(trial[u]))
            gone |= set(rest[: goal - len(gone)])
            trial[sorted(gone)] = 0
        put(params, trial)
    return params, gone, projected


@pytest.mark.parametrize(
    ("strength", "epsilon", "projection"),
    [(2.0, 0.9, "half-space"), (1.2, 0.5, "half-space"), (0.5, 0.0, "half-space"), (2.5, 0.0, "proximal")],
)
def test_training_is_the_equations(strength, epsilon, projection) -> None:
    task = regression()
    method = OTO(0.6, "global", strength=strength, epsilon=epsilon, projection=projection, start=0.2, stop=0.7)
    model, hook = trained(method, task, 20)
    params, gone, projected = naive(task, 20, 4, 14, 4, strength, epsilon, projection == "proximal")
    assert hook.units() == {"0": sorted(gone)}
    assert len(gone) == 4
    assert hook.projected == projected
    for value, wanted in zip(model.parameters(), params, strict=True):
        torch.testing.assert_close(value.detach(), torch.from_numpy(wanted), rtol=1e-9, atol=1e-12)


def test_the_cases_above_project_in_both_ways() -> None:
    """Some by projection and some as the shortest, else the comparison says little."""
    assert naive(regression(), 20, 4, 14, 4, 2.0, 0.9, False)[2] == 4
    assert 0 <= naive(regression(), 20, 4, 14, 4, 0.5, 0.0, False)[2] < 4
    assert naive(regression(), 20, 4, 14, 4, 2.5, 0.0, True)[2] > 0


def test_steps_are_those_of_closed_forms() -> None:
    """The proximal step minimizes its objective; a group leaves the half-space by its projection on where it was."""
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)
    step = _shrunk(x, 1.0)[:, None] * x
    for point, start in zip(step, x, strict=True):
        grid = torch.cartesian_prod(*[torch.linspace(-4, 4, 161, dtype=torch.float64)] * 2)
        best = grid[(0.5 * (grid - start).square().sum(1) + grid.norm(dim=1)).argmin()]
        assert (best - point).abs().max() <= 0.05
    trial = torch.tensor([[3.0, 3.0], [-0.3, -0.4]], dtype=torch.float64)
    assert _leaves(x, trial, 0.8).tolist() == [False, True]
    assert _leaves(x, trial, 0.9).tolist() == [True, True]


def test_without_penalty_it_is_training_and_a_cut_of_the_shortest() -> None:
    task = regression()
    model, hook = trained(OTO(0.5, "global", strength=0.0, epsilon=0.0, stop=0.99), task, 10)
    plain = copy.deepcopy(task.model)
    fit(plain, task, task.recipe.replace(epochs=9), validate=False)
    norms = torch.cat([plain[0].weight, plain[0].bias[:, None]], 1).norm(dim=1)
    assert hook.units()["0"] == sorted(norms.argsort()[:3].tolist())
    assert bool((model[0].weight[hook.units()["0"]] == 0).all())


def items(inputs) -> list:
    """A batch of the zoo as a dataset."""
    if isinstance(inputs, dict):
        return [({name: value[i] for name, value in inputs.items()}, torch.zeros(())) for i in range(2)]
    if isinstance(inputs, tuple):
        return [(tuple(value[i] for value in inputs), torch.zeros(())) for i in range(2)]
    return [(value, torch.zeros(())) for value in inputs]


@pytest.mark.parametrize(
    "name",
    ["resnet", "densenet", "mobilenet-v2", "siamese", "gated-mlp", "transformer", "pixel-shuffle"],
)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_zeroed_groups_are_cut_without_a_change(name, scope) -> None:
    """Only what produces a unit is zero, and the smaller network still equals the whole one."""
    model, inputs = build(name)
    task = Task(name, model, Data(*(items(inputs) for _ in range(3))), functional.mse_loss, lambda o, t: 0.0)
    method = OTO(0.4, scope=scope)
    found = plan(method, model, task)
    whole = copy.deepcopy(model)
    hook = HalfSpace(method, UnitVectors(whole, found.places), found, Recipe(), 0)
    hook.finish()
    small = found.graph.shrink(whole, hook.units())
    for a, b in zip(outputs(whole, inputs), outputs(small, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    gone = sum(map(len, hook.units().values()))
    sizes = [group.size for group in found.groups]
    assert gone == (sum(int(0.4 * size + 1e-9) for size in sizes) if scope == "layer" else int(0.4 * sum(sizes) + 1e-9))


def test_ratio_is_met_exactly_after_training() -> None:
    for task in small_tasks():
        found = plan(OTO(0.5), task.model, task)
        total = sum(group.size for group in found.groups)
        small = dict(OTO(0.5)(task.model, task, budget=2).named_parameters())
        firsts = [group.places[0] for group in found.groups]
        left = sum(small[place.parameter].shape[place.dim] // place.index.shape[1] for place in firsts)
        assert total - left == total // 2


def test_goal_takes_the_lowest_and_leaves_one() -> None:
    model, inputs = build("vgg")
    groups = trace(model, inputs).groups
    scores = {group.name: torch.rand(group.size, dtype=torch.float64) for group in groups}
    gone = goal_of(OTO(0.5, scope="global"), groups).lowest(scores)
    guarded = {(n, int(s.argmax())) for n, s in scores.items()}
    ranked = sorted((float(v), n, u) for n, s in scores.items() for u, v in enumerate(s) if (n, u) not in guarded)
    count = sum(group.size for group in groups) // 2
    assert {(n, u) for _, n, u in ranked[:count]} == {
        (n, u) for n in gone for u in gone[n].nonzero().flatten().tolist()
    }


def test_step_sizes_are_the_recipes() -> None:
    recipe = regression().recipe.replace(
        optimizer="torch.optim:AdamW",
        schedule="torch.optim.lr_scheduler:OneCycleLR",
        schedule_settings={"max_lr": 0.01},
    )
    seen: list[float] = []
    task = regression()
    fit(task.model, task, recipe.replace(epochs=12), validate=False, callbacks=[lambda record: seen.append(record.lr)])
    assert step_sizes(recipe, 12) == pytest.approx(seen)
    assert step_sizes(Recipe(optimizer_settings={}, schedule=None), 1) == [1e-3]


def test_conforms() -> None:
    check_transform(lambda: OTO(0.5), models=small_tasks()[:1])
    check_transform(lambda: OTO(0.4, scope="layer", projection="proximal"), models=small_tasks()[1:2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, r"ratio must lie in \(0, 1\), got 0.0. 0.5 removes half of the units"),
        ({"ratio": 1.0}, r"ratio must lie in \(0, 1\)"),
        ({"scope": "all"}, "scope must be 'global' or 'layer'"),
        ({"strength": -1.0}, "strength must be a finite number, at least 0"),
        ({"epsilon": 1.0}, r"epsilon must lie in \[0, 1\)"),
        ({"start": 0.7}, "stop must be above start=0.7, got 0.6"),
        ({"projection": "ball"}, "projection must be 'half-space' or 'proximal'"),
        ({"exclude": "fc"}, "exclude must be a sequence of names"),
    ],
)
def test_refuses_settings(settings, message) -> None:
    with pytest.raises(TransformError, match=f"OTO.{message}"):
        OTO(**settings)


def test_refuses_models_and_tasks() -> None:
    task = regression()
    before = copy.deepcopy(task.model.state_dict())
    deep = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 3)).double()
    with pytest.raises(
        TransformError, match=r"out of reach: with one unit left in each of the 2 groups at most 0\.5000"
    ):
        OTO(0.8, scope="global")(deep, task)
    with pytest.raises(TransformError, match=r"would remove no unit; the smallest ratio that removes one is 0\.1429"):
        OTO(0.1)(task.model, task)
    with pytest.raises(TransformError, match="exclude names no group 'head'; there are 0"):
        OTO(exclude=["head"])(task.model, task)
    with pytest.raises(NothingToPruneError, match=r"exclude=\['0'\] leaves none"):
        OTO(exclude=["0"])(task.model, task)
    with pytest.raises(NothingToPruneError, match="Nothing in this model can be proved safe to remove"):
        OTO()(nn.Linear(5, 3).double(), task)
    with pytest.raises(TransformError, match="trains by its own fit="):
        OTO()(task.model, dataclasses.replace(task, fit=lambda model, **_: model))
    broken = network()
    broken[0].weight.data[0, 0] = float("inf")
    with pytest.raises(TransformError, match="values that are not finite"):
        OTO()(broken, task)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
