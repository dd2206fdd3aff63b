import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from netwright.compress import Int8, Prune, PruneBranches
from netwright.core.builtin.networks import CharTransformer, ResNet
from netwright.core.data import Data
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.task import Task
from netwright.testing import check_transform


class Block(nn.Module):
    """A residual block that can do without its branch."""

    def __init__(self, width: int, project: bool, swapped: bool) -> None:
        super().__init__()
        self.norm, self.layer, self.swapped, self.dropped = nn.LayerNorm(width), nn.Linear(width, width), swapped, False
        self.skip = nn.Linear(width, width) if project else nn.Identity()

    def forward(self, x):
        if self.dropped:
            return self.skip(x)
        y = torch.tanh(self.layer(self.norm(x)))
        return self.skip(x) + y if self.swapped else y + self.skip(x)


def network(kinds, width=6):
    torch.manual_seed(0)
    blocks = [Block(width, project, swapped) for project, swapped in kinds]
    return nn.Sequential(nn.Linear(5, width), *blocks, nn.Linear(width, 3)).eval()


def task_for(model, shape=(5,), items=64, symbols=None):
    generator = torch.Generator().manual_seed(1)

    def split():
        inputs = torch.randn(items, *shape, generator=generator)
        if symbols is not None:
            inputs = torch.randint(symbols, (items, *shape), generator=generator)
            return TensorDataset(inputs, inputs)
        return TensorDataset(inputs, torch.randint(3, (items,), generator=generator))

    def loss(output, target):
        return nn.functional.cross_entropy(output.flatten(0, -2), target.flatten())

    return Task("residual", model, Data(split(), split(), split()), loss, lambda output, target: 0.0)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=4), st.data())
def test_it_is_the_network_that_never_had_the_branches(kinds, data):
    model = network(kinds)
    gone = data.draw(st.sets(st.integers(1, len(kinds)), min_size=1))
    expected = copy.deepcopy(model)
    for number in gone:
        expected[number].dropped = True
    task = task_for(model)
    shallow = PruneBranches([f"{number}.norm" for number in gone])(model, task)
    inputs = torch.randn(7, 5)
    assert torch.equal(shallow(inputs), expected(inputs))
    left = {name for name, _ in model.named_parameters()}
    left -= {name for name in left if int(name[0]) in gone and ".skip" not in name}
    assert {name for name, _ in shallow.named_parameters()} == left


def test_branches_of_a_residual_network_and_of_a_transformer():
    resnet = ResNet(1, 4, 10)
    task = task_for(resnet, (1, 8, 8))
    assert sorted(PruneBranches().plan(resnet, task)) == [f"blocks.{number}.conv1" for number in range(3)]
    former = CharTransformer(11, context=8, dim=8, layers=2, heads=2)
    names = PruneBranches(items=16).plan(former, task_for(former, (8,), symbols=11))
    assert sorted(names) == [f"blocks.{number}.norm{part}" for number in range(2) for part in (1, 2)]


def test_a_rectifier_after_a_rectifier_goes_too():
    resnet = ResNet(1, 4, 10).eval()
    shallow = PruneBranches(["blocks.0.conv1"])(resnet, task_for(resnet, (1, 8, 8)))
    count = sum("relu" in str(node.target) for node in shallow.graph.nodes)
    assert count == 1 + 2 * 2
    inputs = torch.rand(3, 1, 8, 8)
    expected = resnet.head(resnet.pool(resnet.blocks[2](resnet.blocks[1](relu(resnet, inputs)))).flatten(1))
    assert torch.allclose(shallow(inputs), expected, atol=1e-6)


def relu(resnet, inputs):
    return torch.relu(resnet.norm(resnet.stem(inputs)))


def test_the_order_is_the_greedy_one():
    """An independent search over the same losses, with the blocks' own switch."""
    model = network([(False, False)] * 4)
    task = task_for(model, items=128)
    found = PruneBranches(items=128).plan(model, task, seed=3)
    inputs, targets = task.data.train.tensors
    left, gone, expected = {1, 2, 3, 4}, set(), []

    def loss(dropped):
        trial = copy.deepcopy(model)
        for number in dropped:
            trial[number].dropped = True
        with torch.no_grad():
            return float(nn.functional.cross_entropy(trial(inputs), targets))

    while left:
        best = min(left, key=lambda number: loss(gone | {number}))
        expected.append(f"{best}.norm")
        gone.add(best)
        left.remove(best)
    assert found == expected
    half = PruneBranches(0.5, items=128)(model, task, seed=3)
    kept = {name.partition(".")[0] for name, _ in half.named_parameters()} - {"0", "5"}
    assert {f"{number}.norm" for number in kept} == set(expected[2:])


def test_pruning_before_and_integers_after():
    resnet = ResNet(1, 8, 10)
    task = task_for(resnet, (1, 8, 8))
    thin = Prune(0.5)(resnet, task)
    shallow = PruneBranches(["blocks.1.conv1", "blocks.2.conv1"])(thin, task)
    whole = Int8(calibration_items=8)(shallow, task)
    assert whole(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert sum(p.numel() for p in shallow.parameters()) < sum(p.numel() for p in thin.parameters()) / 3


def test_a_sum_without_a_common_source_is_no_branch():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.symbols, self.places, self.head = nn.Embedding(5, 4), nn.Embedding(6, 4), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.symbols(x) + self.places(torch.arange(6).expand_as(x)))

    with pytest.raises(NothingToPruneError, match="Embedded has no residual branch"):
        PruneBranches()(Embedded(), task_for(Embedded(), (6,), symbols=5))


def test_a_branch_that_others_read_stays():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            y = self.layer(x)
            return self.head((x + y) * y)

    with pytest.raises(NothingToPruneError):
        PruneBranches()(Read(), task_for(Read()))


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (0.0, "greater than 0"),
        (1.5, "at most 1"),
        (float("nan"), "finite"),
        ("1.norm", r"write \['1.norm'\]"),
        ([], "names no branch"),
    ],
)
def test_settings_out_of_range(drop, message):
    with pytest.raises(TransformError, match=message):
        PruneBranches(drop)


def test_an_unknown_name_and_weights_that_are_not_finite():
    model = network([(False, False)])
    with pytest.raises(TransformError, match=r"no branch 'x'; known are 1\.norm"):
        PruneBranches(["x"])(model, task_for(model))
    with torch.no_grad():
        model[1].layer.weight[0, 0] = float("nan")
    with pytest.raises(TransformError, match=r"1\.layer\.weight has 1 values that are not finite"):
        PruneBranches()(model, task_for(model))


def test_it_is_a_transform():
    resnet = ResNet(1, 4, 10)
    check_transform(lambda: PruneBranches(0.5, items=16), models=[task_for(resnet, (1, 8, 8))])
