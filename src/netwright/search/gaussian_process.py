"""A Gaussian process on features whose settings come from a small grid, so that a fit takes milliseconds."""

import math
from typing import Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

__all__ = ["ROWS", "GaussianProcess", "kept_rows"]

Array: TypeAlias = NDArray[np.float64]
ROWS = 400
"""A fit costs the cube of its observations; it looks at no more."""
_LENGTHS = (0.5, 1.0, 2.0, 4.0)
_NOISES = (1e-3, 1e-2, 1e-1, 0.5)


def kept_rows(targets: Array, count: int = ROWS) -> NDArray[np.intp]:
    """The best half and the newest of the others, ``count`` rows in their order; all where there are no more.

    Example:
        >>> kept_rows(np.array([0.0, 9.0, 1.0, 8.0, 7.0, 6.0]), 4)
        array([0, 2, 4, 5])
    """
    if len(targets) <= count:
        return np.arange(len(targets))
    best = np.argsort(targets, kind="stable")[: count // 2]
    rest = np.setdiff1d(np.arange(len(targets)), best)
    return np.sort(np.concatenate([best, rest[len(rest) - (count - len(best)) :]]))


class GaussianProcess:
    r"""A Gaussian process with a Matérn kernel on standardized features.

    .. math:: k(x, x') = v \left( 1 + \rho + \tfrac13 \rho^2 \right) e^{-\rho}, \qquad
              \rho = \frac{\sqrt 5 \, |x - x'|}{\ell \sqrt f}

    with ``f`` the number of features that vary; observations have covariance ``K + v r I`` and a constant mean, theirs.
    The length ``ℓ`` and the share of noise ``r`` are those of a grid (0.5 to 4, and 0.001 to 0.5) with the largest
    marginal likelihood, in which ``v = yᵀ (K/v + r I)⁻¹ y / n`` has its best value; each length takes one
    eigendecomposition, and every ``r`` comes from it.

    Attributes:
        length: ``ℓ`` after a fit.
        noise: ``r`` after a fit.

    Example:
        >>> inputs = np.linspace(0, 6, 30)[:, None]
        >>> mean, deviation = GaussianProcess().fit(inputs, np.sin(inputs[:, 0])).predict(np.array([[1.0], [60.0]]))
        >>> round(float(mean[0]), 2), bool(deviation[0] < 0.1 < deviation[1])
        (0.84, True)

    Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning", MIT Press 2006, chapters 2, 4 and 5.

    Cost: ``O(n^3)`` for ``n`` observations, at most 400: beyond, the best half and the newest others are kept. A row
        takes ``O(n (n + f))`` to predict.
    """

    def fit(self, inputs: Array, targets: Array) -> Self:
        """Learn from ``inputs (n, f)`` and ``targets (n,)``, of which low ones are good."""
        kept = kept_rows(targets)
        inputs, targets = inputs[kept], targets[kept]
        self._centre, spread = inputs.mean(0), inputs.std(0)
        varying = spread > 1e-12
        self._scale = np.where(varying, spread, 1.0) * math.sqrt(max(1, int(varying.sum())))
        self._rows = (inputs - self._centre) / self._scale
        self._level, self._width = float(targets.mean()), float(targets.std()) or 1.0
        wanted, far = (targets - self._level) / self._width, _distances(self._rows, self._rows)
        best = -math.inf
        for length in _LENGTHS:
            values, vectors = linalg.eigh(_matern(far / length))
            seen = vectors.T @ wanted
            for noise in _NOISES:
                spread = np.maximum(values, 0.0) + noise
                size = max(float((seen**2 / spread).mean()), 1e-12)
                likelihood = -0.5 * (len(wanted) * math.log(size) + float(np.log(spread).sum()))
                if likelihood > best:
                    best, self.length, self.noise, self._size = likelihood, length, noise, size
                    self._weights, self._root = vectors @ (seen / spread), vectors / np.sqrt(spread)
        return self

    def predict(self, inputs: Array) -> tuple[Array, Array]:
        """Mean and standard deviation, without the noise of an observation, each ``(m,)``, of rows ``(m, f)``."""
        cross = _matern(_distances((inputs - self._centre) / self._scale, self._rows) / self.length)
        doubt = np.maximum(1.0 - ((cross @ self._root) ** 2).sum(1), 1e-9)
        return self._level + self._width * (cross @ self._weights), self._width * np.sqrt(self._size * doubt)


def _distances(first: Array, second: Array) -> Array:
    """Euclidean distances ``(n, m)`` between rows."""
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None, :] - 2.0 * first @ second.T
    far: Array = np.sqrt(np.maximum(squares, 0.0))
    return far


def _matern(far: Array) -> Array:
    """The kernel with ``v = 1`` at distances in lengths."""
    scaled = math.sqrt(5.0) * far
    kernel: Array = (1.0 + scaled + scaled**2 / 3.0) * np.exp(-scaled)
    return kernel
