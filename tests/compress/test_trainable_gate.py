"""Trainable gates: against gates written as multiplications under autograd, costs against counts of smaller models."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparse_reference import network, regression
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.compress._saliency import saliency_magnitude
from netwright.compress._trainable_gate_hook import GateTraining, gate, gated_places, slope
from netwright.compress._trainable_gate_macs import MacModel, closed_units
from netwright.compress.trainable_gate import TrainableGate, _start
from netwright.core.data import Data, call
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.fit import fit
from netwright.core.graph import export_model, trace
from netwright.core.graph.macs import total_macs
from netwright.testing import check_transform, small_tasks
from tests.graph.zoo import build


@given(st.floats(-3, 3), st.sampled_from(["constant", "sigmoid"]))
def test_gate_is_a_step_with_the_slope_that_is_said(value, shape) -> None:
    """The function of the paper at large M: its value is the step's, its slope within a tooth is g."""

    bell = math.exp(-value) / (1 + math.exp(-value)) ** 2
    plain = 1.0 if shape == "constant" else 4 * bell

    def paper(w: torch.Tensor) -> torch.Tensor:
        m = 1e5
        g = torch.ones_like(w) if shape == "constant" else 4 * torch.sigmoid(w) * (1 - torch.sigmoid(w))
        return (w > 0).double() + (m * w - torch.floor(m * w).detach()) / m * g

    point = torch.tensor([value, 9.0], dtype=torch.float64, requires_grad=True)
    output = paper(point)[0]
    output.backward()
    assert abs(output.item() - float(gate(point.detach())[0])) <= 1e-4
    assert abs(point.grad[0].item() - plain) <= 1e-4
    assert abs(slope(point.detach(), shape)[0].item() - plain) <= 1e-6


def test_one_unit_of_a_group_stays_open() -> None:
    assert gate(torch.tensor([-3.0, -1.0, -2.0])).tolist() == [False, True, False]


class Gated(nn.Module):
    """The regression's network with a gate of its own after the nonlinearity, moved by autograd."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)

    def forward(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return self.model[2](gates * self.model[1](self.model[0](x)))


def test_training_is_that_of_gates_as_multiplications() -> None:
    task = regression()
    rate, steps, target, strength, reach, ramp = 0.2, 9, 0.5, 0.7, 6.0, 0.5
    graph = trace(task.model, task.example())
    group = graph.groups[0]
    values = {group.name: _start(saliency_magnitude(task.model, group))}
    naive = values[group.name].clone()
    model = copy.deepcopy(task.model)
    hook = GateTraining(
        model, gated_places(graph, task.model, [group], task.example()), values, MacModel(graph, [group]),
        target=target, strength=strength, reach=reach, shape="sigmoid", ramp=ramp,
    )  # fmt: skip
    fit(model, task, task.recipe.replace(epochs=steps), validate=False, hook=hook)
    hook.finish()

    gated, largest, closed = Gated(task.model), 0.0, 0
    x, y = task.data.train.tensors
    for step in range(steps):
        opened = (naive > 0).double() if bool((naive > 0).any()) else (naive == naive.max()).double()
        closed += int((opened == 0).sum())
        gates = opened.requires_grad_()
        loss = functional.mse_loss(gated(x, gates), y)
        found = torch.autograd.grad(loss, [gates, *gated.parameters()])
        with torch.no_grad():
            for parameter, change in zip(gated.parameters(), found[1:], strict=True):
                parameter -= rate * change
        largest = max(0.9 * largest, float(found[0].square().mean().sqrt()))
        share = float(gates.detach().mean())  # both matrices shrink in proportion to the units
        wanted = 1 - (1 - target) * min(1.0, (step + 1) / (ramp * steps))
        sign = float(share > wanted) - float(share < wanted)
        bell = 4 * torch.sigmoid(naive) * (1 - torch.sigmoid(naive))
        naive = naive - reach / steps * bell * (found[0] / largest + strength * sign)
    assert closed > 0
    torch.testing.assert_close(values[group.name], naive, rtol=0, atol=1e-10)
    for left, right in zip(model.parameters(), gated.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


MODELS = ["vgg", "resnet", "resnext", "mobilenet-v2", "transformer", "pixel-shuffle", "hf-gpt2", "lstm", "unet"]


@pytest.mark.parametrize("name", MODELS)
def test_closed_gates_and_the_smaller_model_agree(name) -> None:
    model, inputs = build(name)
    graph = trace(model, inputs)
    groups = [group for group in graph.groups if group.exact]
    places = gated_places(graph, model, groups, inputs)
    macs = MacModel(graph, groups)
    values = {group.name: torch.arange(group.size, dtype=torch.float64) - 0.5 for group in groups}
    hook = GateTraining(
        copy.deepcopy(model), places, values, macs, target=0.5, strength=1.0, reach=1.0, shape="constant", ramp=1.0
    )
    hook.after_step(0, 1)  # applies the gates: the first unit of every group is closed
    closed = copy.deepcopy(model)
    closed.load_state_dict({**model.state_dict(), **{k: v.detach() for k, v in hook._parameters.items()}})
    smaller = graph.shrink(model, {group.name: [0] for group in groups})
    for left, right in zip(outputs(closed, inputs), outputs(smaller, inputs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)
    true = total_macs(export_model(smaller, inputs)) / macs.total
    assert macs.share(hook.gates()).item() == pytest.approx(true, rel=1e-9)  # attention's products count as well
    hook.finish()
    for key, value in hook._parameters.items():
        assert torch.equal(value, model.state_dict()[key])


def outputs(model: nn.Module, inputs: object) -> list[torch.Tensor]:
    with torch.no_grad():
        found = call(model, inputs)
    return [found.logits] if hasattr(found, "logits") else list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("name", ["vgg", "resnet", "resnext", "mobilenet-v2", "plain-cnn"])
def test_costs_are_those_counted_on_the_smaller_model(name) -> None:
    model, inputs = build(name)
    graph = trace(model, inputs)
    macs = MacModel(graph, graph.groups)
    units = {group.name: list(range(1 + at % (group.size - 1))) for at, group in enumerate(graph.groups)}
    gates = {group.name: torch.ones(group.size) for group in graph.groups}
    for group, gone in units.items():
        gates[group][gone] = 0.0
    counted = total_macs(export_model(graph.shrink(model, units), inputs))
    assert macs.share(gates).item() * macs.total == pytest.approx(counted, rel=1e-9)


def test_slopes_are_finite_differences_of_the_share() -> None:
    model, inputs = build("vgg")
    graph = trace(model, inputs)
    macs = MacModel(graph, graph.groups)
    gates = {group.name: torch.rand(group.size, dtype=torch.float64) for group in graph.groups}
    share, slopes = macs.slopes(gates)
    for name in gates:
        moved = {**gates, name: gates[name].clone()}
        moved[name][1] += 1e-6
        assert (macs.share(moved).item() - share) / 1e-6 == pytest.approx(float(slopes[name][1]), rel=1e-4)


@pytest.mark.parametrize("name", ["plain-cnn", "resnet"])
def test_blocks_of_lowest_mean_go_and_multiples_stay(name) -> None:
    model, inputs = build(name)
    graph = trace(model, inputs)
    macs = MacModel(graph, graph.groups)
    values = {group.name: torch.rand(group.size, dtype=torch.float64) for group in graph.groups}
    found = closed_units(macs, values, 0.4, dict.fromkeys(values, 3))
    gates = {name: torch.ones(len(value)) for name, value in values.items()}
    blocks = []
    for group, value in values.items():
        ordered = value.argsort(descending=True).split(3)
        blocks += [(float(value[units].mean()), group, units) for units in ordered[1:]]
    blocks.sort(key=lambda entry: entry[0])
    gone = 0
    while macs.share(gates).item() > 0.4:
        gates[blocks[gone][1]][blocks[gone][2]] = 0.0
        gone += 1
    for _, group, units in reversed(blocks[:gone]):
        gates[group][units] = 1.0
        if macs.share(gates).item() > 0.4:
            gates[group][units] = 0.0
    assert {group: [i for i, open_ in enumerate(gate) if not open_] for group, gate in gates.items()} == {
        group: found.get(group, []) for group in gates
    }
    assert all(sum(gate) % 3 == 0 or sum(gate) == len(gate) for gate in gates.values())


@pytest.mark.parametrize(("share", "least"), [(0.4, 4), (0.02, 1)])
def test_wide_groups_keep_multiples_while_the_budget_allows_it(share, least) -> None:
    task = small_tasks()[0]
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))
    splits = [TensorDataset(torch.rand(32, 16), torch.zeros(32).long()) for _ in range(3)]
    task = dataclasses.replace(task, model=model, data=Data(*splits), loss=functional.cross_entropy)
    smaller = TrainableGate(share)(model, task, budget=0)
    widths = smaller[0].out_features, smaller[2].out_features
    assert total_macs(export_model(smaller, task.example())) <= share * total_macs(export_model(model, task.example()))
    assert [widths[0] % least, widths[1] % (2 * least if least > 1 else 1)] == [0, 0]
    assert least > 1 or min(widths) < 4
    chosen = TrainableGate(0.4, round_to=16)(model, task, budget=0)
    assert chosen[0].out_features == 16
    assert chosen[2].out_features % 16 == 0


@pytest.mark.parametrize("name", ["plain-cnn", "vgg", "mobilenet-v2"])
def test_fewest_lowest_units_meet_the_target(name) -> None:
    model, inputs = build(name)
    graph = trace(model, inputs)
    macs = MacModel(graph, graph.groups)
    values = {group.name: torch.rand(group.size, dtype=torch.float64) for group in graph.groups}
    found = closed_units(macs, values, 0.4)
    gates = {name: torch.ones(len(value)) for name, value in values.items()}
    ranked = sorted((float(value), name, unit) for name in values for unit, value in enumerate(values[name]))
    ranked = [(value, name, unit) for value, name, unit in ranked if unit != int(values[name].argmax())]
    gone = []
    for _, name, unit in itertools.takewhile(lambda entry: macs.share(gates).item() > 0.4, ranked):
        gates[name][unit] = 0.0
        gone.append((name, unit))
    for name, unit in reversed(gone.copy()):
        gates[name][unit] = 1.0
        if macs.share(gates).item() <= 0.4:
            gone.remove((name, unit))
        else:
            gates[name][unit] = 0.0
    assert sorted(gone) == sorted((name, unit) for name, units in found.items() for unit in units)


@pytest.mark.parametrize("share", [0.35, 0.7])
def test_budget_is_met_after_training(share) -> None:
    for task in small_tasks():
        whole = total_macs(export_model(task.model, task.example()))
        smaller = TrainableGate(share)(task.model, task, budget=1)
        left = total_macs(export_model(smaller, task.example())) / whole
        assert share - 0.06 < left <= share  # no unit of these models costs more


def test_without_training_units_of_least_magnitude_go() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[[1, 4]] *= 1e-3
        model[2].weight[:, [1, 4]] *= 1e-3
    task = regression(model)
    smaller = TrainableGate(0.75)(model, task, budget=0)
    assert torch.equal(smaller[0].weight, model[0].weight[[0, 2, 3, 5, 6]])


def test_conforms() -> None:
    check_transform(lambda: TrainableGate(0.6), models=small_tasks()[:1])
    check_transform(lambda: TrainableGate(0.6, shape="sigmoid", distill=False), models=small_tasks()[1:2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"macs": 1.0}, r"macs must lie in \(0, 1\), got 1.0. 0.5 leaves half of the multiply-accumulates"),
        ({"search": 0.0}, r"search must lie in \(0, 1\)"),
        ({"strength": 0.0}, "strength must be a finite number, greater than 0"),
        ({"reach": -1.0}, "reach must be a finite number, greater than 0"),
        ({"shape": "tanh"}, "shape must be 'constant' or 'sigmoid'"),
        ({"distill": 1}, "distill must be true or false"),
        ({"inexact": None}, "inexact must be true or false"),
        ({"exclude": "fc"}, "exclude must be a sequence of names"),
        ({"round_to": 0}, "round_to must be a positive integer, got 0"),
    ],
)
def test_refuses_settings(settings, message) -> None:
    with pytest.raises(TransformError, match=f"TrainableGate.{message}"):
        TrainableGate(**settings)


def test_refuses_models_and_tasks() -> None:
    task = regression()
    with pytest.raises(TransformError, match=r"out of reach: with one unit left in every group 0\.1429 of"):
        TrainableGate(0.1)(task.model, task)
    with pytest.raises(TransformError, match="exclude names no group 'head'; there are 0"):
        TrainableGate(exclude=["head"])(task.model, task)
    with pytest.raises(NothingToPruneError, match=r"exclude=\['0'\] and inexact=False leave none to gate"):
        TrainableGate(exclude=["0"])(task.model, task)
    with pytest.raises(NothingToPruneError, match="Nothing in this model can be proved safe to remove"):
        TrainableGate()(nn.Linear(5, 3).double(), task)
    with pytest.raises(TransformError, match="trains by its own fit="):
        TrainableGate()(task.model, dataclasses.replace(task, fit=lambda model, **_: model))
    broken = network()
    broken[0].weight.data[0, 0] = float("inf")
    with pytest.raises(TransformError, match="values that are not finite"):
        TrainableGate()(broken, task)
