"""What a search teaches: how good its predictors were, and which decisions matter."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau

from netwright.core.errors import SettingError
from netwright.search._encoding import Encoding
from netwright.search.predictors import TreeEnsemble, stack
from netwright.search.result import SearchResult
from netwright.search.space import SearchSpace

__all__ = ["PredictorQuality", "importance", "predictor_quality"]

Array: TypeAlias = NDArray[np.float64]
_LEAST = 8  # measured candidates below which nothing is said
_LATER = 4  # candidates below which a rank correlation says nothing
_REPEATS = 10


@dataclass(frozen=True)
class PredictorQuality:
    """How well a predictor of one objective ranked candidates that it had not seen.

    Attributes:
        objective: which one.
        seen: how many of the measured candidates the predictor learned from, in the order in which they were measured.
        kendall_tau: rank correlation of prediction and measurement over all later ones, in [-1, 1].
        predictor: the one to which cross-validation gave the largest weight.
    """

    objective: str
    seen: int
    kendall_tau: float
    predictor: str


def predictor_quality(
    result: SearchResult, space: SearchSpace, *, points: int = 6, seed: int = 0
) -> list[PredictorQuality]:
    r"""Fit predictors on the first candidates of a search and rank the later ones.

    .. math:: \tau = \frac{c - d}{\sqrt{(c + d + t_p)(c + d + t_m)}}

    with :math:`c` concordant and :math:`d` discordant pairs, :math:`t_p` and :math:`t_m` those tied in prediction or
    measurement alone. Later candidates of a search are better than earlier ones, which makes this harder than
    cross-validation: it is what a sampler needs.

    Args:
        result: of :func:`netwright.search.run`.
        space: that was searched.
        points: how many prefixes, equally spaced.
        seed: source of the predictors' randomness.

    Returns:
        For every objective and prefix one entry, whether candidates meet the constraints or not; none where fewer than
        eight were measured, after a prefix that leaves fewer than four, or where all later measurements or all
        predictions of them are equal, for then they have no rank.

    Example:
        >>> from optuna.distributions import IntDistribution
        >>> from netwright.search import run
        >>> space = SearchSpace({"width": IntDistribution(1, 64)})
        >>> found = run(space, lambda params: {"cost": 3.0 * params["width"]}, {"cost": "minimize"}, evaluations=30)
        >>> predictor_quality(found, space)[-1].kendall_tau > 0.9
        True

    Cost: a fit of the predictors for every objective and prefix.
    """
    if points < 1:
        raise SettingError(f"points must be at least 1, got {points}.")
    genes, values = _seen(result, space)
    found: list[PredictorQuality] = []
    if len(genes) < _LEAST:
        return found
    inputs = Encoding(space).features(genes)
    sizes = sorted({max(_LEAST // 2, round(share * len(inputs))) for share in np.linspace(0.15, 0.85, points)})
    sizes = [size for size in sizes if len(inputs) - size >= _LATER]
    for column, name in enumerate(result.objectives):
        for size in sizes:
            fitted = stack(inputs[:size], values[:size, column], seed=seed)
            predicted = fitted.predict(inputs[size:])[0]
            tau = float(kendalltau(predicted, values[size:, column]).statistic)
            if np.isfinite(tau):
                found.append(PredictorQuality(name, size, tau, fitted.name))
    return found


def importance(result: SearchResult, space: SearchSpace, *, seed: int = 0) -> dict[str, dict[str, float]]:
    r"""How much each decision matters to each objective, by permutation.

    .. math:: I_j = \frac{1}{\operatorname{Var}(y)} \Big( \frac1R \sum_{r=1}^R
              \frac1n \sum_i (y_i - f(x_i^{(j, r)}))^2 - \frac1n \sum_i (y_i - f(x_i))^2 \Big)

    with :math:`f` a tree ensemble fitted to all measured candidates and :math:`x^{(j, r)}` the candidates with decision
    :math:`j` shuffled among them: 0 for a decision that the objective does not depend on. Where a shuffle makes a
    candidate break a rule, both sums leave that candidate out.

    Args:
        result: of :func:`netwright.search.run`.
        space: that was searched.
        seed: source of the ensemble's and the shuffles' randomness.

    Returns:
        For every objective the decisions, the most important first; nothing where fewer than eight candidates were
        measured. Those that break a constraint count: what was measured of them is as true.

    Example:
        >>> from optuna.distributions import IntDistribution
        >>> from netwright.search import run
        >>> space = SearchSpace({"width": IntDistribution(1, 64), "seed": IntDistribution(0, 9)})
        >>> found = run(space, lambda params: {"cost": 3.0 * params["width"]}, {"cost": "minimize"}, evaluations=30)
        >>> next(iter(importance(found, space)["cost"]))
        'width'

    Cost: a fit for every objective, and ten predictions of all candidates for each of its decisions.
    """
    genes, values = _seen(result, space)
    if len(genes) < _LEAST:
        return {}
    encoding = Encoding(space)
    inputs = encoding.features(genes)
    found = {}
    for column, objective in enumerate(result.objectives):
        rng = np.random.default_rng([seed, column])
        y = values[:, column]
        trees = TreeEnsemble(seed=seed).fit(inputs, y)
        base, spread = (trees.predict(inputs)[0] - y) ** 2, float(y.var())
        worth = {}
        for place, name in enumerate(encoding.names):
            rises: list[float] = []
            for _ in range(_REPEATS):
                mixed = genes.copy()
                mixed[:, place] = rng.permutation(mixed[:, place])
                kept = encoding.valid(mixed)
                if kept.any():
                    rises += [*((trees.predict(encoding.features(mixed[kept]))[0] - y[kept]) ** 2 - base[kept])]
            worth[name] = float(np.mean(rises)) / spread if rises and spread > 0 else 0.0
        found[objective] = dict(sorted(worth.items(), key=lambda item: -item[1]))
    return found


def _seen(result: SearchResult, space: SearchSpace) -> tuple[Array, Array]:
    """Genes ``(n, d)`` and objectives ``(n, m)``, to be minimized, of the measured candidates."""
    encoding = Encoding(space)
    signs = np.array([-1.0 if way == "maximize" else 1.0 for way in result.objectives.values()])
    measured = [(entry.params, entry.metrics) for entry in result.evaluations if entry.metrics is not None]
    genes = encoding.rows([params for params, _ in measured])
    values = np.array([[metrics[name] for name in result.objectives] for _, metrics in measured], dtype=float)
    return genes.reshape(len(measured), len(encoding.names)), values.reshape(len(measured), len(signs)) * signs
