"""Splits, and how they become batches."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from netwright.core.data import Data, batches, call, first_inputs, stack, to_device
from netwright.core.errors import DataError


class Items(Dataset[Any]):
    """Items made by a function of their index."""

    def __init__(self, size: int, make: Any) -> None:
        self.size, self.make = size, make

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.make(index)


class Doubled(TensorDataset):
    """A subclass that changes its items."""

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return 2 * x, y


def numbers(size: int = 5) -> TensorDataset:
    return TensorDataset(torch.arange(float(size))[:, None], torch.arange(size))


def as_tensor(index: int) -> Any:
    return torch.tensor([float(index), 1.0]), index


def as_tuple(index: int) -> Any:
    return (torch.tensor([float(index)]), torch.tensor(index)), index


def as_list(index: int) -> Any:
    return [torch.tensor([float(index)]), torch.tensor(index)], index


def as_dict(index: int) -> Any:
    return {"a": torch.tensor([float(index)]), "b": torch.tensor(index)}, torch.tensor(index)


def as_array(index: int) -> Any:
    return np.full(3, index, dtype=np.float32), float(index)


@pytest.mark.parametrize("make", [as_tensor, as_tuple, as_list, as_dict, as_array])
def test_every_kind_of_input_is_batched(make: Any) -> None:
    found = list(batches(Items(5, make), 2))
    assert [len(targets) for _, targets in found] == [2, 2, 1]
    assert torch.cat([targets for _, targets in found]).tolist() == [0, 1, 2, 3, 4]
    inputs = found[1][0]
    if isinstance(inputs, Tensor):
        assert inputs.shape[0] == 2
        assert inputs[:, 0].tolist() == [2.0, 3.0]
    elif isinstance(inputs, dict):
        assert inputs["a"].tolist() == [[2.0], [3.0]]
        assert inputs["b"].tolist() == [2, 3]
    else:
        assert isinstance(inputs, tuple)
        assert inputs[0].tolist() == [[2.0], [3.0]]
        assert inputs[1].tolist() == [2, 3]


@given(st.integers(1, 30), st.integers(1, 35), st.booleans(), st.none() | st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_every_item_comes_once_in_batches_of_the_size(size: int, batch: int, drop: bool, seed: int | None) -> None:
    def run(dataset: Any) -> list[list[int]]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        found = []
        for inputs, targets in batches(dataset, batch, generator=generator, drop_last=drop):
            assert inputs[:, 0].tolist() == targets.tolist(), "an input stays with its target"
            found.append(targets.tolist())
        return found

    whole = run(numbers(size))
    assert whole == run(Items(size, lambda index: (torch.tensor([float(index)]), index))), "the fast way is the same"
    flat = [number for part in whole for number in part]
    assert len(flat) == len(set(flat))
    assert all(len(part) == batch for part in whole[:-1])
    dropped = size % batch if drop and size >= batch else 0
    assert len(flat) == size - dropped
    if seed is None:
        assert flat == list(range(size - dropped))


def test_a_seed_gives_one_order_and_another_seed_another() -> None:
    def order(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [int(number) for _, targets in batches(numbers(50), 8, generator=generator) for number in targets]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == list(range(50))


def test_a_subclass_that_changes_its_items_is_asked_for_each() -> None:
    dataset = Doubled(*numbers().tensors)
    (inputs, _), *_ = batches(dataset, 5)
    assert isinstance(inputs, Tensor)
    assert inputs[:, 0].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_first_inputs_of_a_small_dataset() -> None:
    found = first_inputs(numbers(1), 4)
    assert isinstance(found, Tensor)
    assert found.shape == (1, 1)
    found = first_inputs(numbers(9), 4)
    assert isinstance(found, Tensor)
    assert found[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([torch.zeros(3)], "must be a pair .*got Tensor"),
        ([(torch.zeros(3), 0, 1)], "must be a pair"),
        ([(torch.zeros(3), 0), (torch.zeros(4), 0)], "cannot be stacked"),
        ([(torch.zeros(3), 0), (torch.zeros(3), None)], "cannot be stacked"),
        ([(torch.zeros(3), (0, 1))] * 2, "target of an item must be one tensor, array or number, got a tuple"),
        ([(torch.zeros(3), [torch.zeros(1), torch.ones(1)])], "got a list"),
        ([(torch.zeros(3), {"a": 0})] * 2, "got a dict"),
    ],
)
def test_items_that_make_no_batch_are_refused(items: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        stack(items)


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return a if b is None else a - b


def test_a_model_is_called_by_the_kind_of_its_input() -> None:
    one, two = torch.tensor([5.0]), torch.tensor([3.0])
    assert call(Sum(), one).item() == 5.0
    assert call(Sum(), (one, two)).item() == 2.0
    assert call(Sum(), {"b": one, "a": two}).item() == -2.0


def test_inputs_keep_their_kind_on_another_device() -> None:
    x = torch.zeros(2)
    assert to_device(x, "meta").device.type == "meta"  # type: ignore[union-attr]
    moved = to_device((x, x), "meta")
    assert isinstance(moved, tuple)
    assert [part.device.type for part in moved] == ["meta", "meta"]
    named = to_device({"a": x}, "meta")
    assert isinstance(named, dict)
    assert named["a"].device.type == "meta"


@pytest.mark.parametrize("which", ["train", "val", "test"])
def test_an_empty_split_is_named(which: str) -> None:
    splits: dict[str, Any] = {name: numbers() for name in ("train", "val", "test")}
    with pytest.raises(DataError, match=rf"Data\.{which} is empty"):
        Data(**{**splits, which: numbers(0)})


@pytest.mark.parametrize("value", [None, iter([]), 7])
def test_a_split_that_is_no_dataset_is_named(value: Any) -> None:
    with pytest.raises(DataError, match=r"Data\.val must be a map-style dataset .*TensorDataset"):
        Data(numbers(), value, numbers())


def test_one_object_for_two_splits_is_refused() -> None:
    split = numbers()
    for splits in ((split, split, numbers()), (split, numbers(), split), (numbers(), split, split)):
        with pytest.raises(DataError, match="the same dataset object"):
            Data(*splits)


def test_splits_come_in_order() -> None:
    assert list(Data(numbers(), numbers(), numbers()).splits()) == ["train", "val", "test"]
