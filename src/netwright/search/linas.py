"""LINAS: evolution on predictors, one for each objective, that learn from everything measured."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from netwright.core.errors import SettingError
from netwright.search._encoding import Encoding
from netwright.search._model_sampler import SPARE, ModelSampler
from netwright.search._proposer import Measured, Settings, goals, minimized, propose
from netwright.search.predictors import Stack, stack
from netwright.search.space import SearchSpace

__all__ = ["LINASSampler"]

Array: TypeAlias = NDArray[np.float64]


class LINASSampler(ModelSampler):
    r"""Finds a front in few evaluations: predictors learn what was measured, evolution searches on the predictors.

    Reach for it whenever an evaluation costs a second or more, with one objective or several, with hard constraints or
    without. It proposes nothing twice (but for trials that also decide what is not in its space), takes what is being
    evaluated elsewhere into account, and derives everything from the trials of the study, so that a study resumes, and
    several processes share it, without more ado.

    After ``start`` random candidates, and again after every ``batch`` complete ones:

    1. Each objective ``y`` is seen through ``z = (y - m) / w`` up to the median ``m`` of the random start, and
       ``z = log(1 + (y - m) / w)`` beyond, ``w`` the distance from ``m`` to the best of the start. How bad a bad
       candidate is takes no part of a predictor's attention; nor does it with constraints, which are seen through their
       logarithm beyond three times their median size.
    2. A predictor ``p(z | x)`` with mean and deviation for each objective and each constraint is fitted to all that was
       measured; cross-validation weighs a tree ensemble, ridge regression and a Gaussian process, and makes the
       deviation honest (:func:`~netwright.search.predictors.stack`).
    3. Evolution (SBX and polynomial mutation of ordered decisions, uniform crossover and replacement of categorical
       ones) runs ``generations`` of ``population`` candidates. Its fitness is the expected gain of hypervolume,

       ``a(x) = P(feasible | x) * mean over draws d of [HV(F + y_d(x)) - HV(F)]``,

       ``F`` the measured front, ``y_d(x)`` the objectives drawn from the predictors: a candidate with uncertain
       prospects is worth trying. A ``P(feasible | x)`` below 0.05 counts as 0.
    4. Of all candidates that evolution met the batch is taken one after the other, each the one with the largest ``a``
       given that, draw by draw, those taken before it have joined ``F``: near-twins gain little after the first.

    Args:
        space: what may be proposed, with its rules, conditions and features; None for the decisions that all trials
            share.
        start: random candidates before the first predictors.
        batch: complete trials between two fits.
        population: candidates of a generation.
        generations: of each inner search.
        draws: ``d`` above.
        reference: where the hypervolume ends, a value for each objective in the study's own sign; None for ``m + 2 w``.
        ideal: values beyond which nothing more is gained, in the study's own sign, infinite (of either sign) where
            there is no such value (an accuracy cannot surpass 1); None for all infinite.
        seed: source of randomness.

    Raises:
        SettingError: a setting out of its range, a reference that is not finite, an ideal that is NaN, or either with
            another number of values than there are objectives.

    Example:
        >>> import optuna
        >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
        >>> study = optuna.create_study(sampler=LINASSampler(start=8, batch=4, seed=0))
        >>> study.optimize(lambda trial: (trial.suggest_int("depth", 0, 60) - 41) ** 2, n_trials=24)
        >>> study.best_params
        {'depth': 41}

    Source: papers 2 and 289: Sarah, Cummings, Sridhar, Sundaresan, Szankin, Webb and Munoz, "A Hardware-Aware System
        for Accelerating Deep Neural Network Optimization", 2022, arXiv 2202.12954; Cummings, Sridhar, Sarah and
        Szankin, "A Hardware-Aware Framework for Accelerating Neural Architecture Search Across Modalities", 2022, arXiv
        2205.10358.

    Differs: the papers' inner search is NSGA-II on predicted means, and its last population is measured as a whole.
        Here the fitness is the expected gain of hypervolume under calibrated uncertainty, nothing is measured twice, a
        batch is diverse by construction, predictors are a weighted mean of trees, ridge and a Gaussian process instead
        of ridge or support vectors alone, objectives are warped, and constraints have predictors of their own. What a
        run returns was measured.

    Cost: with ``n`` observations and ``f`` features a fit takes ``O(f n log n)``, the inner search
        ``O(population * generations * (trees log n + draws * directions))``; both once a batch. About 0.1 s a
        suggestion at 1,000 observations.
    """

    def __init__(
        self,
        space: SearchSpace | None = None,
        *,
        start: int = 20,
        batch: int = 10,
        population: int = 200,
        generations: int = 10,
        draws: int = 16,
        reference: Sequence[float] | None = None,
        ideal: Sequence[float] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(space, start, batch, seed)
        for name, value in (("population", population), ("generations", generations), ("draws", draws)):
            if value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}.")
        self._reference = goals("reference", reference)
        self._ideal = goals("ideal", ideal, finite=False)
        self._settings = population, generations, draws

    def _propose(self, encoding: Encoding, known: Measured, avoid: set[bytes]) -> Array:
        population, generations, draws = self._settings
        reference, ideal = (
            minimized(name, given, known) for name, given in (("reference", self._reference), ("ideal", self._ideal))
        )
        settings = Settings(
            SPARE * self._size(len(known.genes)), population, generations, draws, reference, self._start, ideal
        )
        seed = self._seed % 2**32

        def fit(features: Array, targets: Array) -> Stack:
            return stack(features, targets, seed=seed)

        return propose(encoding, known, avoid, settings, seed, look=encoding.features, fit=fit)
