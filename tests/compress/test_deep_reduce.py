"""DeepReDuce: counts against hooks, criticality and plans by hand, surgery against networks written without ReLUs."""

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.compress._relu_removal import ReluRemoval, criticality
from netwright.compress._relus import ReluLayer, find_relus, thinned, without_relus
from netwright.compress.deep_reduce import DeepReDuce, count_relus, relu_front
from netwright.compress.quantize import trace
from netwright.core.data import Data
from netwright.core.errors import TransformError
from netwright.core.evaluate import evaluate
from netwright.core.recipe import Recipe
from netwright.core.score import accuracy
from netwright.core.task import Task
from netwright.testing import check_transform, small_tasks
from tests.graph.zoo import build

small = functools.cache(small_tasks)


class Staged(nn.Module):
    """Three convolutions at 8 x 8, one at 4 x 4, a hidden layer; ``kept`` says which of the five have a ReLU."""

    def __init__(self, kept: tuple[bool, ...] = (True,) * 5) -> None:
        super().__init__()
        self.kept = kept
        self.convs = nn.ModuleList(nn.Conv2d(1 if k == 0 else 4, 4, 3, padding=1) for k in range(4))
        self.norm = nn.BatchNorm2d(4)
        self.hidden, self.head = nn.Linear(64, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for position, conv in enumerate(self.convs):
            x = conv(functional.max_pool2d(x, 2) if position == 3 else x)
            x = self.norm(x) if position == 1 else x
            x = functional.relu(x) if self.kept[position] else x
        x = self.hidden(x.flatten(1))
        return self.head(functional.relu(x) if self.kept[4] else x)


def staged_task() -> Task:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> TensorDataset:
        labels = torch.randint(3, (count,), generator=generator)
        return TensorDataset(torch.randn(count, 1, 8, 8, generator=generator) + labels[:, None, None, None], labels)

    torch.manual_seed(0)
    recipe = Recipe(batch_size=16, epochs=2, schedule=None, schedule_settings={})
    data = Data(split(64), split(48), split(16))
    return Task("staged", Staged().eval(), data, functional.cross_entropy, accuracy, recipe=recipe)


# ---------------------------------------------------------------- counting and surgery


def test_layers_their_counts_and_stages():
    task = staged_task()
    layers = find_relus(trace(task.model, task), task)
    assert [(layer.count, layer.stage) for layer in layers] == [(256, 0), (256, 0), (256, 0), (64, 1), (6, 2)]
    assert count_relus(task.model, task) == 838
    assert [layer.count for layer in thinned(layers)] == [256, 256, 64, 6]
    assert [layers.index(layer) for layer in thinned(layers)] == [0, 2, 3, 4]


@pytest.mark.parametrize("name", ["resnet", "vgg", "mobilenet-v2", "siamese", "two-inputs", "two-outputs", "gru"])
def test_counts_equal_what_passes_through_relus(name):
    model, inputs = build(name)
    seen: list[int] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            packet = func.overloadpacket.__name__.rstrip("_")
            if packet == "relu" or (packet == "hardtanh" and args[1] == 0):
                seen.append(out.numel() // out.shape[0])
            return out

    task = dataclasses.replace(small()[0], model=model)
    object.__setattr__(task, "example", lambda count=2: inputs)
    with Count(), torch.no_grad():
        model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    assert seen
    assert count_relus(model, task) == sum(seen)


@pytest.mark.parametrize("kept", [(True, False, True, False, True), (False,) * 5, (True,) * 5])
def test_a_network_without_some_relus(kept):
    task = staged_task()
    module = trace(task.model, task)
    gone = [layer.name for layer, stays in zip(find_relus(module, task), kept, strict=True) if not stays]
    wanted = Staged(kept).eval()
    wanted.load_state_dict(task.model.state_dict())
    inputs = task.example(5)
    torch.testing.assert_close(without_relus(module, gone)(inputs), wanted(inputs), rtol=0, atol=0)
    torch.testing.assert_close(module(inputs), task.model(inputs), rtol=0, atol=0)


# ---------------------------------------------------------------- criticality and plans


def test_criticality():
    assert criticality(0.9, 0.5, 1000, 0.07) == pytest.approx(0.4 / 1000**0.07)
    assert criticality(-3.0, -7.0, 10, 0.0) == 4.0
    assert criticality(0.4, 0.5, 10, 0.07) == 0.0


def test_criticality_of_stages_is_that_of_networks_with_one_stage():
    task = staged_task()
    maker = ReluRemoval(DeepReDuce(), task.model, task, 0)
    found, spent = maker.criticality(0.07, 0.0, lambda fraction, what: None)
    assert spent == 0
    names = [layer.name for layer in maker.layers]
    linear = evaluate(maker.fitted(without_relus(maker.whole, names), 0), task, "val")
    for stage, stays in ((0, names[:3]), (1, names[3:4]), (2, names[4:])):
        alone = without_relus(maker.whole, [name for name in names if name not in stays])
        score = evaluate(maker.fitted(alone, 0), task, "val")
        assert found[stage] == pytest.approx(max(score - linear, 0) / maker.stage_count(stage) ** 0.07)


def test_plans_cull_the_least_critical_first():
    task = staged_task()
    maker = ReluRemoval(DeepReDuce(), task.model, task, 0)
    plans = {plan.steps: plan for plan in maker.plans({0: 0.1, 1: 0.3, 2: 0.2})}
    assert {steps: plan.count for steps, plan in plans.items()} == {
        "thin": 582, "thin, reshape": 291, "cull 1": 70, "cull 1, reshape": 35, "cull 2": 64, "cull 2, reshape": 32,
    }  # fmt: skip
    assert plans["cull 2"].gone == tuple(layer.name for layer in maker.layers if layer.stage != 1)
    # equally useless stages: the larger one goes first
    assert [plan.count for plan in maker.plans({0: 0.0, 1: 0.0, 2: 0.3}) if plan.steps == "cull 1"] == [70]


def test_thinning_keeps_the_last_of_each_stage():
    layers = [ReluLayer(str(k), 1, stage) for k, stage in enumerate((0, 0, 0, 0, 1, 1, 2))]
    assert [layer.name for layer in thinned(layers)] == ["1", "3", "5", "6"]


# ---------------------------------------------------------------- the transform


@pytest.mark.parametrize("ratio", [0.7, 0.1, 0.04])
def test_the_limit_is_kept_with_as_many_relus_as_it_allows(ratio):
    task = staged_task()
    smaller = DeepReDuce(ratio)(task.model, task, budget=0)
    count = count_relus(smaller, task)
    assert count <= ratio * 838
    maker = ReluRemoval(DeepReDuce(), task.model, task, 0)
    plans = maker.plans(maker.criticality(0.07, 0.0, lambda fraction, what: None)[0])
    assert count in {plan.count for plan in plans}
    whole = [plan.count for plan in plans if plan.count <= ratio * 838 and not plan.reshaped]
    assert count == max(whole or [plan.count for plan in plans if plan.count <= ratio * 838])


def test_a_front_has_no_dominated_network_and_says_what_is_true():
    task = staged_task()
    front = list(relu_front(task.model, task, budget=1))
    counts, scores = [point.count for point in front], [point.score for point in front]
    assert counts == sorted(set(counts))
    assert scores == sorted(set(scores))
    for point in front:
        assert count_relus(point.model, task) == point.count
        assert evaluate(point.model, task, "val") == point.score
    again = [(point.count, point.score) for point in relu_front(task.model, task, budget=1)]
    assert again == list(zip(counts, scores, strict=True))


def test_conformance():
    check_transform(lambda: DeepReDuce(0.6), models=small()[:1])


# ---------------------------------------------------------------- bad input


def test_bad_settings():
    for settings, message in [
        ({"ratio": 0.0}, r"DeepReDuce.ratio must lie in \(0, 1\)"),
        ({"exponent": -1.0}, "DeepReDuce.exponent must be a finite number"),
        ({"probe": 0.95}, "DeepReDuce.probe must be a finite number"),
    ]:
        with pytest.raises(TransformError, match=message):
            DeepReDuce(**settings)


def test_no_relus():
    task = small()[2]
    for call in (DeepReDuce(), relu_front):
        with pytest.raises(TransformError, match="Transformer has no ReLU, so there is nothing to remove"):
            call(task.model, task)


def test_out_of_reach_names_the_smallest_share():
    task = staged_task()
    with pytest.raises(
        TransformError, match=r"a ratio of 0\.001 is out of reach .* 838 ReLUs .* is (0\.\d+)"
    ) as caught:
        DeepReDuce(0.001)(task.model, task, budget=0)
    least = float(str(caught.value).split("be left is ")[1][:5])
    assert count_relus(DeepReDuce(least)(task.model, task, budget=0), task) <= least * 838


def test_tasks_that_train_by_themselves_or_have_no_loss():
    task = dataclasses.replace(staged_task(), fit=lambda model, **settings: None)
    with pytest.raises(TransformError, match="trains by its own"):
        DeepReDuce(0.5)(task.model, task)
    with pytest.raises(TransformError, match="needs the gradients of a loss"):
        DeepReDuce(0.5)(task.model, dataclasses.replace(task, loss=None))


def test_what_is_out_of_reach_is_refused_before_anything_is_trained(monkeypatch):
    task = staged_task()
    monkeypatch.setattr("netwright.compress._relu_removal.train", lambda *_, **__: pytest.fail("it was trained"))
    with pytest.raises(TransformError, match=r"a ratio of 0\.001 is out of reach"):
        DeepReDuce(0.001)(task.model, task, budget=2)


def test_where_the_most_critical_stage_is_too_large_another_stays():
    maker = ReluRemoval(DeepReDuce(), staged_task().model, staged_task(), 0)
    critical = {0: 3.0, 1: 2.0, 2: 1.0}  # of 768, 64 and 6 ReLUs
    steps = {
        limit: [(plan.count, plan.steps) for plan in maker.within(critical, limit)] for limit in (600, 260, 200, 8)
    }
    assert steps[600] == [(582, "thin"), (576, "cull 1, thin"), (512, "cull 2, thin")]
    assert steps[260] == [(256, "cull 2, thin, reshape")]
    assert steps[200] == [(64, "cull 2")]
    assert steps[8] == [(6, "cull 2")]
    assert "relu_3" not in maker.within(critical, 200)[0].gone  # the only one of stage 1
    assert (maker.least(reshape=False), maker.least(reshape=True)) == (6, 3)
    assert maker.within(critical, 2) == []
