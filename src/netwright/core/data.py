"""Three datasets, and how they become batches.

A dataset is map-style (``len`` and integer indexing) and yields ``(input, target)``. An input
is a tensor, a tuple of tensors (called as ``model(*input)``) or a dict of tensors (called as
``model(**input)``); a target is a tensor or a number.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from netwright.core.errors import DataError

__all__ = ["Batch", "Data", "Dataset", "Inputs", "batches", "beside", "call", "first_inputs", "stack", "to_device"]

Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a model is called with: a tensor, a tuple (``model(*inputs)``) or a mapping (``model(**inputs)``)."""
Batch: TypeAlias = tuple[Inputs, Tensor]
"""Inputs and targets of several items."""


@runtime_checkable
class Dataset(Protocol):
    """A map-style dataset of ``(input, target)`` pairs."""

    def __len__(self) -> int:
        """Number of items."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """The pair ``(input, target)`` at ``index``."""
        ...


@dataclass(frozen=True)
class Data:
    """The three splits of a task.

    Training sees ``train``; every choice (search, early stopping, calibration) sees ``train``
    and ``val``; ``test`` is read once, for the numbers that are reported.

    Args:
        train: dataset to fit on.
        val: dataset to choose on.
        test: dataset to report on.

    Raises:
        DataError: a split that is empty, not map-style, or the same object as another split.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> split = lambda n: TensorDataset(torch.zeros(n, 4), torch.zeros(n).long())
        >>> len(Data(split(8), split(4), split(2)).val)
        4
    """

    train: Dataset
    val: Dataset
    test: Dataset

    def __post_init__(self) -> None:
        for name, split in self.splits().items():
            if not isinstance(split, Dataset):
                raise DataError(
                    f"Data.{name} must be a map-style dataset with __len__ and __getitem__, got "
                    f"{type(split).__name__}. Wrap tensors as torch.utils.data.TensorDataset(x, y)."
                )
            if len(split) == 0:
                raise DataError(f"Data.{name} is empty. Every split needs at least one (input, target) pair.")
        if len({id(split) for split in self.splits().values()}) < 3:
            raise DataError(
                "Two of train, val and test are the same dataset object, so choices would be made on the "
                "data that is reported. Split the data in three."
            )

    def splits(self) -> dict[str, Dataset]:
        """The splits by name, in the order train, val, test."""
        return {"train": self.train, "val": self.val, "test": self.test}


def stack(items: Sequence[Any]) -> Batch:
    """Collate items into one batch.

    Raises:
        DataError: items whose shapes differ, that are not ``(input, target)`` pairs, or that have several targets.
    """
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"A dataset item must be a pair (input, target), got {type(item).__name__}.")
    try:
        inputs, targets = default_collate(list(items))
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"Dataset items cannot be stacked into a batch: {str(error).splitlines()[0]}") from error
    if not isinstance(targets, Tensor):
        raise DataError(
            f"The target of an item must be one tensor, array or number, got a {type(items[0][1]).__name__}. Stack or "
            "concatenate several in the dataset, and take them apart in the loss."
        )
    return _as_inputs(inputs), targets


def batches(
    dataset: Dataset,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    drop_last: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Yield ``(inputs, targets)`` batches; shuffled when a ``generator`` is given.

    A ``TensorDataset`` is indexed as a whole, which is many times faster than item by item.

    Args:
        dataset: where items come from.
        batch_size: items in a batch; the last one may be smaller.
        generator: source of the shuffle; ``None`` keeps the dataset's order.
        drop_last: leave out a smaller last batch (unless it is the only one).
        device: where the tensors are put.

    Example:
        >>> data = TensorDataset(torch.arange(5.0)[:, None], torch.arange(5))
        >>> [len(targets) for _, targets in batches(data, 2)]
        [2, 2, 1]
    """
    size = len(dataset)
    order = torch.arange(size) if generator is None else torch.randperm(size, generator=generator)
    stop = size - size % batch_size if drop_last and size >= batch_size else size
    for start in range(0, stop, batch_size):
        index = order[start : min(start + batch_size, stop)]
        if type(dataset) is TensorDataset and len(dataset.tensors) == 2:  # a subclass may change its items
            batch: Batch = (dataset.tensors[0][index], dataset.tensors[1][index])
        else:
            batch = stack([dataset[int(i)] for i in index])
        yield to_device(batch[0], device), batch[1].to(device)


def first_inputs(dataset: Dataset, count: int = 2) -> Inputs:
    """The inputs of the first ``count`` items (fewer where the dataset is smaller), as one batch."""
    return next(batches(dataset, min(count, len(dataset))))[0]


def to_device(inputs: Inputs, device: torch.device | str) -> Inputs:
    """Inputs with every tensor on ``device``, also those in nested tuples and dicts."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: to_device(value, device) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(to_device(value, device) for value in inputs)
    return inputs


def beside(inputs: Inputs, model: nn.Module) -> Inputs:
    """Inputs on the device of the model's first tensor; as they are for a model without tensors."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return inputs if first is None else to_device(inputs, first.device)


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """``model`` applied to ``inputs`` of any of the three kinds."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs)


def _as_inputs(inputs: Any) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs)
    raise DataError(f"A model input must be a tensor, a tuple or a dict of tensors, got {type(inputs).__name__}.")
