"""Fronts against brute force and Monte Carlo."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from netwright.core.front import Front, hypervolume, knee, non_dominated

_POINTS = arrays(float, st.tuples(st.integers(1, 12), st.integers(1, 4)), elements=st.integers(0, 6).map(float))


@given(_POINTS)
@settings(max_examples=150, deadline=None)
def test_non_dominated_equals_the_definition(points: np.ndarray) -> None:
    keep = non_dominated(points)
    for i, point in enumerate(points):
        dominated = any((other <= point).all() and (other < point).any() for other in points)
        twin_before = any((points[j] == point).all() for j in range(i))
        assert keep[i] == (not dominated and not twin_before)


@given(_POINTS)
@settings(max_examples=100, deadline=None)
def test_hypervolume_counts_the_dominated_cells(points: np.ndarray) -> None:
    """Integer points: the volume is the number of unit cells that some point dominates."""
    size = 6
    axes = np.meshgrid(*[np.arange(size)] * points.shape[1], indexing="ij")
    cells = np.stack([axis.ravel() for axis in axes], axis=1)
    covered = (points[:, None, :] <= cells[None]).all(axis=2).any(axis=0)
    assert hypervolume(points, [size] * points.shape[1]) == pytest.approx(covered.sum())


def test_hypervolume_by_hand() -> None:
    assert hypervolume([[0.5, 0.25]], [1, 1]) == pytest.approx(0.375)
    assert hypervolume([[2, 2]], [1, 1]) == 0.0
    assert hypervolume(np.empty((0, 2)), [1, 1]) == 0.0
    assert hypervolume([[0, 0, 0]], [1, 2, 3]) == pytest.approx(6.0)


def test_adding_a_point_never_lowers_the_hypervolume() -> None:
    rng = np.random.default_rng(0)
    points = rng.random((20, 3))
    volumes = [hypervolume(points[:n], [1, 1, 1]) for n in range(1, 21)]
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(volumes))


def test_knee_prefers_balance_whatever_the_scale() -> None:
    points = np.array([[0, 1000], [100, 100], [1000, 0]], dtype=float)
    assert knee(points) == 1
    assert knee(points * [1, 1e-6]) == 1
    with pytest.raises(ValueError, match="at least one point"):
        knee(np.empty((0, 2)))


def test_front_keeps_objects_in_order() -> None:
    front = Front(["bb", "a", "ccc", "dd"], [len, lambda word: -ord(word[0])])
    assert list(front) == ["a", "dd"]
    assert len(front) == 2


@pytest.mark.parametrize("bad", [[1.0, 2.0], [[np.nan, 1.0]]])
def test_bad_points_are_refused(bad: list) -> None:
    with pytest.raises(ValueError, match="Points must"):
        non_dominated(bad)
