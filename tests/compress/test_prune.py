"""Pruning: scores against naive transcriptions, choices against exhaustive ones, surgery against zeroing."""

import copy
import dataclasses
import functools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from netwright.compress import Prune
from netwright.compress._choose import Limits, choose_global, choose_layer, kept
from netwright.compress._savings import macs_per_unit
from netwright.compress.prune import saliency_magnitude, saliency_taylor
from netwright.core.data import Data
from netwright.core.errors import NetwrightError, NothingToPruneError, TransformError
from netwright.core.graph import export_model, trace
from netwright.core.graph.macs import total_macs
from netwright.core.recipe import resolve
from netwright.core.task import Task
from netwright.testing import check_transform, small_tasks

small = functools.cache(small_tasks)


def linear_task(model: nn.Module, width: int = 5, items: int = 24, outputs: int = 2) -> Task:
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype

    def split(count: int) -> TensorDataset:
        inputs = torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype)
        return TensorDataset(inputs, torch.randn(count, outputs, generator=generator, dtype=torch.float64).to(dtype))

    return Task(
        "linear",
        model,
        Data(split(items), split(8), split(8)),
        nn.functional.mse_loss,
        lambda o, t: -float((o - t).norm()),
    )


def mlp(dtype: torch.dtype = torch.float64, hidden: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 2)).to(dtype)


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("position", [0, 1, 2])
def test_magnitude_equals_a_naive_loop(position):
    task = small()[position]
    model = copy.deepcopy(task.model)
    for group in trace(model, task.example()).groups:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        wanted = []
        for unit in range(group.size):
            square = 0.0
            for place in group.places:
                if place.parameter in parameters:
                    for entry in place.index[unit]:
                        slice_ = parameters[place.parameter].detach().select(place.dim, int(entry))
                        square += sum(float(value) ** 2 for value in slice_.flatten())
            wanted.append(math.sqrt(square))
        got = saliency_magnitude(model, group)
        assert got.shape == (group.size,)
        torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_magnitude_counts_norm_weights_and_no_running_statistics():
    task = small()[0]
    model = copy.deepcopy(task.model)
    group = trace(model, task.example()).group("3.first")
    before = saliency_magnitude(model, group)
    model[3].first_norm.running_mean += 100.0
    torch.testing.assert_close(saliency_magnitude(model, group), before)
    with torch.no_grad():
        model[3].first_norm.weight[2] += 100.0
    assert saliency_magnitude(model, group).argmax() == 2


def naive_taylor(model: nn.Module, group, task: Task, batches: list[torch.Tensor]) -> torch.Tensor:
    """Unit by unit, batch by batch, entry by entry."""
    total = [0.0] * group.size
    for batch in batches:
        inputs, targets = task.data.train.tensors[0][batch], task.data.train.tensors[1][batch]
        model.zero_grad()
        task.loss(model(inputs), targets).backward()
        parameters = dict(model.named_parameters())
        for unit in range(group.size):
            slope = 0.0
            for place in group.places:
                weight = parameters[place.parameter]
                for entry in place.index[unit]:
                    parts = weight.detach().select(place.dim, int(entry)), weight.grad.select(place.dim, int(entry))
                    slope += sum(float(w * g) for w, g in zip(*(part.flatten() for part in parts), strict=True))
            total[unit] += abs(slope)
    return torch.tensor(total, dtype=torch.float64) / len(batches)


def shuffled(task: Task, count: int, size: int, seed: int) -> list[torch.Tensor]:
    order = torch.randperm(len(task.data.train), generator=torch.Generator().manual_seed(seed))
    return list(order.split(size)[:count])


def test_taylor_equals_a_naive_loop():
    model = mlp()
    task = linear_task(model)
    (group,) = trace(model, task.example()).groups
    got = saliency_taylor(model, [group], task, count=3, batch_size=6, seed=4)["0"]
    wanted = naive_taylor(copy.deepcopy(model), group, task, shuffled(task, 3, 6, 4))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert all(param.grad is None for param in model.parameters())


def test_taylor_looks_at_the_model_in_eval_mode():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2)).double()
    model[1].running_mean += 0.5
    task = linear_task(model)
    (group,) = trace(model, task.example()).groups
    got = saliency_taylor(model.train(), [group], task, count=2, batch_size=8, seed=1)[group.name]
    wanted = naive_taylor(copy.deepcopy(model).eval(), group_in_parameters(group), task, shuffled(task, 2, 8, 1))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    assert model.training
    assert float(model[1].running_mean[0]) == 0.5


def group_in_parameters(group):
    places = tuple(place for place in group.places if "running" not in place.parameter)
    return dataclasses.replace(group, places=places)


def test_taylor_is_the_slope_of_the_loss_as_a_unit_fades():
    model = mlp()
    task = linear_task(model)
    (group,) = trace(model, task.example()).groups
    got = saliency_taylor(model, [group], task, count=1, batch_size=24)["0"]
    inputs, targets = task.data.train.tensors

    def loss(unit: int, factor: float) -> float:
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            for place in group.places:
                weight = dict(scaled.named_parameters())[place.parameter]
                for entry in place.index[unit]:
                    weight.select(place.dim, int(entry)).mul_(factor)
        return float(task.loss(scaled(inputs), targets))

    step = 1e-5
    wanted = [abs(loss(unit, 1 + step) - loss(unit, 1 - step)) / (2 * step) for unit in range(group.size)]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_taylor_predicts_what_removal_costs_where_the_unit_is_small():
    model = mlp()
    with torch.no_grad():  # biases and inputs stay, outgoing weights are small: only these count, to first order
        model[2].weight.mul_(1e-4)
    task = linear_task(model)
    graph = trace(model, task.example())
    outgoing = dataclasses.replace(
        graph.groups[0], places=tuple(place for place in graph.groups[0].places if place.parameter == "2.weight")
    )
    got = saliency_taylor(model, [outgoing], task, count=1, batch_size=24)["0"]
    inputs, targets = task.data.train.tensors
    whole = task.loss(model(inputs), targets)
    wanted = [
        float((task.loss(graph.shrink(model, {"0": [unit]})(inputs), targets) - whole).abs()) for unit in range(6)
    ]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=2e-2, atol=1e-9)


def test_taylor_sums_within_a_batch_and_not_between_batches():
    # output = v * x with loss = output * target: the slope of the loss along v is mean(x * target).
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [1.0]]))
        model[1].weight.copy_(torch.tensor([[1.0, 3.0]]))
    ones = torch.ones(4, 1, dtype=torch.float64)
    data = Data(
        TensorDataset(ones, torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)),
        TensorDataset(ones, ones),
        TensorDataset(ones, ones),
    )
    task = Task("signs", model, data, lambda output, target: (output * target).mean(), lambda o, t: 0.0)
    (group,) = trace(model, ones).groups
    one_batch = saliency_taylor(model, [group], task, count=1, batch_size=4)["0"]
    torch.testing.assert_close(one_batch, torch.zeros(2, dtype=torch.float64))  # the items cancel
    single = saliency_taylor(model, [group], task, count=4, batch_size=1)["0"]
    torch.testing.assert_close(single, torch.tensor([2.0, 6.0], dtype=torch.float64))  # v*x*target, once for each layer


def test_taylor_ranks_by_the_loss_and_not_by_size():
    model = mlp(torch.float32)
    with torch.no_grad():
        model[0].weight[3].mul_(50.0)  # large, but nothing of it reaches the output
        model[2].weight[:, 3] = 0.0
    task = linear_task(model)
    assert Prune(1 / 6, saliency="taylor").plan(model, task) == {"0": [3]}
    assert 3 not in Prune(5 / 6, saliency="magnitude").plan(model, task)["0"]


def test_ranking_is_invariant_to_the_order_of_units_and_the_scale_of_the_loss():
    model = mlp(hidden=8)
    task = linear_task(model)
    order = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    permuted = copy.deepcopy(model)
    with torch.no_grad():
        permuted[0].weight.copy_(model[0].weight[order])
        permuted[0].bias.copy_(model[0].bias[order])
        permuted[2].weight.copy_(model[2].weight[:, order])
    for saliency in ("magnitude", "taylor"):
        prune = Prune(0.5, saliency=saliency)
        wanted = set(prune.plan(model, task)["0"])
        assert {int(order[unit]) for unit in prune.plan(permuted, task)["0"]} == wanted
        scaled = dataclasses.replace(task, loss=lambda o, t: 7.0 * nn.functional.mse_loss(o, t))
        assert set(prune.plan(model, scaled)["0"]) == wanted


# ---------------------------------------------------------------- choices

scores_of = st.lists(st.floats(0, 10, width=32), min_size=2, max_size=9).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


@given(st.integers(1, 40), st.integers(0, 60), st.integers(1, 9), st.integers(1, 9))
def test_kept_is_the_smallest_number_that_the_limits_allow(size, removed, least, multiple):
    got = kept(size, removed, Limits(least, multiple))
    allowed = [n for n in range(size + 1) if n >= max(size - removed, least) and n % multiple == 0]
    assert got == (allowed[0] if allowed else size)


@settings(deadline=None)
@given(scores_of, st.floats(0, 0.99))
def test_layer_removes_exactly_the_lowest(score, ratio):
    removed = choose_layer({"a": score}, {"a": ratio}, {"a": Limits()})["a"]
    assert removed == sorted(set(removed))
    assert len(removed) == min(math.floor(ratio * len(score) + 1e-9), len(score) - 1)
    stays = [unit for unit in range(len(score)) if unit not in removed]
    assert all(score[gone] <= score[stay] for gone in removed for stay in stays)


def test_ratios_that_are_whole_numbers_of_units_are_met_exactly():
    for size in range(2, 200):
        score = torch.arange(size, dtype=torch.float64)
        for removed in {1, size // 3, size // 2, size - 1}:
            got = choose_layer({"a": score}, {"a": removed / size}, {"a": Limits()})["a"]
            assert got == list(range(removed))


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcd"), scores_of, min_size=1), st.floats(0, 0.4))
def test_global_removes_an_exact_number_and_the_lowest_of_all(scores, ratio):
    total = sum(map(len, scores.values()))
    limits = dict.fromkeys(scores, Limits())
    removed = choose_global(scores, dict.fromkeys(scores, 1.0), ratio, limits)
    assert sum(map(len, removed.values())) == math.floor(ratio * total + 1e-9)
    relative = {name: score / score.mean() if score.mean() > 0 else score for name, score in scores.items()}
    gone = [float(relative[name][unit]) for name, units in removed.items() for unit in units]
    for name, units in removed.items():
        if len(units) < len(scores[name]) - 1:  # a group at its limit may keep what others lose
            stays = [float(relative[name][unit]) for unit in range(len(scores[name])) if unit not in units]
            assert max(gone, default=0.0) <= min(stays) + 1e-12


def test_global_equals_layer_where_groups_are_equal():
    score = torch.tensor([3.0, 1.0, 2.0, 4.0, 0.5, 6.0])
    scores = {"a": score, "b": 10 * score.flip(0)}  # another scale
    limits = dict.fromkeys(scores, Limits())
    for ratio in (0.0, 1 / 6, 0.5, 5 / 6):
        layer = choose_layer(scores, dict.fromkeys(scores, ratio), limits)
        assert choose_global(scores, dict.fromkeys(scores, 1.0), ratio, limits) == layer


def test_global_takes_more_where_units_matter_less():
    scores = {"even": torch.tensor([1.0, 1.0, 1.0, 1.0]), "peaked": torch.tensor([0.1, 0.1, 0.1, 9.0])}
    removed = choose_global(scores, {"even": 1.0, "peaked": 1.0}, 3 / 8, dict.fromkeys(scores, Limits()))
    assert removed == {"even": [], "peaked": [0, 1, 2]}


def test_global_by_cost_prefers_what_saves_most():
    scores = {"cheap": torch.ones(4), "dear": torch.ones(4)}
    removed = choose_global(scores, {"cheap": 1.0, "dear": 10.0}, 0.5, dict.fromkeys(scores, Limits()))
    assert {name: len(units) for name, units in removed.items()} == {"cheap": 0, "dear": 2}
    removed = choose_global(scores, {"cheap": 0.0, "dear": 10.0}, 0.5, dict.fromkeys(scores, Limits()))
    assert {name: len(units) for name, units in removed.items()} == {"cheap": 0, "dear": 2}


def test_global_respects_limits_and_names_what_is_in_reach():
    scores = {"a": torch.arange(8.0), "b": torch.arange(8.0)}
    ones = dict.fromkeys(scores, 1.0)
    removed = choose_global(scores, ones, 0.5, {"a": Limits(least=7), "b": Limits()})
    assert {name: len(units) for name, units in removed.items()} == {"a": 1, "b": 7}
    removed = choose_global(scores, ones, 0.5, dict.fromkeys(scores, Limits(multiple=3)))
    assert {name: len(units) for name, units in removed.items()} == {"a": 2, "b": 2}
    with pytest.raises(TransformError, match=r"A ratio of 0\.6 .* at most 0\.500 can be removed"):
        choose_global(scores, ones, 0.6, dict.fromkeys(scores, Limits(least=4)))


@pytest.mark.parametrize("flat", [False, True])
def test_saved_operations_are_those_of_the_smaller_model(flat):
    task = small()[0]
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3)) if flat else task.model
    graph = trace(model, task.example())
    before = total_macs(graph.program)
    savings = macs_per_unit(graph, graph.groups)
    assert len(savings) == (1 if flat else 3)
    for group, saved in savings.items():
        smaller = graph.shrink(model, {group: [0]})
        assert before - total_macs(export_model(smaller, task.example())) == pytest.approx(saved)


# ---------------------------------------------------------------- the transform


@pytest.mark.parametrize("position", [0, 1])
def test_the_result_equals_the_model_with_its_units_zeroed(position):
    task = small()[position]
    prune = Prune(0.5, saliency="taylor")
    units = prune.plan(task.model, task)
    zeroed = trace(task.model, task.example()).zero(task.model, units).eval()
    inputs = task.example(7)
    with torch.no_grad():
        torch.testing.assert_close(prune(task.model, task)(inputs), zeroed(inputs), rtol=1e-4, atol=1e-5)
    assert {name: len(chosen) for name, chosen in units.items()} == {
        group.name: group.size // 2 for group in trace(task.model, task.example()).groups
    }


def test_it_removes_the_units_that_do_nothing():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))
    task = dataclasses.replace(small()[0], model=model)
    with torch.no_grad():
        for dead in (1, 4):
            model[0].weight[dead] *= 1e-6
            model[0].bias[dead] *= 1e-6
            model[3].weight[:, dead * 36 : (dead + 1) * 36] *= 1e-6
    for saliency in ("magnitude", "taylor"):
        prune = Prune(1 / 3, saliency=saliency)
        assert prune.plan(model, task) == {"0": [1, 4]}
        smaller = prune(model, task)
        assert (smaller[0].out_channels, smaller[3].in_features) == (4, 4 * 36)
        torch.testing.assert_close(smaller(task.example()), model(task.example()), rtol=1e-4, atol=1e-4)


def test_ratios_by_name_leave_the_others_whole():
    task = small()[1]
    units = Prune({"2": 0.25}).plan(task.model, task)
    assert {name: len(chosen) for name, chosen in units.items()} == {"2": 6}


def test_exclude_and_inexact():
    task = small()[2]
    sizes = {name: len(chosen) for name, chosen in Prune().plan(task.model, task).items()}
    assert sizes == {"tokens": 8, "block.query": 2, "block.up": 12}
    assert set(Prune(inexact=False).plan(task.model, task)) == {"block.query", "block.up"}
    assert set(Prune(exclude=("tokens", "block.up")).plan(task.model, task)) == {"block.query"}


def test_heads_are_not_rounded_and_units_are():
    task = small()[2]
    sizes = {name: len(chosen) for name, chosen in Prune(0.6, round_to=8).plan(task.model, task).items()}
    assert sizes == {"tokens": 8, "block.query": 2, "block.up": 8}  # 16 -> 7 -> 8, 4 heads -> 2, 24 -> 10 -> 16


def test_a_ratio_of_zero_is_a_copy():
    task = small()[1]
    result = Prune(0.0)(task.model, task)
    assert result is not task.model
    torch.testing.assert_close(result(task.example()), task.model(task.example()), rtol=0, atol=0)
    assert Prune(0.0).plan(task.model, task) == {}


def test_the_budget_trains_nothing():
    task = small()[1]
    without, rich = Prune()(task.model, task), Prune()(task.model, task, budget=3.0)
    assert all(torch.equal(a, b) for a, b in zip(without.parameters(), rich.parameters(), strict=True))


def test_gradients_of_the_given_model_do_not_come_along():
    task = small()[1]
    model = copy.deepcopy(task.model)
    model(task.example()).sum().backward()
    assert all(param.grad is None for param in Prune({"0": 0.5})(model, task).parameters())  # "4" is left whole
    assert all(param.grad is not None for param in model.parameters())


def test_frozen_parameters_are_scored_and_stay_frozen():
    task = small()[1]
    model = copy.deepcopy(task.model).requires_grad_(False)
    assert Prune(saliency="taylor").plan(model, task) == Prune(saliency="taylor").plan(task.model, task)
    assert not any(param.requires_grad for param in Prune(saliency="taylor")(model, task).parameters())


def test_conformance():
    check_transform(Prune)


def test_conformance_of_the_other_settings():
    other = {"ratios": 0.4, "scope": "global", "saliency": "taylor", "count": "macs", "round_to": 2, "batches": 2}
    check_transform(lambda: Prune(**other), models=small()[1:], skip=["exports", "onnx"])  # the same kind of module


def test_settings_with_names_survive_json():
    prune = Prune({"0": 0.5, "2": 0.25}, exclude=["x"], saliency="taylor", round_to=4)
    again = Prune(**json.loads(json.dumps(dataclasses.asdict(prune))))
    assert again == prune
    assert again.exclude == ("x",)


def test_the_import_path_of_the_catalogue():
    assert resolve("netwright.compress:Prune") is Prune


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"ratios": 1.0}, r"ratios for all groups must lie in \[0, 1\), got 1\.0"),
        ({"ratios": -0.1}, r"must lie in \[0, 1\), got -0\.1"),
        ({"ratios": math.nan}, r"must lie in \[0, 1\), got nan"),
        ({"ratios": "half"}, r"must lie in \[0, 1\), got 'half'"),
        ({"ratios": True}, r"must lie in \[0, 1\), got True"),
        ({"ratios": {"conv1": 1.5}}, r"ratios for conv1 must lie in \[0, 1\), got 1\.5"),
        ({"scope": "all"}, "scope must be 'layer' or 'global', got 'all'"),
        ({"saliency": "hessian"}, "saliency must be 'magnitude' or 'taylor'"),
        ({"count": "flops"}, "count must be 'units' or 'macs'"),
        ({"keep_at_least": 0}, "keep_at_least must be a positive integer, got 0"),
        ({"round_to": 0}, "round_to must be a positive integer"),
        ({"round_to": 2.0}, "round_to must be a positive integer, got 2.0"),
        ({"batches": 0}, "batches must be a positive integer"),
        ({"batch_size": -1}, "batch_size must be a positive integer"),
        ({"exclude": "conv1"}, r"exclude must be a sequence of group names; write \('conv1',\)"),
        ({"scope": "global", "ratios": {"conv1": 0.5}}, "must be one number with scope='global'"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(TransformError, match=message):
        Prune(**bad)


@pytest.mark.parametrize(
    ("prune", "kind", "message"),
    [
        (
            Prune({"block.querry": 0.5}),
            TransformError,
            "ratios names no group 'block.querry'; the closest is 'block.query'",
        ),
        (Prune(exclude=("token",)), TransformError, "exclude names no group 'token'; the closest is 'tokens'"),
        (Prune({"tokens": 0.5}, inexact=False), TransformError, "'tokens', whose removal changes statistics"),
        (Prune(exclude=("tokens", "block.query", "block.up")), NothingToPruneError, "leave none to prune"),
        (Prune(0.01), TransformError, "would remove no unit: .*tokens has 16"),
        (Prune(0.5, round_to=32, exclude=("block.query",)), TransformError, "round_to=32 leave every group whole"),
        (Prune(0.9, scope="global", keep_at_least=4), TransformError, "cannot be reached .* at most"),
    ],
)
def test_what_a_model_cannot_meet(prune, kind, message):
    task = small()[2]
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    with pytest.raises(kind, match=message):
        prune(task.model, task)
    assert all(torch.equal(value, task.model.state_dict()[name]) for name, value in before.items())


def test_a_model_with_nothing_to_prune():
    model = nn.Linear(5, 2)
    with pytest.raises(NothingToPruneError, match="Nothing in this model"):
        Prune()(model, linear_task(model))


def test_weights_that_are_not_finite():
    model = mlp(torch.float32)
    with torch.no_grad():
        model[2].weight[0, 1] = math.inf
    with pytest.raises(TransformError, match=r"2\.weight has 1 values that are not finite"):
        Prune()(model, linear_task(model))


def test_a_loss_that_is_not_finite():
    model = mlp(torch.float32)
    task = dataclasses.replace(linear_task(model), loss=lambda o, t: o.mean() * math.inf)
    with pytest.raises(TransformError, match="gradients of task 'linear' are not finite"):
        Prune(saliency="taylor")(model, task)
    assert Prune()(model, task)[0].out_features == 3  # magnitude needs no loss


def test_taylor_needs_a_loss():
    model = mlp(torch.float32)
    task = dataclasses.replace(linear_task(model), loss=None, fit=lambda model, **_: None)
    with pytest.raises(TransformError, match="needs the gradients of a loss"):
        Prune(saliency="taylor")(model, task)


def test_every_error_is_one_that_a_user_can_catch():
    assert issubclass(TransformError, NetwrightError)
    assert issubclass(NothingToPruneError, NetwrightError)
