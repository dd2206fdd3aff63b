"""A Gaussian process on the subtrees of labelled graphs."""

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from netwright.search.gaussian_process import kept_rows
from netwright.search.graphs import Graph

__all__ = ["WLProcess", "subtrees"]

Array: TypeAlias = NDArray[np.float64]
_NOISES = tuple(10.0**exponent for exponent in np.arange(-4.0, 1.1, 0.5))


def subtrees(graph: Graph, depth: int) -> list[Counter[str]]:
    """Weisfeiler-Lehman histograms: how often each subtree occurs, for every depth up to ``depth``.

    A node's subtree of depth 0 is its label; of depth ``h + 1``, its label with the sorted subtrees of depth ``h`` of
    the nodes that lead to it. Written out, ``conv(input,pool)``.

    Example:
        >>> graph = Graph(("input", "conv", "output"), ((0, 1), (1, 2)))
        >>> sorted(subtrees(graph, 1)[1])
        ['conv(input)', 'input', 'output(conv)']
    """
    before: list[list[int]] = [[] for _ in graph.labels]
    for start, end in graph.links:
        before[end].append(start)
    names = list(graph.labels)
    found = [Counter(names)]
    for _ in range(depth):
        inner = [[names[start] for start in sources] for sources in before]
        names = [
            f"{label}({','.join(sorted(parts))})" if parts else label
            for label, parts in zip(graph.labels, inner, strict=True)
        ]
        found.append(Counter(names))
    return found


class WLProcess:
    r"""A Gaussian process on normalized Weisfeiler-Lehman histograms.

    With ``f(G)`` the counts of all subtrees of depth ``0 .. h`` of a graph, the kernel is ``k(G, G') = f·f' / (|f|
    |f'|)``, and the observations have covariance ``v (K + r I)``. Depth ``h`` and noise ratio ``r`` maximize the
    marginal likelihood, in which ``v`` and a constant mean have their best values; every ``r`` comes from one
    eigendecomposition of ``K``.

    Args:
        vocabulary: for each depth that is tried, the subtrees with a column of their own.

    Cost: ``O(h n^3)`` for ``n`` observations, at most 400: beyond, the best half and the newest half are kept.
    """

    def __init__(self, vocabulary: Sequence[Sequence[str]]) -> None:
        self._widths = [len(words) + 1 for words in vocabulary]  # one more for what has no column

    def fit(self, inputs: Array, targets: Array) -> "WLProcess":
        """Learn from histograms ``(n, f)`` as :meth:`WLSampler.histograms` makes them, and ``targets (n,)``."""
        kept = kept_rows(targets)
        inputs, targets = inputs[kept], targets[kept]
        self._level, self._width = float(targets.mean()), float(targets.std()) or 1.0
        wanted = (targets - self._level) / self._width
        fits = [self._likelihood(inputs, wanted, depth) for depth in range(len(self._widths))]
        _, self.depth, self.noise = max(fits)
        self._rows = self._normal(inputs)[0]
        values, vectors = linalg.eigh(self._rows @ self._rows.T)
        inverse = 1.0 / (np.maximum(values, 0.0) + self.noise)
        self._weights = vectors @ (inverse * (vectors.T @ wanted))
        self._scale = max(float(wanted @ self._weights) / len(wanted), 1e-12)
        self._root = vectors * np.sqrt(inverse)
        return self

    def predict(self, inputs: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of a new observation."""
        rows, whole = self._normal(inputs)
        cross = rows @ self._rows.T
        own = (whole > 0).astype(float)
        doubt = np.maximum(own + self.noise - ((cross @ self._root) ** 2).sum(1), 1e-9)
        return self._level + self._width * (cross @ self._weights), self._width * np.sqrt(self._scale * doubt)

    def gradient(self, inputs: Array) -> tuple[Array, Array]:
        """How the mean changes with one more of each subtree, at each row: mean and deviation, ``(n, f)``.

        ``d mean / d f_j = (w_j - (u·w) u_j) / |f|`` with ``u = f / |f|`` and ``w = sum_i a_i u_i``, ``a`` the process's
        weights; the derivative of a Gaussian process is Gaussian, and so has a deviation.
        """
        rows, whole = self._normal(inputs)
        size = np.maximum(whole, 1e-12)[:, None]
        pull = self._rows.T @ self._weights
        mean = (pull[None, :] - (rows @ pull)[:, None] * rows) / size
        explained = self._rows.T @ self._root
        inner = rows @ explained
        shrunk = (explained**2).sum(1) - 2 * rows * (inner @ explained.T) + rows**2 * (inner**2).sum(1)[:, None]
        doubt = np.maximum(1.0 - rows**2 - shrunk, 0.0)
        return self._width * mean, self._width * np.sqrt(self._scale * doubt) / size

    def _cut(self, depth: int) -> int:
        return sum(self._widths[: depth + 1])

    def _normal(self, inputs: Array) -> tuple[Array, Array]:
        """Rows of length one over the columns with a name, and the lengths, unnamed subtrees included."""
        kept = inputs[:, : self._cut(self.depth)].copy()
        squares = np.zeros(len(inputs))
        for end in np.cumsum(self._widths[: self.depth + 1]):
            squares += kept[:, end - 1]  # holds the squared counts of subtrees without a column
            kept[:, end - 1] = 0.0
        length = np.sqrt((kept**2).sum(1) + squares)
        return kept / np.maximum(length, 1e-12)[:, None], length

    def _likelihood(self, inputs: Array, wanted: Array, depth: int) -> tuple[float, int, float]:
        self.depth = depth
        rows = self._normal(inputs)[0]
        values, vectors = linalg.eigh(rows @ rows.T)
        values, seen = np.maximum(values, 0.0), (vectors.T @ wanted) ** 2
        count = len(wanted)

        def judged(noise: float) -> float:
            spread = values + noise
            scale = max(float((seen / spread).sum()) / count, 1e-12)
            return float(-0.5 * (count * np.log(scale) + np.log(spread).sum()))

        best = max(_NOISES, key=judged)
        return judged(best), depth, best
