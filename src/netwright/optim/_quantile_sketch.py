"""Quantiles of a stream of numbers in bounded memory, with a rank error that is certain."""

import math
from bisect import bisect_left, insort
from typing import Any

import numpy as np
import torch

from netwright.core.errors import SettingError, StateDictError

__all__ = ["QuantileSketch"]


class QuantileSketch:
    r"""Holds a stream of numbers: all of them up to ``capacity``, a sorted selection with weights beyond.

    Level :math:`h = 0, 1, \dots` holds at most :math:`k` numbers that stand for :math:`2^h` each. A full level is
    sorted and every other number moves up, by turns those of even and of odd position. One such halving shifts the
    rank of any number by at most :math:`2^h`, upwards by turns and downwards, so that after :math:`n` numbers

    .. math:: |\text{rank error}| \le \tfrac{n}{2k} \log_2 \tfrac{2n}{k} + \tfrac{n}{k},

    nothing while :math:`n \le k`. :attr:`rank_error` is the bound that the halvings done so far add up to. Nothing is
    drawn at random. Two sketches merge into one whose bounds add up.

    An insertion costs one binary search and a shift of at most :math:`k` numbers, a quantile
    :math:`O(\log^2 k)`, and every :math:`k` insertions one sort of everything held, :math:`O(k \log_2(n/k))` numbers.

    Args:
        capacity: :math:`k`, an even number, at least 2.

    Example:
        >>> sketch = QuantileSketch(capacity=8)
        >>> for value in [5.0, 1.0, 3.0]:
        ...     sketch.add(value)
        >>> sketch.quantile(0.25), sketch.rank_error
        (2.0, 0)

    Source: G. S. Manku, S. Rajagopalan, B. G. Lindsay, "Approximate medians and other quantiles in one pass and with
    limited memory", 1998; mergeable as in P. K. Agarwal et al., "Mergeable summaries", 2013.
    """

    def __init__(self, capacity: int = 4096) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 2 or capacity % 2:
            raise SettingError(f"QuantileSketch: capacity must be an even number of at least 2, got {capacity!r}.")
        self.capacity = capacity
        self.count = 0
        self._shifted = [0, 0]  # how far halvings may have moved ranks up, and down
        self._odd = [False]  # for each level: which half moves up next
        self._recent: list[float] = []  # level 0, sorted
        self._upper: list[list[float]] = []  # the levels above, each sorted
        self._merge_levels()

    @property
    def rank_error(self) -> int:
        """By how many ranks a quantile may be off: nothing up to ``capacity`` numbers."""
        return max(self._shifted)

    def add(self, value: float) -> None:
        """Take in one finite number."""
        if len(self._recent) >= self.capacity:
            self._halve(0)
            self._merge_levels()
        insort(self._recent, value)
        self.count += 1

    def merge(self, other: "QuantileSketch") -> None:
        """Take in everything that another sketch has seen."""
        levels = [list(level) for level in (other._recent, *other._upper)]
        for height, level in enumerate(levels):
            for start in range(0, len(level), self.capacity):
                self._put(height, level[start : start + self.capacity])
        self.count += other.count
        self._shifted = [mine + theirs for mine, theirs in zip(self._shifted, other._shifted, strict=True)]
        self._merge_levels()

    def quantile(self, share: float) -> float:
        """The number at ``share`` of the way from the least to the greatest, between two neighbours by interpolation.

        Args:
            share: in [0, 1]. While all numbers are held, the answer is that of ``numpy.quantile``.
        """
        if self.count == 0:
            raise SettingError("QuantileSketch: nothing was added yet, so there is no quantile.")
        position = share * (self.count - 1)
        below = math.floor(position)
        low = self._at(below)
        if below == position:
            return low
        high = self._at(below + 1)
        return low + (high - low) * (position - below)

    def _at(self, rank: int) -> float:
        """The number that has ``rank`` numbers before it, each held one counted as often as its weight says."""
        if not self._upper:
            return self._recent[rank]
        values, ends, recent = self._values, self._ends, self._recent
        low, high = 0, len(values)  # the first held number that ends, among all, after ``rank``
        while low < high:
            middle = (low + high) // 2
            if ends[middle] + bisect_left(recent, values[middle]) > rank:
                high = middle
            else:
                low = middle + 1
        position = rank - (ends[low - 1] if low else 0)
        if low == len(values) or (position < len(recent) and recent[position] < values[low]):
            return recent[position]
        return values[low]

    def _halve(self, height: int) -> None:
        """Move half of a full level up; an odd one keeps its greatest number."""
        level = self._level(height)
        even = len(level) - len(level) % 2
        odd = self._odd[height]
        chosen, rest = level[int(odd) : even : 2], level[even:]
        level[:] = rest
        self._odd[height] = not odd
        self._shifted[int(odd)] += 2**height
        self._put(height + 1, chosen)

    def _put(self, height: int, values: list[float]) -> None:
        """Add numbers to a level, making room first."""
        if len(self._level(height)) + len(values) > self.capacity:
            self._halve(height)
        level = self._level(height)
        level.extend(values)
        level.sort()

    def _level(self, height: int) -> list[float]:
        while len(self._upper) < height:
            self._upper.append([])
            self._odd.append(False)
        return self._upper[height - 1] if height else self._recent

    def _merge_levels(self) -> None:
        """Sort the levels above the lowest into one, with the sum of weights up to and including each number."""
        levels = [np.asarray(level, dtype=np.float64) for level in self._upper]
        values = np.concatenate([np.zeros(0), *levels])
        weights = np.concatenate(
            [np.zeros(0, np.int64), *(np.full(len(level), 2 ** (i + 1)) for i, level in enumerate(levels))]
        )
        order = np.argsort(values, kind="stable")
        self._values: list[float] = values[order].tolist()
        self._ends: list[int] = np.cumsum(weights[order]).tolist()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on, as tensors and numbers."""
        return {
            "capacity": self.capacity,
            "count": self.count,
            "shifted": list(self._shifted),
            "odd": list(self._odd),
            "levels": [torch.tensor(level, dtype=torch.float64) for level in (self._recent, *self._upper)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; its capacity is taken over.

        Raises:
            StateDictError: something else.
        """
        missing = sorted({"capacity", "count", "shifted", "odd", "levels"} - set(state))
        if missing:
            raise StateDictError(f"This state was not saved by QuantileSketch: it has no {', '.join(missing)}.")
        self.capacity, self.count = int(state["capacity"]), int(state["count"])
        self._shifted, self._odd = [int(n) for n in state["shifted"]], [bool(flag) for flag in state["odd"]]
        levels = [level.tolist() for level in state["levels"]]
        self._recent, self._upper = levels[0], levels[1:]
        self._merge_levels()
