"""As many items are seen as the settings say."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.compress._held_items import held_items
from netwright.compress._layer_inputs import calibration, output_moments
from netwright.compress.quantize import Int8
from netwright.core.data import Data, batches
from netwright.core.task import Task


def task(items: int = 300) -> Task:
    inputs = torch.arange(3.0 * items).reshape(items, 3)
    splits = [TensorDataset(inputs.clone(), torch.arange(items)) for _ in range(3)]
    return Task("counted", nn.Linear(3, 4), Data(*splits), nn.functional.cross_entropy, lambda output, _: 0.0)


@pytest.mark.parametrize("items", [1, 31, 32, 33, 64, 200, 300])
def test_calibration_sees_the_first_of_the_drawn_items(items):
    given = task()
    drawn = torch.randperm(300, generator=torch.Generator().manual_seed(5))[:items]
    found = list(calibration(given.data.train, items, 5, torch.device("cpu")))
    assert max(map(len, found)) <= 32
    assert torch.equal(torch.cat(found), given.data.train.tensors[0][drawn])
    assert len(torch.cat(list(calibration(given.data.train, 999, 5, torch.device("cpu"))))) == 300


def test_ranges_are_those_of_that_many_items():
    given = task()
    seen = given.data.train.tensors[0][torch.randperm(300, generator=torch.Generator().manual_seed(7))[:33]]
    module = Int8(calibration_items=33)(given.model, given, seed=7)
    scale = dict(module.named_buffers())["input_1_quantizer.scale"]
    assert float(scale) == pytest.approx(float(seen.max()) / 255, rel=1e-5)


@pytest.mark.parametrize(
    ("items", "of", "sizes"),
    [
        (128, 300, [128]),
        (256, 300, [128, 128]),
        (200, 300, [100, 100]),
        (129, 300, [65, 64]),
        (300, 300, [100, 100, 100]),
        (5, 300, [5]),
        (512, 300, [128, 128]),
        (512, 90, [90]),
        (100, 90, [90]),
        (140, 150, [70, 70]),
        (149, 149, [75, 74]),
        (1, 300, [1]),
    ],
)
def test_held_items_are_as_many_as_asked_for(items, of, sizes):
    given = task(of)
    found = held_items(given, items, 3)
    assert [len(targets) for _, targets in found] == sizes
    order = torch.randperm(of, generator=torch.Generator().manual_seed(3))[: sum(sizes)]
    assert torch.equal(torch.cat([targets for _, targets in found]), order)
    assert torch.equal(torch.cat([inputs for inputs, _ in found]), given.data.train.tensors[0][order])


@pytest.mark.parametrize(("items", "of"), [(128, 300), (512, 300), (1024, 1000), (256, 256), (64, 300), (512, 90)])
def test_whole_batches_are_those_that_they_were(items, of):
    """The batches of a size that goes into the items, without a smaller one at the end of the data."""
    given = task(of)
    size = min(128, items)
    drawn = batches(given.data.train, size, generator=torch.Generator().manual_seed(1), drop_last=True)
    wanted = list(drawn)[: items // size]
    for (inputs, targets), (x, y) in zip(held_items(given, items, 1), wanted, strict=True):
        assert torch.equal(inputs, x)
        assert torch.equal(targets, y)


def test_inputs_of_several_parts_are_cut():
    x = torch.arange(40.0)[:, None]
    items = [({"one": value, "two": (value, -value)}, 0) for value in x]
    found = list(calibration(items, 33, 0, torch.device("cpu")))
    assert [len(each["one"]) for each in found] == [32, 1]
    assert torch.equal(found[1]["two"][1], -found[1]["one"])
    given = Task(
        "parts", nn.Linear(1, 1), Data(items, list(items), list(items)), lambda o, t: o.sum(), lambda o, t: 0.0
    )
    assert [len(inputs["two"][0]) for inputs, _ in held_items(given, 39, 0)] == [39]


def test_moments_count_the_items():
    given = task()
    found = output_moments("test", given.model, {"layer": given.model}, given.data.train, 40, 0)
    assert found["layer"].count == 40
