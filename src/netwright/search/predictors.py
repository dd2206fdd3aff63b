"""Predictors of an objective: tree ensemble, ridge and support vector regression, chosen by cross-validation.

Each tells a mean and how far off it may be. Observations are hundreds, not millions, so each costs far less than the
evaluation that it saves.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.stats import norm, rankdata
from sklearn.svm import SVR
from sklearn.tree import ExtraTreeRegressor

from netwright.core.errors import SettingError
from netwright.core.randomness import isolated

__all__ = ["PREDICTORS", "BayesianRidge", "Chosen", "Predictor", "SupportVectors", "TreeEnsemble", "choose"]

Array: TypeAlias = NDArray[np.float64]
_KERNEL_ROWS = 400  # a kernel method costs the square of its rows
_JUDGED_ROWS = 400  # cross-validation looks at no more
_FOLDS = 3


class Predictor(Protocol):
    """Learns numbers from rows of features."""

    def fit(self, inputs: Array, targets: Array) -> Self:
        """Learn from ``inputs (n, d)`` and ``targets (n,)``."""
        ...

    def predict(self, inputs: Array) -> tuple[Array, Array]:
        """Mean and standard deviation, each ``(n,)``, of rows ``(n, d)``."""
        ...


@dataclass
class TreeEnsemble:
    """Extremely randomized trees; their disagreement is the uncertainty.

    Args:
        trees: how many.
        share: part of the features that a split chooses from.
        seed: source of randomness.

    Source: Geurts, Ernst and Wehenkel, "Extremely randomized trees", Machine Learning 63, 2006.

    Cost: time ``O(trees d n log n)`` to fit, ``O(trees log n)`` a row to predict.
    """

    trees: int = 48
    share: float = 0.5
    seed: int = 0

    def fit(self, inputs: Array, targets: Array) -> Self:
        """Learn from ``inputs (n, d)`` and ``targets (n,)``."""
        seeds = np.random.default_rng(self.seed).integers(2**31, size=self.trees)
        rows = np.ascontiguousarray(inputs, dtype=np.float32)
        self._trees = [
            ExtraTreeRegressor(max_features=self.share, random_state=int(seed))
            .fit(rows, targets, check_input=False)
            .tree_
            for seed in seeds
        ]
        return self

    def predict(self, inputs: Array) -> tuple[Array, Array]:
        """Mean and standard deviation over the trees."""
        rows = np.ascontiguousarray(inputs, dtype=np.float32)
        answers = np.stack([tree.predict(rows)[:, 0] for tree in self._trees])
        return answers.mean(0), answers.std(0)


@dataclass
class BayesianRidge:
    r"""Linear regression on the features with a Gaussian prior on its weights.

    ``w = (XᵀX + λI)⁻¹ Xᵀy``, variance ``s²(1 + xᵀ(XᵀX + λI)⁻¹x)`` with standardized ``X``, ``y`` less its mean, and
    ``s²`` the mean squared residual over the degrees of freedom left. ``λ`` minimizes the generalized
    cross-validation error ``n |y - Xw|² / (n - tr H)²``.

    Cost: time ``O(n d min(n, d))`` to fit, ``O(d min(n, d))`` a row to predict.
    """

    strengths: tuple[float, ...] = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)

    def fit(self, inputs: Array, targets: Array) -> Self:
        """Learn from ``inputs (n, d)`` and ``targets (n,)``."""
        self._centre, spread = inputs.mean(0), inputs.std(0)
        self._scale = np.where(spread > 1e-12, spread, 1.0)
        self._level = targets.mean()
        rows, count = (inputs - self._centre) / self._scale, len(targets)
        left, values, self._basis = linalg.svd(rows, full_matrices=False)
        seen = left.T @ (targets - self._level)
        rest = float(((targets - self._level) ** 2).sum() - (seen**2).sum())

        def judged(strength: float) -> tuple[float, float, float]:
            kept = values**2 / (values**2 + strength)
            squares = max(rest, 0.0) + float((((1 - kept) * seen) ** 2).sum())
            free = max(count - 1 - float(kept.sum()), 1e-3 * count)
            return count * squares / free**2, strength, squares / free

        _, strength, self._noise = min(map(judged, self.strengths))
        self._weights = self._basis.T @ (values / (values**2 + strength) * seen)
        self._shrunk = 1.0 / (values**2 + strength)
        self._strength = strength
        return self

    def predict(self, inputs: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of a new observation."""
        rows = (inputs - self._centre) / self._scale
        inside = rows @ self._basis.T
        outside = np.maximum((rows**2).sum(1) - (inside**2).sum(1), 0.0)
        doubt = (inside**2 * self._shrunk).sum(1) + outside / self._strength
        return self._level + rows @ self._weights, np.sqrt(self._noise * (1 + doubt))


@dataclass
class SupportVectors:
    """Support vector regression with a Gaussian kernel, on at most 400 rows; five of them on subsets disagree.

    Args:
        penalty: weight of errors against flatness, for standardized targets.
        seed: source of the subsets.

    Cost: time and memory bounded by the 400 rows, whatever the number of observations.
    """

    penalty: float = 10.0
    seed: int = 0

    def fit(self, inputs: Array, targets: Array) -> Self:
        """Learn from ``inputs (n, d)`` and ``targets (n,)``."""
        rng = np.random.default_rng(self.seed)
        self._centre, spread = inputs.mean(0), inputs.std(0)
        self._scale = np.where(spread > 1e-12, spread, 1.0) * math.sqrt(max(1, int((spread > 1e-12).sum())))
        self._level, self._width = float(targets.mean()), float(targets.std()) or 1.0
        rows, wanted = (inputs - self._centre) / self._scale, (targets - self._level) / self._width
        take = min(max(4 * len(rows) // 5, 1), _KERNEL_ROWS)
        parts = [rng.permutation(len(rows))[:take] for _ in range(5)]
        with isolated(self.seed):  # scikit-learn draws a seed for libsvm from NumPy's global generator
            self._models = [
                SVR(C=self.penalty, gamma=1.0, epsilon=0.05).fit(rows[part], wanted[part]) for part in parts
            ]
        return self

    def predict(self, inputs: Array) -> tuple[Array, Array]:
        """Mean and standard deviation over the five."""
        rows = (inputs - self._centre) / self._scale
        answers = np.stack([model.predict(rows) for model in self._models])
        return self._level + self._width * answers.mean(0), self._width * answers.std(0)


PREDICTORS: Mapping[str, Callable[[int], Predictor]] = {
    "trees": lambda seed: TreeEnsemble(seed=seed),
    "ridge": lambda seed: BayesianRidge(),
    "svr": lambda seed: SupportVectors(seed=seed),
}
"""What is chosen from: a maker for each name, called with a seed."""


@dataclass(frozen=True)
class Chosen:
    """The predictor that cross-validation preferred, with honest uncertainty.

    Attributes:
        name: which one.
        predictor: fitted on everything.
        stretch: factor by which its own standard deviation fell short on held-out observations.
        errors: root mean squared error on held-out observations by name.
        rank_correlation: Spearman's, of the chosen one on held-out observations.
    """

    name: str
    predictor: Predictor
    stretch: float
    noise: float
    errors: Mapping[str, float]
    rank_correlation: float

    def predict(self, inputs: Array) -> tuple[Array, Array]:
        """Mean and standard deviation, each ``(n,)``."""
        mean, own = self.predictor.predict(inputs)
        return mean, np.sqrt((self.stretch * own) ** 2 + self.noise**2)


def choose(
    inputs: Array, targets: Array, *, seed: int = 0, among: Mapping[str, Callable[[int], Predictor]] = PREDICTORS
) -> Chosen:
    """Fit the predictor that does best on held-out observations.

    Three folds over at most 400 observations. The error of a fold is the squared difference; the smallest sum wins.
    Then the uncertainty is made honest: with ``e`` the held-out residuals and ``s`` the predictor's own standard
    deviations, the reported variance is ``a² s² + b²``, where ``a`` and ``b`` are fitted so that ``e²`` has that mean.

    Args:
        inputs: ``(n, d)``, at least two rows.
        targets: ``(n,)``, finite.
        seed: source of folds and of the predictors' randomness.
        among: what to choose from.

    Raises:
        SettingError: fewer than two rows, shapes that do not fit, or targets that are not finite.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> inputs = rng.normal(size=(60, 3))
        >>> found = choose(inputs, inputs @ [1.0, -2.0, 0.5])
        >>> found.name, round(float(found.predict(np.eye(3))[0][1]), 3)
        ('ridge', -2.0)

    Cost: four fits of each predictor; ``O(n log n)`` in the number of observations.
    """
    if inputs.ndim != 2 or targets.shape != inputs.shape[:1] or len(targets) < 2:
        raise SettingError(
            f"Predictors need inputs (n, d) and targets (n,), n >= 2; got {inputs.shape}, {targets.shape}."
        )
    if not (np.isfinite(targets).all() and np.isfinite(inputs).all()):
        raise SettingError("Predictors learn from finite numbers only. Leave failed evaluations out.")
    rng = np.random.default_rng([seed, len(targets)])
    rows = rng.permutation(len(targets))[:_JUDGED_ROWS]
    held = {name: _held_out(make(seed), inputs[rows], targets[rows]) for name, make in among.items()}
    errors = {name: float(np.sqrt(np.mean((mean - targets[rows]) ** 2))) for name, (mean, _) in held.items()}
    name = min(errors, key=errors.__getitem__)
    mean, own = held[name]
    stretch, noise = _calibrated(targets[rows] - mean, own)
    predictor = among[name](seed).fit(inputs, targets)
    return Chosen(name, predictor, stretch, noise, errors, _spearman(mean, targets[rows]))


def _held_out(predictor: Predictor, inputs: Array, targets: Array) -> tuple[Array, Array]:
    mean, spread = np.empty(len(targets)), np.empty(len(targets))
    folds = np.arange(len(targets)) % _FOLDS
    for fold in range(_FOLDS):
        test, train = folds == fold, folds != fold
        if test.any() and train.any():
            mean[test], spread[test] = predictor.fit(inputs[train], targets[train]).predict(inputs[test])
    return mean, spread


def _calibrated(residuals: Array, own: Array) -> tuple[float, float]:
    """The ``a`` and ``b`` of ``a² own² + b²`` under which the residuals are likeliest, out of a small grid."""
    size = float(np.sqrt(np.mean(residuals**2)))
    typical = float(np.sqrt(np.mean(own**2)))
    if size == 0.0 or typical == 0.0:
        return 0.0, size
    best = (np.inf, 0.0, size)
    for share in (0.0, 0.25, 0.5, 0.75, 0.95):  # of the variance that the predictor's own uncertainty explains
        stretch, noise = size * share**0.5 / typical, size * (1 - share) ** 0.5
        spread = np.sqrt((stretch * own) ** 2 + noise**2)
        best = min(best, (-float(norm.logpdf(residuals, scale=spread).sum()), stretch, noise))
    return best[1], best[2]


def _spearman(first: Array, second: Array) -> float:
    a, b = rankdata(first), rankdata(second)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
