"""Growing networks: masks against loops, hard masks against the shrunk network, operations against core's count."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.core.builtin.networks import BasicBlock
from netwright.core.data import Data
from netwright.core.errors import NothingToPruneError, SettingError, TraceError
from netwright.core.fit import fit
from netwright.core.graph import export_model, trace
from netwright.core.graph.macs import total_macs
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task
from netwright.search._growing_masks import LAYERS, Masks, mask_step, within_budget
from netwright.search._growing_module import Growing, GrowingModule
from netwright.search._growing_structure import Structure
from netwright.search.growing_network import GrowingNetwork

INPUTS = torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def residual():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        BasicBlock(6, 6),
        BasicBlock(6, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def built(seed=0):
    torch.manual_seed(seed)
    model = residual().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model


@pytest.fixture(scope="module")
def traced():
    model = built()
    return model, Structure(model, INPUTS, None)


def task_of(network=residual, count=96, **changes):
    generator = torch.Generator().manual_seed(1)

    def split():
        targets = torch.arange(count) % 3
        return TensorDataset(torch.rand(count, 1, 6, 6, generator=generator) + targets.view(-1, 1, 1, 1) / 2, targets)

    recipe = Recipe(epochs=4, batch_size=16, optimizer_settings={"lr": 5e-3}, schedule_settings={"max_lr": 5e-3})
    settings = {"loss": functional.cross_entropy, "score": accuracy, "recipe": recipe}
    return Task("tiny", network, Data(split(), split(), split()), **(settings | changes))


def masks_of(structure, **changes):
    settings = {"seed_share": 0.5, "final": 10.0, "rounds": 3, "generator": torch.Generator().manual_seed(0)}
    sizes = {group.name: group.size for group in structure.groups}
    return Masks(sizes, len(structure.layers), **(settings | changes))


def drawn(structure, seed, layers=1.0):
    generator = torch.Generator().manual_seed(seed)
    found = {group.name: (torch.rand(group.size, generator=generator) < 0.6).double() for group in structure.groups}
    for value in found.values():
        value[0] = 1.0
    return found | ({LAYERS: torch.full((len(structure.layers),), layers).double()} if structure.layers else {})


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(-4, 4), st.integers(0, 9), st.floats(-3, 3)), min_size=1, max_size=6),
    st.floats(-2, 2),
    st.floats(0.01, 2),
)
def test_masks_move_as_a_loop_says(entries, pressure, rate):
    s, t, slope = (torch.tensor(column, dtype=torch.float64) for column in zip(*entries, strict=True))
    found = mask_step(s, 100.0 ** (t / 9), slope, pressure, rate)
    for place, (start, count, gradient) in enumerate(entries):
        beta = torch.tensor(100.0, dtype=torch.float64) ** (count / 9)
        logit = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        objective = (gradient + pressure) * torch.sigmoid(beta * logit)
        torch.autograd.backward(objective)
        assert float(found[place]) == pytest.approx(start - rate * float(logit.grad), abs=1e-9)


def test_temperature_rises_only_with_rounds_that_drew_a_mask():
    masks = Masks({"a": 6}, 2, seed_share=0.34, final=16.0, rounds=4, generator=torch.Generator().manual_seed(3))
    assert masks.logits["a"].gt(0).tolist() == [True, True, False, False, False, False]
    counts = torch.zeros(6)
    for _ in range(4):
        counts += masks.sample()["a"]
    wanted = torch.tensor([2.0 ** float(count) for count in counts], dtype=torch.float64)
    torch.testing.assert_close(masks.temperatures()["a"], wanted)
    torch.testing.assert_close(masks.values()["a"], 1 / (1 + torch.exp(-wanted * masks.logits["a"])))
    assert counts[:2].min() > counts[2:].min()


def test_slopes_are_scaled_and_signs_are_right():
    masks = Masks({"a": 3}, 0, seed_share=0.9, final=1.0, rounds=1, generator=torch.Generator())
    before = masks.logits["a"].clone()
    masks.move({"a": torch.tensor([3.0, -3.0, 0.0], dtype=torch.float64)}, 0.0, 1.0)
    m = float(torch.sigmoid(before[0]))
    wanted = before - m * (1 - m) * torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(masks.logits["a"], wanted)
    masks.move({"a": torch.zeros(3, dtype=torch.float64)}, -0.5, 1.0)
    assert (masks.logits["a"] > wanted).all()


def test_the_budget_is_met_by_rank():
    logits = {"a": torch.tensor([0.1, 5.0, -1.0, 2.0]), "b": torch.tensor([-3.0, 1.0]), LAYERS: torch.tensor([-1.0])}

    def share(masks):
        return float(masks["a"].sum() + masks["b"].sum() + 4 * masks[LAYERS].sum()) / 10

    found = within_budget(logits, share, 0.45)
    assert found["a"].tolist() == [1, 1, 0, 1]
    assert found["b"].tolist() == [0, 1]
    assert found[LAYERS].tolist() == [0]
    opened = within_budget(logits | {LAYERS: torch.tensor([1.0])}, share, 0.75)
    assert opened[LAYERS].tolist() == [1]
    assert share(opened) == pytest.approx(0.7)
    with pytest.raises(SettingError, match="out of reach"):
        within_budget(logits, share, 0.1)


@pytest.mark.parametrize("layers", [0.0, 1.0])
def test_masks_of_infinite_temperature_are_the_shrunk_network(traced, layers):
    model, structure = traced
    assert structure.layers == ("3",)
    hard = drawn(structure, 4, layers)
    module = GrowingModule(model, structure)
    everything = {name: torch.ones_like(value) for name, value in hard.items()}
    logits = {name: (2 * value - 1) * 0.3 for name, value in hard.items()}
    module.open(everything, {name: torch.sigmoid(1e4 * value).float() for name, value in logits.items()})
    relaxed = module.eval()(INPUTS)
    torch.testing.assert_close(relaxed, structure.build(model, hard)(INPUTS), rtol=1e-4, atol=1e-5)
    reference = deepcopy(model)
    if not layers:
        reference[3] = nn.Identity()
    graph = trace(reference, INPUTS)
    known = {group.name for group in graph.groups}
    closed = {name: (value == 0).nonzero().flatten().tolist() for name, value in hard.items() if name in known}
    torch.testing.assert_close(relaxed, graph.shrink(reference, closed)(INPUTS), rtol=1e-4, atol=1e-5)


def test_folding_masks_leaves_the_function():
    model = built()
    structure = Structure(model, INPUTS, ())
    module, values = GrowingModule(model, structure).eval(), masks_of(structure).values()
    module.open(drawn(structure, 2), {name: value.float() for name, value in values.items()})
    before = module(INPUTS)
    module.fold(values)
    module.open(drawn(structure, 2), None)
    torch.testing.assert_close(module(INPUTS), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(2))
def test_operations_are_those_that_core_counts(traced, seed):
    model, structure = traced
    for layers in (0.0, 1.0):
        hard = drawn(structure, seed, layers)
        small = structure.build(model, hard)
        assert structure.macs(hard) == total_macs(export_model(small, INPUTS))
    assert structure.total == total_macs(export_model(model, INPUTS))


def test_with_all_masks_open_it_is_ordinary_training_to_the_digit():
    task, model = task_of(), residual()
    plain = fit(deepcopy(model), task, seed=3, device="cpu", validate=False).model
    structure = Structure(deepcopy(model), task.example(), None)
    masks = masks_of(structure)
    for value in masks.logits.values():
        value.fill_(1e3)
    module = GrowingModule(deepcopy(model), structure)
    hook = Growing(module, structure, masks, budget=1.0, rounds=3, settle=0.3, strength=1.0, reach=1.0)
    fit(module, task, seed=3, device="cpu", validate=False, hook=hook)
    module.store()
    assert len(hook.segments) == 4
    for name, value in plain.state_dict().items():
        assert torch.equal(value, module.full.state_dict()[name]), name


@pytest.mark.parametrize(("budget", "sign"), [(0.95, 1), (0.01, -1)])
def test_below_its_budget_a_network_grows_and_above_it_shrinks(traced, budget, sign):
    model, structure = traced
    masks, module = masks_of(structure), GrowingModule(deepcopy(model), structure)
    before = {name: value.clone() for name, value in masks.logits.items()}
    hook = Growing(module, structure, masks, budget=budget, rounds=3, settle=0.5, strength=1.0, reach=9.0)
    hook.before_step(0, 100)
    assert all(bool((sign * (masks.logits[name] - value) > 0).all()) for name, value in before.items())


def test_closed_entries_stay_and_open_ones_move():
    task, model = task_of(), residual()
    structure = Structure(model, task.example(), ())
    module = GrowingModule(deepcopy(model), structure)
    hard = drawn(structure, 1)
    hook = Growing(module, structure, masks_of(structure), budget=0.5, rounds=1, settle=0.01, strength=0.0, reach=0.0)
    hook.masks.sample = lambda: hard
    hook.segments.clear()
    hook._begin(0, hard, relaxed=True)
    fit(module, task, task.recipe.replace(epochs=0.5), seed=0, device="cpu", validate=False, hook=hook)
    before, after = model[3].conv1.weight, module.full[3].conv1.weight
    kept = structure.kept(hard)["3.conv1.weight"]
    active = torch.zeros(before.shape, dtype=torch.bool)
    active[kept[0][:, None], kept[1]] = True
    masked = torch.ones(6)  # folding at the end multiplies what reads the stream
    for place in structure.readers["0"]:
        if place.parameter == "3.conv1.weight":
            masked = hook.masks.values()["0"].float()
    torch.testing.assert_close(after[~active], (before * masked[None, :, None, None])[~active])
    assert not torch.isclose(after[active], (before * masked[None, :, None, None])[active]).all()


def test_a_network_grows_within_its_budget_and_is_plain():
    recipe = Recipe(epochs=20, batch_size=16, optimizer_settings={"lr": 1e-2}, schedule_settings={"max_lr": 1e-2})
    task, model = task_of(recipe=recipe), residual()
    before = deepcopy(model.state_dict())
    runs = [GrowingNetwork(0.5, rounds=3)(model, task, seed=5) for _ in range(2)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for one, two in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(one, two)
    grown = runs[0]
    assert type(grown.model) is nn.Sequential
    assert grown.macs == total_macs(export_model(grown.model, INPUTS)) <= 0.5 * grown.full_macs
    assert grown.history[0].macs < grown.macs
    assert sum(stage.steps for stage in grown.history) == 120
    assert grown.training_macs == 3 * 16 * sum(stage.steps * stage.macs for stage in grown.history)
    assert grown.full_training_macs == 3 * 16 * 120 * total_macs(export_model(model, INPUTS))
    assert grown.training_share < 0.5
    inputs, targets = task.data.val.tensors
    assert accuracy(grown.model(inputs), targets) > 0.6  # a third by chance


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("network", "error", "words"),
    [
        (Branching(), TraceError, "cannot be traced"),
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), NothingToPruneError, "Nothing in this model"),
    ],
)
def test_networks_that_cannot_grow(network, error, words):
    with pytest.raises(error, match=words):
        GrowingNetwork()(network, task_of())


def test_bad_calls():
    with pytest.raises(SettingError, match="no module 'nowhere'"):
        GrowingNetwork(layers=("nowhere",))(residual(), task_of())
    with pytest.raises(SettingError, match="'4' cannot be left out: it does not map"):
        GrowingNetwork(layers=("4",))(residual(), task_of())
    with pytest.raises(SettingError, match="own fit="):
        GrowingNetwork()(residual(), task_of(loss=None, fit=lambda model, **_: model))
    broken = residual()
    nn.init.constant_(broken[0].weight, float("nan"))
    with pytest.raises(SettingError, match=r"'0.weight' has values that are not finite"):
        GrowingNetwork()(broken, task_of())
    with pytest.raises(SettingError, match=r"budget=0.001 is out of reach"):
        GrowingNetwork(0.001)(residual(), task_of(), budget=1)


def test_bad_settings():
    nan, infinite = float("nan"), float("inf")
    wrong = {"budget": (0.0, 1.0, nan), "seed_share": (1.5,), "settle": (0, nan), "rounds": (0, 1.5), "final": (0.5,)}
    for name, values in (wrong | {"reach": (nan, -1), "strength": (infinite,), "layers": ("3",)}).items():
        for value in values:
            with pytest.raises(SettingError, match=f"GrowingNetwork.{name} must "):
                GrowingNetwork(**{name: value})
