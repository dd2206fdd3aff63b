"""LayerMerge: algebra against padding-free networks, the programme against exhaustive search, surgery on a zoo."""

import copy
import dataclasses
import math
import random

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset

from netwright.compress._batch_norms import thaw
from netwright.compress._merge_chains import find_chains
from netwright.compress._merge_convolutions import Kernel, add, compose, identity
from netwright.compress._merge_plan import Entry, best_path, choices, least, merge_all
from netwright.compress._merge_segment import Segment
from netwright.compress._merge_tables import _graph, _stages, choice_costs, importance, with_choices
from netwright.compress.layer_merge import LayerMerge
from netwright.compress.quantize import trace
from netwright.core.data import Data
from netwright.core.errors import TransformError
from netwright.core.graph import export_model
from netwright.core.graph.export import arguments
from netwright.core.graph.macs import total_macs
from netwright.core.task import Task
from netwright.testing import check_transform, small_tasks
from tests.graph import zoo

CHAINED = ["resnet", "resnext", "mobilenet-v2", "efficientnet", "shufflenet-v2", "unet"]


def image_task(model: nn.Module, size: int = 9, channels: int = 3) -> Task:
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype

    def split(count: int) -> TensorDataset:
        images = torch.randn(count, channels, size, size, generator=generator).to(dtype)
        return TensorDataset(images, torch.randint(2, (count,), generator=generator))

    return Task("images", model, Data(split(16), split(4), split(4)), functional.cross_entropy, lambda o, t: 0.0)


def kernel(outputs: int, inputs: int, size: int, stride: int = 1, padding: int = 0, groups: int = 1) -> Kernel:
    weight = torch.randn(outputs, inputs // groups, size, size, dtype=torch.float64)
    return Kernel(weight, torch.randn(outputs).double(), (stride, stride), (padding, padding), groups)


def convolved(part: Kernel, x: torch.Tensor) -> torch.Tensor:
    return functional.conv2d(x, part.weight, part.bias, part.stride, part.padding, groups=part.groups)


# ---------------------------------------------------------------- algebra


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((4, 3, 3, 2), (5, 4, 3)),
        ((4, 4, 3, 1, 0, 4), (4, 4, 5, 2, 0, 4)),
        ((4, 3, 1), (6, 4, 3, 2, 0, 2)),
        ((4, 4, 3, 2, 0, 2), (4, 4, 3, 1, 0, 4)),
        ((4, 3, 3, 2, 1), (2, 4, 1, 2)),
    ],
)
def test_two_convolutions_are_one(first, second):
    torch.manual_seed(0)
    one, two = kernel(*first), kernel(*second)
    x = torch.randn(2, first[1], 12, 13, dtype=torch.float64)
    torch.testing.assert_close(convolved(compose(one, two), x), convolved(two, convolved(one, x)))


def test_padding_between_goes_to_the_front():
    torch.manual_seed(0)
    one, two = kernel(4, 3, 3, 2, 1), kernel(5, 4, 3, 1, 1)
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    whole, apart = convolved(compose(one, two), x), convolved(two, convolved(one, x))
    assert whole.shape == apart.shape
    torch.testing.assert_close(whole[..., 1:-1, 1:-1], apart[..., 1:-1, 1:-1])
    assert not torch.allclose(whole, apart)


def test_a_sum_is_one_convolution():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    main, shortcut = kernel(4, 4, 5, 2, 2), kernel(4, 4, 1, 2)
    whole = add(main, shortcut)
    assert whole is not None
    torch.testing.assert_close(convolved(whole, x), convolved(main, x) + convolved(shortcut, x))
    plain = kernel(4, 4, 3, 1, 1, 4)
    whole = add(plain, identity(4))
    assert whole is not None
    assert whole.groups == 4
    torch.testing.assert_close(convolved(whole, x), convolved(plain, x) + x)
    assert add(kernel(4, 4, 1), kernel(4, 4, 3, 1, 1)) is None
    assert identity(4).identity_like()
    assert not plain.identity_like()


# ---------------------------------------------------------------- segments


def changed_graphs(name: str, count: int = 5):
    model, inputs = zoo.build(name)
    inputs = pytree.tree_map(lambda x: x.double() if x.is_floating_point() else x, inputs)
    task = dataclasses.replace(small_tasks()[0], model=model.double())
    object.__setattr__(task, "example", lambda count=2: inputs)
    module = trace(model, task)
    thaw(module)
    module.eval()
    found = [each for each in choices(module, find_chains(module), 5, "both") if not each.original]
    random.Random(0).shuffle(found)
    return module, inputs, found[:count]


def result(model: nn.Module, inputs) -> torch.Tensor:
    args, kwargs = arguments(inputs)
    return pytree.tree_leaves(model(*args, **kwargs))[0].detach()


@pytest.mark.parametrize("name", CHAINED)
def test_merged_equals_unmerged(name):
    module, inputs, found = changed_graphs(name)
    assert found
    for choice in found:
        unmerged = with_choices(module, [choice]).eval()
        for segment in (each for each in unmerged.modules() if isinstance(each, Segment)):
            assert segment.kernel().extent == choice.extent
            assert segment.kernel().groups == choice.groups
        merged = copy.deepcopy(unmerged)
        merge_all(merged)
        assert not any(isinstance(each, Segment) for each in merged.modules())
        wanted = result(unmerged, inputs)
        torch.testing.assert_close(result(merged, inputs), wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


class Linear(nn.Module):
    """A network without activations and padding, with a strided layer, a branch and a norm: merging changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6))
        self.branch = nn.Sequential(nn.Conv2d(6, 9, 1), nn.BatchNorm2d(9), nn.Conv2d(9, 6, 1))
        self.last = nn.Conv2d(6, 4, 3, 2)
        self.head = nn.Linear(4 * 4 * 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head(self.last(x + self.branch(x)).flatten(1))


def test_a_linear_network_becomes_one_layer_and_stays_what_it_is():
    torch.manual_seed(0)
    model = Linear().double().train()
    task = image_task(model, 11)
    with torch.no_grad():
        for _ in range(60):
            model(torch.randn(16, 3, 11, 11).double())
    model.eval()
    merge = LayerMerge(0.7, cost="macs", actions="merge")
    module = trace(model, task)
    thaw(module)
    [whole] = [each for each in choices(module.eval(), find_chains(module), 6, "merge") if each.stop - each.start == 4]
    unmerged = with_choices(module, [whole])
    merge_all(unmerged)
    assert [tuple(value.shape) for value in unmerged.parameters() if value.ndim == 4] == [(4, 3, 5, 5)]
    torch.testing.assert_close(unmerged(task.example(5)), model(task.example(5)), rtol=1e-9, atol=1e-9)
    assert merge.plan(model, task)


# ---------------------------------------------------------------- the programme


@pytest.mark.parametrize("seed", range(8))
def test_the_programme_equals_exhaustive_search(seed):
    draw = random.Random(seed)
    size, levels = 5, 40
    entries = [
        Entry(start, stop, draw.randint(1, 20) / 40, draw.choice((draw.random(), 1.0)))
        for start in range(size)
        for stop in range(start + 1, size + 1)
        for _ in range(draw.randint(1, 2) if stop == start + 1 else draw.randint(0, 2))
    ]
    paths = list(walks(entries, 0, size))
    shortest = min(sum(entries[n].time for n in path) for path in paths)
    assert sum(entries[n].time for n in least(entries, size)) == pytest.approx(shortest)
    for limit in (0.5, 1.0, 1.3, 2.0):
        ticks = [math.ceil(entry.time / limit * levels - 1e-9) for entry in entries]
        allowed = [path for path in paths if sum(ticks[n] for n in path) <= levels]
        if limit == 1.0:  # where times are whole ticks
            assert allowed == [path for path in paths if sum(entries[n].time for n in path) <= limit + 1e-9]
        got = best_path(entries, size, limit, levels)
        if not allowed:
            assert got is None
            continue
        best = max(sum(entries[n].importance for n in path) for path in allowed)
        assert got in [list(path) for path in allowed]
        assert sum(entries[n].importance for n in got) == pytest.approx(best)


def walks(entries, position, size):
    if position == size:
        yield ()
    for number, entry in enumerate(entries):
        if entry.start == position:
            for rest in walks(entries, entry.stop, size):
                yield (number, *rest)


def test_importance_is_one_where_nothing_changes():
    assert importance(0.7, 0.7) == 1.0
    assert importance(1.7, 0.7) == pytest.approx(math.exp(-1))
    assert importance(math.nan, 0.7) == 0.0


def test_a_choice_counts_for_every_layer_that_it_holds(monkeypatch):
    """A bottleneck merged, three layers at 0.95, comes before its middle layer left out: two at 1 and one at 0.75."""
    layers = [nn.Conv2d(4, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 81, 2))

    def told(self, module, found, *_):
        worth = {(0, 3, (1, 2, 3)): 0.95, (1, 2, ()): 0.75}
        return [1.0 if each.original else worth.get((each.start, each.stop, each.kept), 0.1) for each in found], 0.0

    monkeypatch.setattr(LayerMerge, "_importances", told)
    plan = LayerMerge(0.5, cost="macs").plan(model, image_task(model, channels=4))
    assert [(each.start, each.stop, each.kept) for each in plan] == [(0, 3, (1, 2, 3))]


def test_multiply_accumulates_of_a_plan_are_those_of_the_result():
    task = small_tasks()[0]
    merge = LayerMerge(0.6, cost="macs", items=32)
    module = trace(task.model, task)
    thaw(module)
    chains = find_chains(module)
    saved = sum(choice_costs(module, chains, [c for c in choices(module, chains, 6, "both") if c.original], "macs"))
    saved -= sum(choice_costs(module, chains, merge.plan(task.model, task), "macs"))
    before, after = (total_macs(export_model(each, task.example())) for each in (task.model, merge(task.model, task)))
    assert before - after == saved > 0


def test_prune_only_leaves_layers_as_they_are_and_merge_only_keeps_all():
    module, _, _ = changed_graphs("resnet")
    chains = find_chains(module)
    for each in choices(module, chains, 4, "merge"):
        assert each.kept == tuple(range(each.start + 1, each.stop + 1))
    for each in choices(module, chains, 4, "prune"):
        assert len(each.kept) <= 1
    both = {(each.start, each.stop) for each in choices(module, chains, 4, "both")}
    assert (0, 2) not in both  # half of a residual block
    assert {(0, 1), (0, 3), (1, 3), (1, 2), (2, 3)} <= both


# ---------------------------------------------------------------- the transform


def test_conformance():
    check_transform(lambda: LayerMerge(0.75, items=16, span=2), models=small_tasks()[:1])


def test_a_merged_network_can_be_merged_again():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 1), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    task = image_task(model, 6)
    macs = [total_macs(export_model(model, task.example()))]
    for _ in range(2):
        model = LayerMerge(0.9, cost="macs", items=16, span=2)(model, task, budget=0)
        macs.append(total_macs(export_model(model, task.example())))
    assert macs[2] < macs[1] < macs[0]


def test_a_layer_that_does_nothing_goes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 81, 2),
    )  # fmt: skip
    with torch.no_grad():
        nn.init.dirac_(model[2].weight)
        model[2].bias.zero_()
    task = image_task(model)
    smaller = LayerMerge(0.7, cost="macs")(model, task, budget=0)
    torch.testing.assert_close(smaller(task.example(3)), model(task.example(3)), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- bad input


def test_bad_settings():
    for settings, message in [
        ({"ratio": 1.0}, r"LayerMerge.ratio must lie in \(0, 1\)"), ({"cost": "flops"}, "LayerMerge.cost must be"),
        ({"actions": "all"}, "LayerMerge.actions must be"), ({"span": 0}, "LayerMerge.span must be a positive"),
        ({"probe": 1.0}, "LayerMerge.probe must be"), ({"items": 0}, "LayerMerge.items must be"),
    ]:  # fmt: skip
        with pytest.raises(TransformError, match=message):
            LayerMerge(**settings)


def test_an_unreachable_ratio_names_the_smallest_reachable():
    task = small_tasks()[0]
    with pytest.raises(TransformError, match=r"a ratio of 0\.01 is out of reach .* reaches is (0\.\d+)") as caught:
        LayerMerge(0.01, cost="macs", items=16)(task.model, task)
    smallest = float(str(caught.value).split("reaches is ")[1].split(".")[1].join(["0.", ""]))
    LayerMerge(smallest, cost="macs", items=16).plan(task.model, task)


@pytest.mark.parametrize("position", [1, 2])
def test_nothing_to_merge(position):
    task = small_tasks()[position]
    with pytest.raises(TransformError, match=r"nothing to merge\. Leave this step out"):
        LayerMerge()(task.model, task)


def test_tasks_that_train_by_themselves_or_have_no_loss():
    task = small_tasks()[0]
    own = dataclasses.replace(task, fit=lambda model, **settings: None)
    with pytest.raises(TransformError, match="trains by its own"):
        LayerMerge(0.8, cost="macs", items=16)(task.model, own)
    with pytest.raises(TransformError, match="needs the gradients of a loss"):
        LayerMerge()(task.model, dataclasses.replace(own, loss=None))


# ---------------------------------------------------------------- dilation


class Dilated(nn.Module):
    """Kernels with gaps, one of them on a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=(2, 4), dilation=(2, 4)), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU()
        )
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
        self.skip, self.head = nn.Conv2d(8, 4, 3, padding=3, dilation=3), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        return self.head((self.branch(x) + self.skip(x)).mean((2, 3)))


def test_kernels_with_gaps_cost_what_they_compute():
    torch.manual_seed(0)
    model = Dilated().eval()
    task = image_task(model, 12)
    module = trace(model, task)
    chains = find_chains(module)
    found = [each for each in choices(module, chains, 3, "both") if each.original]
    now = sum(choice_costs(module, chains, found, "macs"))
    assert now == total_macs(export_model(model, task.example())) - 8
    stages = [stage for each in found for stage in _stages(module, chains[each.chain], each)]
    assert [stage.dilation for stage in stages].count((2, 4)) == 1
    assert [stage.dilation for stage in stages].count((3, 3)) == 1
    for stage in stages:
        session = onnxruntime.InferenceSession(_graph(stage).SerializeToString())
        feeds = {"x": np.zeros((1, *stage.inputs), np.float32)}
        if stage.sums:
            feeds["z"] = np.zeros((1, *stage.outputs), np.float32)
        assert session.run(None, feeds)[0].shape == (1, *stage.outputs)


def test_merging_a_kernel_with_gaps_is_seen_to_cost_more():
    torch.manual_seed(0)
    module = trace(Dilated().eval(), image_task(Dilated().eval(), 12))
    chains = find_chains(module)
    both = [each for each in choices(module, chains, 2, "merge") if (each.start, each.stop) == (0, 2)]
    [merged] = choice_costs(module, chains, both, "macs")
    assert merged == 12 * 12 * 8 * 3 * 7 * 11
