"""Design spaces compared by the distribution of their networks' errors."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from netwright.core.errors import SettingError

__all__ = ["DesignSpaceEDF", "design_space_edf"]

Array: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class DesignSpaceEDF:
    """The empirical distribution of the errors of networks drawn from a design space; see :func:`design_space_edf`.

    Attributes:
        errors: ``(n,)``, in the order in which they were given.
    """

    errors: Array
    _sorted: Array = field(repr=False)

    def __call__(self, error: ArrayLike) -> Array:
        """``F(e)``, the share of networks with an error below ``e``; of the shape of ``error``."""
        found: Array = np.searchsorted(self._sorted, np.asarray(error, dtype=float), side="left") / len(self._sorted)
        return found

    @property
    def mean(self) -> float:
        """The mean error, which is the area above ``F``."""
        return float(self._sorted.mean())

    def area(self, limit: float) -> float:
        """The area under ``F`` up to the error ``limit``: the mean of ``max(limit - e_i, 0)``."""
        return float(np.maximum(limit - self._sorted, 0.0).mean())

    def dominates(self, other: "DesignSpaceEDF") -> bool:
        """Whether ``F(e) >= F_other(e)`` at every error ``e``, and ``>`` at one at least."""
        steps = np.union1d(self._sorted, other._sorted)
        edges = np.append(steps, np.nextafter(steps[-1], np.inf))  # F changes just above an error
        ahead = self(edges) - other(edges)
        return bool((ahead >= 0).all() and (ahead > 0).any())

    def best_range(
        self, values: Sequence[float], *, share: float = 0.25, confidence: float = 0.95
    ) -> tuple[float, float]:
        """Where a property of the networks lies in good ones: an interval for its value in the best of a subset.

        The paper draws ``k = share * n`` networks with replacement, keeps the value of the best, and repeats that.
        The best is the network of rank ``r`` (1 for the smallest error) with probability
        ``((n - r + 1) / n)^k - ((n - r) / n)^k``, so the interval needs no drawing.

        Args:
            values: of the property, ``(n,)``, in the order of the errors.
            share: part of the networks in a subset.
            confidence: probability of the interval; half of the rest lies on either side.

        Raises:
            SettingError: another number of values than of errors, values that are not finite, or a share or confidence
                out of its range.
        """
        found, count = np.asarray(values, dtype=float), len(self.errors)
        if found.shape != self.errors.shape or not np.isfinite(found).all():
            raise SettingError(f"values must be {count} finite numbers, one for each error, got shape {found.shape}.")
        if not (0 < share <= 1 and 0 < confidence < 1):
            raise SettingError(f"share must be in (0, 1] and confidence in (0, 1), got {share} and {confidence}.")
        drawn = max(1, round(share * count))
        left = (np.arange(count, -1, -1) / count) ** drawn
        chance = np.empty(count)
        chance[np.argsort(self.errors, kind="stable")] = left[:-1] - left[1:]
        order = np.argsort(found, kind="stable")
        reached = np.cumsum(chance[order])
        tail = (1 - confidence) / 2
        ends = np.searchsorted(reached, [tail + 1e-12, 1 - tail - 1e-12])
        low, high = found[order][np.minimum(ends, count - 1)]
        return float(low), float(high)


def design_space_edf(errors: ArrayLike) -> DesignSpaceEDF:
    """Compare design spaces, not networks: the distribution of the errors of a sample.

    Reach for it to ask whether a restriction of a search space is a good one: sample as many networks from each of
    two spaces, of like cost, train all alike and briefly, and see whose distribution lies above. One best network
    tells little about a space, the distribution of a hundred tells much.

    ``F(e) = (1 / n) * sum over i of [e_i < e]``,

    ``e_i`` the error of network ``i`` of ``n``.

    Args:
        errors: ``(n,)``, lower is better, in any unit.

    Returns:
        ``F`` as a callable, with ``mean``, ``area(limit)``, ``dominates(other)`` and ``best_range(values)``.

    Raises:
        SettingError: no errors, another shape, or errors that are not finite.

    Example:
        >>> regular, free = design_space_edf([0.1, 0.2, 0.2, 0.4]), design_space_edf([0.2, 0.3, 0.5, 0.6])
        >>> regular.dominates(free), float(regular(0.3)), round(regular.mean, 3)
        (True, 0.75, 0.225)
        >>> free.best_range([10.0, 20.0, 30.0, 40.0])
        (10.0, 40.0)

    Source: paper 279: Radosavovic, Kosaraju, Girshick, He and Dollár, "Designing Network Design Spaces", 2020, arXiv
        2003.13678.

    Differs: the interval for the best value of a property is the limit of infinitely many of the paper's draws.

    Cost: time ``O(n log n)`` to make and ``O(log n)`` to evaluate at one error.
    """
    found = np.array(errors, dtype=float)
    if found.ndim != 1 or len(found) == 0:
        raise SettingError(f"errors must be a list of at least one number, got shape {found.shape}.")
    if not np.isfinite(found).all():
        raise SettingError(
            "errors must be finite. Leave out networks that failed, or count them with the error of chance."
        )
    return DesignSpaceEDF(found, np.sort(found))
