"""APQ: architecture and bits searched jointly, by a predictor that learned from full precision first."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from optuna import Study

from netwright.core.errors import SettingError
from netwright.search._apq_predictor import Member, TransferredPredictor, pretrain, random_start, without_bits
from netwright.search._encoding import Encoding
from netwright.search._model_sampler import SPARE, ModelSampler
from netwright.search._proposer import Measured, Settings, goals, minimized, propose
from netwright.search._scale import Scale
from netwright.search.predictors import Stack, stack
from netwright.search.space import Params, SearchSpace, SpaceError

__all__ = ["APQSampler"]

Array: TypeAlias = NDArray[np.float64]
_PRETRAINING = 300
_RATE = 1e-2


class APQSampler(ModelSampler):
    r"""Searches architecture, channels and bits together, and needs few quantized evaluations.

    Reach for it where a quantized score is dear (rounding, calibration, perhaps a fine-tuning each) and one in full
    precision cheap: sub-networks of a supernet, or what an earlier search without bits measured.

    The score of a candidate with architecture features ``a`` and bits ``q`` is predicted by

    ``f(a, q) = W3 relu(W2 relu(W_a a + W_q q + b1) + b2) + b3``.

    1. An ensemble of ``members`` such networks, without ``q``, learns the scores of ``full_precision``.
    2. Whenever ``batch`` more quantized trials are complete, it goes on from these weights and learns them: ``steps``
       of Adam on the squared error, plus 0.01 times the squared distance from the start.
    3. It does so twice: from ``W_q = 0``, which trusts full precision until taught otherwise, and from a random
       ``W_q``, which learns faster where bits decide. The second is taken where its error on held-out trials is lower
       by a standard deviation, ``1 / sqrt(2 n)`` of the first's for ``n`` trials. Cross-validation makes the deviation
       honest (:func:`~netwright.search.predictors.stack`). Without ``full_precision`` all weights start at random.
    4. Evolution proposes as in :class:`~netwright.search.LINASSampler`; further objectives and constraints have the
       predictors that they have there.

    Args:
        space: architecture and bits; None for the decisions that all trials share, which excludes ``full_precision``.
        bits: names of the decisions about bits; a feature of the space's own counts among them.
        full_precision: decisions (without bits) and score of candidates in full precision, at least two; the score has
            the study's sign.
        objective: which of the study's objectives the scores are about.
        start: random candidates before the first predictors.
        batch: complete trials between two fits.
        population: candidates of a generation.
        generations: of each inner search.
        draws: of the objectives, to judge a candidate.
        members: networks of the ensemble.
        hidden: units of each of their two hidden layers.
        steps: of Adam on quantized scores.
        reference: where the hypervolume ends, a value for each objective in the study's own sign; None as in LINAS.
        seed: source of randomness.

    Raises:
        SpaceError: bits that are no decision of the space, or full-precision candidates that are not of it.
        SettingError: a setting out of its range, fewer than two scores or one that is not finite, a reference that is
            not finite, or an objective or a reference that does not fit the study's objectives.

    Example:
        >>> import optuna
        >>> from optuna.distributions import CategoricalDistribution, IntDistribution
        >>> optuna.logging.set_verbosity(optuna.logging.ERROR)
        >>> space = SearchSpace({"width": IntDistribution(1, 32), "bits": CategoricalDistribution((4, 8))})
        >>> cheap = [({"width": width}, -abs(width - 21.0)) for width in range(1, 33, 2)]
        >>> sizes = {"members": 2, "hidden": 16, "steps": 50, "population": 50, "generations": 2}
        >>> sampler = APQSampler(space, ["bits"], cheap, start=4, batch=4, seed=0, **sizes)
        >>> study = optuna.create_study(sampler=sampler, direction="maximize")
        >>> def quantized(trial):
        ...     width, bits = trial.suggest_int("width", 1, 32), trial.suggest_categorical("bits", (4, 8))
        ...     return -abs(width - 21.0) - 8 / bits
        >>> study.optimize(quantized, n_trials=12)
        >>> abs(study.best_params["width"] - 21) <= 1, study.best_params["bits"]
        (True, 8)

    Source: paper 50: Wang, Wang, Cai, Lin, Liu, Wang, Lin and Han, "APQ: Joint Search for Network Architecture, Pruning
        and Quantization Policy", 2020, arXiv 2006.08509.

    Differs: the paper trains one network, on a fixed sample of quantized ones, then evolves on its predictions alone;
        here quantized candidates are chosen as the search goes, by the expected gain under an ensemble's uncertainty.
        The weights of the bits join before the first rectifier; the start from zero, the choice between the two
        and the pull towards the start are additions. Latency is an objective or a constraint like any other.

    Cost: with ``n`` trials and ``h`` hidden units a fit takes ``O(steps * members * min(n, 128) * h^2)``, eight times
        over, for beyond 128 trials take turns; the inner search is LINAS'. About a second a fit.
    """

    def __init__(
        self,
        space: SearchSpace | None = None,
        bits: Sequence[str] = (),
        full_precision: Sequence[tuple[Params, float]] = (),
        *,
        objective: int = 0,
        start: int = 10,
        batch: int = 10,
        population: int = 200,
        generations: int = 10,
        draws: int = 16,
        members: int = 5,
        hidden: int = 64,
        steps: int = 200,
        reference: Sequence[float] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(space, start, batch, seed)
        sizes = {"population": population, "generations": generations, "draws": draws}
        for name, value in {**sizes, "members": members, "hidden": hidden, "steps": steps}.items():
            if value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}.")
        if objective < 0:
            raise SettingError(f"objective must be at least 0, got {objective}.")
        self._bits = (bits,) if isinstance(bits, str) else tuple(bits)
        if space is not None:
            for name in self._bits:
                if name not in space.decisions:
                    raise SpaceError(
                        f"bits names {name!r}, which is no decision. Known are {', '.join(space.decisions)}."
                    )
        self._full_precision = _checked(space, self._bits, full_precision) if full_precision else []
        self._objective = objective
        self._reference = goals("reference", reference)
        self._settings = population, generations, draws
        self._network = members, hidden, steps

    def _forget(self) -> None:
        super()._forget()
        self._learned: tuple[object, Member] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_learned"}

    def predict(self, study: Study, candidates: Sequence[Params]) -> Array:
        """Quantized scores ``(n,)`` that the predictor expects of candidates, in the study's own unit and sign.

        Args:
            study: what it learns from, beside full precision.
            candidates: with every decision that counts.

        Raises:
            SettingError: fewer than two complete trials.
            SpaceError: a candidate that is not of the space; the decision to blame is named.
        """
        trials = study.get_trials(deepcopy=False)
        encoding = self._encoding(self.infer_relative_search_space(study, trials[-1])) if trials else None
        used = [trial for trial in trials if self._usable(trial, encoding)] if encoding is not None else []
        if encoding is None or len(used) < 2:
            raise SettingError(f"predict needs a study with at least two complete trials, got {len(used)}.")
        for params in candidates:
            shared = {name: value for name, value in params.items() if name in encoding.space.decisions}
            encoding.space.check(shared if self._space is None else params)
        known, place = self._measured(study, used, encoding), self._objective
        scale, sign = Scale(known.values, self._start), float(known.signs[self._objective])
        model = self._fit(encoding, encoding.features(known.genes), scale.warp(known.values)[:, place], sign)
        warped, _ = model.predict(encoding.features(encoding.rows(candidates)))
        expected: Array = sign * (scale.middle[place] + scale.width[place] * scale.unwarp(warped))
        return expected

    def _propose(self, encoding: Encoding, known: Measured, avoid: set[bytes]) -> Array:
        population, generations, draws = self._settings
        objectives = known.values.shape[1]
        if self._objective >= objectives:
            raise SettingError(f"objective is {self._objective}, but the study has {objectives}, counted from 0.")
        reference = minimized("reference", self._reference, known)
        settings = Settings(
            SPARE * self._size(len(known.genes)), population, generations, draws, reference, self._start
        )
        seed, turn = self._seed % 2**32, itertools.count()

        def fit(features: Array, targets: Array) -> Stack:
            if next(turn) == self._objective:  # objectives come first, in their order
                return self._fit(encoding, features, targets, float(known.signs[self._objective]))
            return stack(features, targets, seed=seed)

        return propose(encoding, known, avoid, settings, seed, look=encoding.features, fit=fit)

    def _fit(self, encoding: Encoding, features: Array, targets: Array, sign: float) -> Stack:
        """The predictor of quantized scores, ``targets`` to be minimized and warped."""
        members, hidden, steps = self._network
        seed, bits = self._seed % 2**32, self._columns(encoding, features.shape[1])
        fresh = random_start(int((~bits).sum()), int(bits.sum()), members, hidden, seed)

        def judged(name: str, begin: Member) -> Stack:
            return stack(
                features, targets, seed=seed, among={name: lambda _: TransferredPredictor(begin, bits, steps, _RATE)}
            )

        if not (self._full_precision and encoding.space is self._space):
            return judged("scratch", fresh)
        learned = self._pretrained(encoding, fresh, bits, sign)
        kept, mixed = judged("bits from zero", without_bits(learned)), judged("bits at random", learned)
        errors = {**kept.errors, **mixed.errors}
        return replace(mixed if _surpasses(mixed, kept, len(targets)) else kept, errors=errors)

    def _pretrained(self, encoding: Encoding, fresh: Member, bits: NDArray[np.bool_], sign: float) -> Member:
        """The ensemble after full precision; remembered, since it is the same at every fit."""
        mark = (self._seed, sign)
        if self._learned is None or self._learned[0] != mark:
            rows = encoding.features(encoding.rows([params for params, _ in self._full_precision]))
            scores = sign * np.array([[score] for _, score in self._full_precision])
            targets = Scale(scores, len(scores)).warp(scores)[:, 0]
            self._learned = mark, pretrain(fresh, rows[:, ~bits], targets, _PRETRAINING, _RATE)
        return self._learned[1]

    def _columns(self, encoding: Encoding, count: int) -> NDArray[np.bool_]:
        """Which columns of the features are about bits, ``(count,)``; those of the space's own features come last."""
        owners = [
            name for name, choices in zip(encoding.names, encoding.choices, strict=True) for _ in range(choices or 1)
        ]
        return np.array([name in self._bits for name in owners] + [True] * (count - len(owners)), dtype=bool)


def _surpasses(found: Stack, other: Stack, count: int) -> bool:
    """Whether the held-out error is lower by one standard deviation of ``count`` normal residuals' root mean square."""
    return bool(found.errors[found.name] < other.errors[other.name] * (1 - 1 / math.sqrt(2 * count)))


def _checked(
    space: SearchSpace | None, bits: Sequence[str], full_precision: Sequence[tuple[Params, float]]
) -> list[tuple[dict[str, Any], float]]:
    """Candidates in full precision, each known to belong to the space without its bits."""
    if space is None:
        raise SettingError("full_precision needs the space that its candidates belong to. Give space as well.")
    if not bits:
        raise SettingError("full_precision needs to know which decisions are about bits. Name them in bits.")
    if len(full_precision) < 2:
        raise SettingError(f"full_precision needs at least two candidates, got {len(full_precision)}.")
    decisions = {name: distribution for name, distribution in space.decisions.items() if name not in bits}
    if not decisions:
        raise SpaceError(
            "Every decision is named in bits; full precision has nothing to tell. Leave full_precision out."
        )
    architecture = SearchSpace(
        decisions, active={name: active for name, active in space.active.items() if name in decisions}
    )
    for params, score in full_precision:
        try:
            architecture.check(params)
        except SpaceError as error:
            raise SpaceError(
                f"full_precision holds {dict(params)}, which is not of the space without bits: {error}"
            ) from None
        if not np.isfinite(score):
            raise SettingError(f"full_precision holds the score {score} of {dict(params)}. Leave failed ones out.")
    return [(dict(params), float(score)) for params, score in full_precision]
