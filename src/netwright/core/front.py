"""Pareto fronts: the non-dominated set, its hypervolume, its knee.

Every function works on an array of shape ``(n, d)``, one row a point, every column to be
minimized; a score that is better when higher enters with its sign turned.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Front", "hypervolume", "knee", "non_dominated"]

P = TypeVar("P")


def non_dominated(values: ArrayLike) -> NDArray[np.bool_]:
    """Which rows no other row dominates.

    Row ``a`` dominates row ``b`` when ``a <= b`` in every column and ``a < b`` in at least one. Of
    identical rows the first is kept. Cost ``O(n^2 d)`` in time, ``O(n d)`` in memory.

    Args:
        values: shape ``(n, d)``, to be minimized.

    Returns:
        Shape ``(n,)``, True where the row belongs to the front.

    Example:
        >>> non_dominated([[1, 3], [2, 2], [3, 3], [2, 2]]).tolist()
        [True, True, False, False]
    """
    points = _matrix(values)
    keep = np.ones(len(points), dtype=bool)
    for row, point in enumerate(points):
        no_worse = (points <= point).all(axis=1)
        better = no_worse & (points < point).any(axis=1)
        twin = no_worse & (points == point).all(axis=1)
        keep[row] = not better.any() and not twin[:row].any()
    return keep


def hypervolume(values: ArrayLike, reference: ArrayLike) -> float:
    r"""Volume that the points dominate, up to a reference point.

    ``HV(S, r) = vol( union over s in S of [s, r] )``: the Lebesgue measure of all that is worse than
    some point and better than ``r`` (Zitzler and Thiele, 1998). Sweeps along the last column and
    recurses on the others: exact, ``O(n log n)`` for two columns, ``O(n^(d-1))`` beyond.

    Args:
        values: shape ``(n, d)``, to be minimized. Points not better than ``reference`` count nothing.
        reference: shape ``(d,)``.

    Example:
        >>> hypervolume([[1, 2], [2, 1]], [3, 3])
        3.0
    """
    points, limit = _matrix(values), np.asarray(reference, dtype=float)
    points = points[(points < limit).all(axis=1)]
    if len(points) == 0:
        return 0.0
    points = points[non_dominated(points)]
    if points.shape[1] == 1:
        return float(limit[0] - points.min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    edges = np.append(points[:, -1], limit[-1])
    if points.shape[1] == 2:
        best = np.minimum.accumulate(points[:, 0])
        return float(((limit[0] - best) * np.diff(edges)).sum())
    slabs = np.diff(edges)
    return float(
        sum(thick * hypervolume(points[: k + 1, :-1], limit[:-1]) for k, thick in enumerate(slabs) if thick > 0)
    )


def knee(values: ArrayLike) -> int:
    """Index of the point nearest to the ideal one, every column scaled to [0, 1] over the points given.

    Args:
        values: shape ``(n, d)``, to be minimized; at least one row.

    Raises:
        ValueError: no points.

    Example:
        >>> knee([[0, 10], [1, 1], [10, 0]])
        1
    """
    points = _matrix(values)
    if len(points) == 0:
        raise ValueError("A knee needs at least one point.")
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - low) / np.where(high > low, high - low, 1.0)
    return int(np.argmin((scaled**2).sum(axis=1)))


@dataclass(frozen=True)
class Front(Generic[P]):
    """The non-dominated set of some points.

    Args:
        points: any objects.
        objectives: functions of a point, all to be minimized.

    Example:
        >>> front = Front([(1, 3), (2, 2), (3, 3)], [lambda p: p[0], lambda p: p[1]])
        >>> list(front)
        [(1, 3), (2, 2)]
        >>> front.hypervolume([4, 4])
        5.0
    """

    points: Sequence[P]
    objectives: Sequence[Callable[[P], float]]

    def __post_init__(self) -> None:
        kept = [
            point for point, keep in zip(self.points, non_dominated(self._values(self.points)), strict=True) if keep
        ]
        kept.sort(key=lambda point: tuple(objective(point) for objective in self.objectives))
        object.__setattr__(self, "points", tuple(kept))

    def _values(self, points: Sequence[P]) -> NDArray[np.float64]:
        rows = [[float(objective(point)) for objective in self.objectives] for point in points]
        return np.asarray(rows, dtype=float).reshape(len(points), len(self.objectives))

    def __iter__(self) -> Iterator[P]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def hypervolume(self, reference: ArrayLike) -> float:
        """Hypervolume of the front up to ``reference`` (see :func:`hypervolume`)."""
        return hypervolume(self._values(self.points), reference)

    def knee(self) -> P:
        """The point nearest to the ideal one (see :func:`knee`)."""
        return self.points[knee(self._values(self.points))]


def _matrix(values: ArrayLike) -> NDArray[np.float64]:
    points = np.asarray(values, dtype=float)
    if points.ndim != 2:
        raise ValueError(f"Points must come as an array of shape (n, d), got shape {points.shape}.")
    if np.isnan(points).any():
        raise ValueError("Points must not contain NaN.")
    return points
