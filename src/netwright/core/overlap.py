"""Whether two splits share items."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from netwright.core.data import Data, Dataset
from netwright.core.errors import DataError

__all__ = ["check_overlap"]

_LOOKED_AT = 4000
_ACCIDENT = 0.05


def check_overlap(data: Data) -> None:
    r"""Refuse splits that share items, for then a score says how well the model remembers.

    Two splits that are ``Subset``\ s of the same dataset must not share a single index. Other splits are compared by
    the bytes of their inputs, up to 4000 of each. Real data hold a few accidental duplicates, and coarse data (a
    handful of categories) many: so two splits overlap when the share of the second's items that stand in the
    first, in excess of the share that stands twice within the first itself, is above 5%.

    Args:
        data: the three splits.

    Raises:
        DataError: two splits that overlap; the message names how many items and some of their indices.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> x, y = torch.arange(30.0)[:, None], torch.zeros(30)
        >>> check_overlap(Data(*(TensorDataset(x[part], y[part]) for part in (slice(10), slice(10, 20), slice(5, 30)))))
        Traceback (most recent call last):
        ...
        netwright.core.errors.DataError: Data.train and Data.test overlap: 5 of 25 items of test ...
    """
    splits = data.splits()
    for first, second in combinations(splits, 2):
        _check_indices(first, splits[first], second, splits[second])
    seen = {name: _look(split) for name, split in splits.items()}
    for first, second in combinations(splits, 2):
        _check_digests(first, seen[first], second, seen[second])


@dataclass(frozen=True)
class _Look:
    digests: dict[int, bytes]
    size: int

    @property
    def share(self) -> float:
        """Share of the split that was looked at."""
        return len(self.digests) / self.size

    @property
    def repeated(self) -> float:
        """Estimated share of items that stand twice in the split."""
        counts = Counter(self.digests.values())
        again = sum(count for count in counts.values() if count > 1)
        return again / len(self.digests) / self.share


def _check_indices(first: str, one: Dataset, second: str, other: Dataset) -> None:
    (base_one, indices_one), (base_other, indices_other) = _base(one), _base(other)
    if base_one is not base_other:
        return
    shared = sorted(set(indices_one) & set(indices_other))
    if shared:
        raise DataError(
            f"Data.{first} and Data.{second} overlap: both hold {len(shared)} items of the same dataset, such as its "
            f"indices {_few(shared)}. Split the data so that every item is in one split only."
        )


def _check_digests(first: str, one: _Look, second: str, other: _Look) -> None:
    known = {digest: index for index, digest in one.digests.items()}
    shared = [index for index, digest in other.digests.items() if digest in known]
    if len(shared) < min(2, len(other.digests)):
        return
    estimate = len(shared) / len(other.digests) / one.share
    if estimate - one.repeated > _ACCIDENT:
        pairs = [f"{second}[{index}] = {first}[{known[other.digests[index]]}]" for index in sorted(shared)[:3]]
        raise DataError(
            f"Data.{first} and Data.{second} overlap: {len(shared)} of {len(other.digests)} items of {second} stand "
            f"in {first} as well, such as {', '.join(pairs)}. Split the data so that every item is in one split only."
        )


def _base(dataset: Dataset) -> tuple[Any, range | list[int]]:
    if not isinstance(dataset, Subset):
        return dataset, range(len(dataset))
    base, inner = _base(dataset.dataset)  # type: ignore[arg-type]  # torch's Dataset declares no __len__
    return base, [inner[int(index)] for index in dataset.indices]


def _look(dataset: Dataset) -> _Look:
    size = len(dataset)
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(1))[:_LOOKED_AT].tolist()
    return _Look({index: _digest(dataset[index][0]) for index in chosen}, size)


def _digest(value: Any) -> bytes:
    total = hashlib.blake2b(digest_size=16)
    for leaf in _parts(value):
        tensor = torch.as_tensor(leaf).detach().cpu().contiguous().reshape(-1)
        total.update(str(tensor.dtype).encode())
        total.update(tensor.view(torch.uint8).numpy().tobytes())
    return total.digest()


def _parts(value: Any) -> list[Tensor | Any]:
    if isinstance(value, Mapping):
        return [leaf for key in sorted(value, key=str) for leaf in _parts(value[key])]
    if isinstance(value, tuple | list):
        return [leaf for part in value for leaf in _parts(part)]
    return [value]


def _few(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:5]))
