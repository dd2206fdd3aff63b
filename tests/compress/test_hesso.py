"""HESSO: training against a NumPy transcription of fading and of the corrective cycles, scores against plain loops."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from sparse_reference import HIDDEN, RATE, gradients, network, numbers, regression
from torch import nn

from netwright.compress._unit_plan import plan
from netwright.compress._unit_saliency import unit_saliency
from netwright.compress._unit_vectors import UnitVectors
from netwright.compress.hesso import HESSO, Fading
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.fit import fit
from netwright.core.graph.agreement import outputs
from netwright.core.task import Task
from netwright.testing import check_transform, small_tasks

START, STOP = 0.2, 0.8


def trained(method: HESSO, task: Task, steps: int) -> tuple[nn.Module, Fading]:
    model = copy.deepcopy(task.model)
    hook = Fading(method, model, plan(method, model, task), steps)
    fit(model, task, task.recipe.replace(epochs=steps), validate=False, hook=hook)
    hook.finish()
    return model, hook


def vectors(params: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([params[0], params[1][:, None]], 1)


def scale(params: list[np.ndarray], units: list[int] | set[int], factor: float) -> None:
    for unit in units:
        params[0][unit] *= factor
        params[1][unit] *= factor


def score(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Five criteria, one unit at a time; each over its mean."""
    table = []
    for unit in range(len(x)):
        slope = sum(a * b for a, b in zip(x[unit], g[unit], strict=True))
        length, steep = np.sqrt((x[unit] ** 2).sum()), np.sqrt((g[unit] ** 2).sum())
        cosine = slope / (length * steep) if length * steep > 0 else 0.0
        table.append([length, length / np.sqrt(x.shape[1]), 1 - cosine, abs(slope), slope**2 / 2])
    rows = np.array(table)
    return (rows / rows.mean(0)).mean(1)


def lowest(scores: np.ndarray, count: int) -> set[int]:
    return set(sorted((u for u in range(HIDDEN) if u != scores.argmax()), key=lambda u: scores[u])[:count])


def descend(params: list[np.ndarray], task: Task, gone: set[int]) -> None:
    for value, grad in zip(params, gradients(params, task), strict=True):
        value -= RATE * grad
    scale(params, gone, 0.0)


def naive(task: Task, steps: int, goal: int, periods: int, window: int) -> tuple[list[np.ndarray], set[int]]:
    params, gone, fading = numbers(task.model), set(), set()
    begin, end = int(START * steps), int(STOP * steps)
    length = (end - begin) // periods
    log = []
    for step in range(steps):
        inside = begin <= step < end
        period, t = divmod(step - begin, length)
        log.append(score(vectors(params), vectors(gradients(params, task))))
        if inside and t == 0:
            since = step - length + 1 if period else 0
            scores = np.mean(log[max(since, step - window + 1) :], axis=0)
            scores[list(gone)] = -np.inf
            fading = lowest(scores, round(goal * (period + 1) / periods)) - gone
        descend(params, task, gone)
        if inside:
            scale(params, fading, (length - t - 1) / (length - t))
            gone |= fading if t == length - 1 else set()
    return params, gone


def naive_corrective(task: Task, steps: int, goal: int, cycles: int):
    """Cycles in the first half of the time of pruning, one fade in the rest; also which units faded in which cycle."""
    params = numbers(task.model)
    begin, end = int(START * steps), int(STOP * steps)
    length = (end - begin) // (2 * cycles)
    for _ in range(begin):
        descend(params, task, set())
    kept, log, sums, step = copy.deepcopy(params), [], [], begin
    active: set[int] = set()
    coming: set[int] = set()
    for cycle in range(cycles):
        for t in range(length):
            scores = score(vectors(params), vectors(gradients(params, task)))
            sums.append(scores)
            if cycle == t == 0:
                active = lowest(scores, goal)
                log.append(active)
            coming |= lowest(scores, goal) - set().union(*log)
            descend(params, task, set())
            scale(params, active, (length - t - 1) / (length - t))
            step += 1
        params = copy.deepcopy(kept)
        if not coming:
            break
        active, coming = coming, set()
        log.append(active)
    gone = lowest(np.mean(sums, axis=0), goal)
    while step < steps:
        descend(params, task, gone if step >= end else set())
        if step < end:
            scale(params, gone, (end - step - 1) / (end - step))
        step += 1
    return params, gone, log


@pytest.mark.parametrize(("periods", "window"), [(1, 1), (2, 1), (3, 1), (3, 4), (2, 5), (3, 100)])
def test_training_is_the_equations(periods, window) -> None:
    task = regression()
    model, hook = trained(HESSO(0.6, periods=periods, window=window, start=START, stop=STOP), task, 30)
    params, gone = naive(task, 30, 4, periods, window)
    assert hook.units() == {"0": sorted(gone)}
    for value, wanted in zip(model.parameters(), params, strict=True):
        torch.testing.assert_close(value.detach(), torch.from_numpy(wanted), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("cycles", "seed"), [(1, 0), (2, 0), (3, 1), (4, 2)])
def test_corrective_training_is_the_equations(cycles, seed) -> None:
    task = regression(network(seed))
    model, hook = trained(HESSO(0.6, corrective=True, cycles=cycles, start=START, stop=STOP), task, 40)
    params, gone, _ = naive_corrective(task, 40, 4, cycles)
    assert hook.units() == {"0": sorted(gone)}
    for value, wanted in zip(model.parameters(), params, strict=True):
        torch.testing.assert_close(value.detach(), torch.from_numpy(wanted), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("window", "scored"), [(1, [6, 15]), (3, [4, 5, 6, 13, 14, 15]), (100, list(range(16)))])
def test_the_steps_of_a_window_are_scored(window, scored, monkeypatch) -> None:
    now, steps, before, scores = [0], [], Fading.before_step, Fading.scores

    def counted(self, step, total):
        now[0] = step
        before(self, step, total)

    def noted(self):
        steps.append(now[0])
        return scores(self)

    monkeypatch.setattr(Fading, "before_step", counted)
    monkeypatch.setattr(Fading, "scores", noted)
    trained(HESSO(0.6, periods=2, window=window, start=START, stop=STOP), regression(), 30)
    assert steps == scored


def test_a_window_changes_who_goes() -> None:
    found = [[naive(regression(network(seed)), 30, 4, 3, window)[1] for window in (1, 100)] for seed in range(8)]
    assert any(one != many for one, many in found)


def test_the_cases_above_have_later_cycles() -> None:
    found = [naive_corrective(regression(network(seed)), 40, 4, 3)[2] for seed in range(3)]
    assert any(len(log) > 1 for log in found)


def test_scores_over_several_groups_share_their_means() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (4, 3), "b": (2, 7)}
    x, g = ({n: torch.randn(s, generator=generator).double() for n, s in shapes.items()} for _ in range(2))
    found = unit_saliency(x, g)
    rows = []
    for name, (count, width) in shapes.items():
        for unit in range(count):
            slope = float(x[name][unit] @ g[name][unit])
            length, steep = float(x[name][unit].norm()), float(g[name][unit].norm())
            rows.append([length, length / width**0.5, 1 - slope / length / steep, abs(slope), slope**2 / 2])
    table = np.array(rows)
    wanted = (table / table.mean(0)).mean(1)
    assert np.allclose(torch.cat([found["a"], found["b"]]).numpy(), wanted, rtol=1e-12)


def test_descent_towards_zero_is_redundant() -> None:
    x = {"a": torch.tensor([[1.0, 0.0], [1.0, 0.0]])}
    low, high = unit_saliency(x, {"a": torch.tensor([[2.0, 0.0], [-2.0, 0.0]])})["a"]
    assert low < high


@pytest.mark.parametrize("corrective", [False, True])
@pytest.mark.parametrize(("ratio", "budget"), [(0.7, 2), (0.5, 0.25)])
def test_ratio_is_met_exactly(corrective, ratio, budget) -> None:
    """Whatever the length of training; and nothing changes when the zeros are cut out."""
    for task in small_tasks():
        method = HESSO(ratio, scope="global", corrective=corrective)
        found = plan(method, task.model, task)
        total = sum(group.size for group in found.groups)
        small = dict(method(task.model, task, budget=budget).named_parameters())
        firsts = [group.places[0] for group in found.groups]
        left = sum(small[place.parameter].shape[place.dim] // place.index.shape[1] for place in firsts)
        assert total - left == int(ratio * total + 1e-9)


def test_what_has_faded_is_zero_and_cut_without_a_change() -> None:
    for task in small_tasks():
        model, hook = trained(HESSO(0.5), task, 3)
        vectors = UnitVectors(model, plan(HESSO(0.5), task.model, task).places).read()
        for name, x in vectors.items():
            assert torch.equal((x == 0).all(1), hook.gone[name])
        small = plan(HESSO(0.5), task.model, task).graph.shrink(model, hook.units())
        for a, b in zip(outputs(model, task.example()), outputs(small, task.example()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_layer_scope_takes_the_share_of_each_group() -> None:
    task = small_tasks()[1]
    small = HESSO(0.5, scope="layer", corrective=True)(task.model, task, budget=2)
    assert [layer.out_features for layer in small if isinstance(layer, nn.Linear)] == [16, 12, 3]


def test_conforms() -> None:
    check_transform(lambda: HESSO(0.5), models=small_tasks()[1:2])
    check_transform(lambda: HESSO(0.4, corrective=True), models=small_tasks()[:1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.0}, r"ratio must lie in \(0, 1\), got 0.0"),
        ({"scope": "all"}, "scope must be 'global' or 'layer'"),
        ({"periods": 0}, "periods must be a positive integer"),
        ({"window": 0}, "window must be a positive integer"),
        ({"cycles": 1.5}, "cycles must be a positive integer"),
        ({"corrective": 1}, "corrective must be true or false"),
        ({"start": 0.7}, "stop must be above start=0.7, got 0.3"),
        ({"exclude": "fc"}, "exclude must be a sequence of names"),
    ],
)
def test_refuses_settings(settings, message) -> None:
    with pytest.raises(TransformError, match=f"HESSO.{message}"):
        HESSO(**settings)


def test_refuses_models_and_tasks() -> None:
    task = regression()
    with pytest.raises(TransformError, match=r"would remove no unit; the smallest ratio that removes one is 0\.1429"):
        HESSO(0.1)(task.model, task)
    with pytest.raises(TransformError, match="exclude names no group 'head'; there are 0"):
        HESSO(exclude=["head"])(task.model, task)
    with pytest.raises(NothingToPruneError, match="Nothing in this model can be proved safe to remove"):
        HESSO()(nn.Linear(5, 3).double(), task)
    with pytest.raises(TransformError, match="trains by its own fit="):
        HESSO()(task.model, dataclasses.replace(task, fit=lambda model, **_: model))
    broken = network()
    broken[0].weight.data[0, 0] = float("nan")
    with pytest.raises(TransformError, match="values that are not finite"):
        HESSO()(broken, task)
