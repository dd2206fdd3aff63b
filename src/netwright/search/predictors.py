"""Predictors of an objective: tree ensemble, ridge regression and Gaussian process, weighed by cross-validation.

Each tells a mean and how far off it may be. Observations are hundreds, not millions, so each costs far less than the
evaluation that it saves.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from scipy.optimize import nnls
from scipy.stats import norm, rankdata
from sklearn.tree import ExtraTreeRegressor

from netwright.core.errors import SettingError
from netwright.search.gaussian_process import GaussianProcess

__all__ = ["PREDICTORS", "BayesianRidge", "Predictor", "Stack", "TreeEnsemble", "stack"]

Array: TypeAlias = NDArray[np.float64]
_JUDGED_ROWS = 400  # cross-validation looks at no more
_FOLDS = 3
_LEAST = 0.01  # of a weight


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


PREDICTORS: Mapping[str, Callable[[int], Predictor]] = {
    "trees": lambda seed: TreeEnsemble(seed=seed),
    "ridge": lambda seed: BayesianRidge(),
    "process": lambda seed: GaussianProcess(),
}
"""What is weighed: a maker for each name, called with a seed."""


@dataclass(frozen=True)
class Stack:
    """Predictors whose weights held-out observations told, with honest uncertainty.

    Attributes:
        name: the predictor of the largest weight.
        weights: by name, at least 0, together 1.
        predictors: those with a weight, fitted on everything.
        stretch: factor by which their own standard deviation fell short on held-out observations.
        noise: standard deviation that theirs does not explain.
        errors: root mean squared error on held-out observations by name.
        rank_correlation: Spearman's, of the weighted mean on held-out observations.
    """

    name: str
    weights: Mapping[str, float]
    predictors: Mapping[str, Predictor]
    stretch: float
    noise: float
    errors: Mapping[str, float]
    rank_correlation: float

    def predict(self, inputs: Array) -> tuple[Array, Array]:
        """Mean and standard deviation, each ``(n,)``."""
        found = [predictor.predict(inputs) for predictor in self.predictors.values()]
        mean, own = _mixed(found, [self.weights[name] for name in self.predictors])
        return mean, np.sqrt((self.stretch * own) ** 2 + self.noise**2)


def stack(
    inputs: Array, targets: Array, *, seed: int = 0, among: Mapping[str, Callable[[int], Predictor]] = PREDICTORS
) -> Stack:
    r"""Fit predictors and weigh them by what they get right on held-out observations.

    Three folds over at most 400 observations give each predictor ``m`` held-out means ``p_m`` and deviations ``s_m``.
    The weights are

    .. math:: w = \arg\min_{w \ge 0,\, \sum_m w_m = 1} \Big\| y - \sum_m w_m p_m \Big\|^2, \qquad
              s^2 = \sum_m w_m \big( s_m^2 + (p_m - \bar p)^2 \big), \quad \bar p = \sum_m w_m p_m

    and ``s`` is the deviation of the mixture: where predictors disagree, none of them is sure. Then it is made honest:
    with ``e`` the held-out residuals the reported variance is ``a² s² + b²``, where ``a`` and ``b`` are fitted so that
    ``e²`` has that mean. A predictor of a weight below 0.01 is left out.

    Args:
        inputs: ``(n, d)``, at least two rows.
        targets: ``(n,)``, finite.
        seed: source of folds and of the predictors' randomness.
        among: what to weigh.

    Raises:
        SettingError: fewer than two rows, shapes that do not fit, or targets that are not finite.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> inputs = rng.normal(size=(60, 3))
        >>> found = stack(inputs, inputs @ [1.0, -2.0, 0.5])
        >>> found.name, round(float(found.predict(np.eye(3))[0][1]), 3)
        ('ridge', -2.0)

    Source: Breiman, "Stacked regressions", Machine Learning 24, 1996.

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
    residuals = np.stack([targets[rows] - mean for mean, _ in held.values()], 1)
    weights = dict(zip(among, _weights(residuals), strict=True))
    mean, own = _mixed(list(held.values()), list(weights.values()))
    stretch, noise = _calibrated(targets[rows] - mean, own)
    predictors = {name: among[name](seed).fit(inputs, targets) for name, weight in weights.items() if weight > 0}
    errors = dict(zip(among, map(float, np.sqrt((residuals**2).mean(0))), strict=True))
    name = max(weights, key=weights.__getitem__)
    return Stack(name, weights, predictors, stretch, noise, errors, _spearman(mean, targets[rows]))


def _weights(residuals: Array) -> list[float]:
    """Those of a simplex that make the residuals ``(n, m)`` of the mixture smallest.

    Along each direction ``u`` of the simplex ``|R t u|² + (t - 1)²`` has its least value ``q / (1 + q)``, ``q = |R
    u|²``, so that the non-negative least squares solution points to the smallest ``q``.
    """
    size = float(np.sqrt((residuals**2).mean())) or 1.0
    rows = np.concatenate([residuals / (size * math.sqrt(len(residuals))), np.ones((1, residuals.shape[1]))])
    found = nnls(rows, np.append(np.zeros(len(residuals)), 1.0))[0]
    found = np.where(found < _LEAST * found.sum(), 0.0, found)
    return [float(weight) for weight in found / found.sum()]


def _mixed(found: Sequence[tuple[Array, Array]], weights: Sequence[float]) -> tuple[Array, Array]:
    """Mean and standard deviation of a mixture of means and deviations, each ``(n,)``."""
    means, deviations = (np.stack(parts) for parts in zip(*found, strict=True))
    share = np.array(weights)[:, None]
    mean = (share * means).sum(0)
    return mean, np.sqrt((share * (deviations**2 + (means - mean) ** 2)).sum(0))


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
