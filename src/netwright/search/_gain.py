r"""What a candidate would add to the hypervolume, by the directions in which it is seen from the reference.

With ``r`` the reference and ``u`` a direction of the positive part of the unit sphere in ``m`` objectives, all to be
minimized, a point ``y`` reaches ``s_u(y) = min_i max(0, r_i - y_i) / u_i`` along ``u``, and

    hypervolume(S) = c_m * mean over u of max over y in S of s_u(y)^m,

``c_m`` the volume of that part of the unit ball. The same sum over a fixed set of directions serves any number of
objectives, takes no sorting, and shows at once what one more point adds.

Source: Zhang and Golovin, "Random Hypervolume Scalarizations for Provable Multi-Objective Black Box Optimization",
ICML 2020, arXiv 2006.04655.
"""

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, qmc

from netwright.core.front import non_dominated

__all__ = ["directions", "front_rows", "reach", "volume"]

Array: TypeAlias = NDArray[np.float64]


def directions(objectives: int, count: int = 128) -> Array:
    """Evenly spread directions ``(count, m)`` of the positive part of the unit sphere."""
    if objectives == 1:
        return np.ones((1, 1))
    if objectives == 2:
        angles = (np.arange(count) + 0.5) / count * math.pi / 2
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points = qmc.Halton(objectives, scramble=False).random(count + 1)[1:]
    normal = np.abs(norm.ppf(points))
    found: Array = normal / np.linalg.norm(normal, axis=1, keepdims=True)
    return np.maximum(found, 1e-9)


def reach(values: Array, reference: Array, along: Array) -> Array:
    """``s_u(y)^m`` for points ``(..., m)`` and directions ``(k, m)``, shape ``(..., k)``."""
    room = np.maximum(reference - values, 0.0)
    count = along.shape[1]
    far = room[..., :1] * (1.0 / along[:, 0])
    for place in range(1, count):
        np.minimum(far, room[..., place : place + 1] * (1.0 / along[:, place]), out=far)
    out: Array = far if count == 1 else far * far if count == 2 else far**count
    return out


def volume(reached: Array, objectives: int) -> float:
    """Hypervolume from the best reach along each direction, ``(k,)``."""
    ball = math.pi ** (objectives / 2) / math.gamma(objectives / 2 + 1)
    return float(ball / 2**objectives * reached.mean())


def front_rows(values: Array) -> NDArray[np.intp]:
    """Rows of the non-dominated points of ``(n, m)``; by blocks, so that many points cost little."""
    rows = np.arange(len(values))
    while len(rows) > 64:
        parts = np.array_split(rows, -(-len(rows) // 64))
        kept = np.concatenate([part[non_dominated(values[part])] for part in parts])
        if len(kept) > 0.9 * len(rows):
            rows = kept
            break
        rows = kept
    return rows[non_dominated(values[rows])]
