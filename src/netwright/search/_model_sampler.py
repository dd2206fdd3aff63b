"""What samplers that learn from the history share: reading it, the random start, and batches that need no memory."""

import threading
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import intersection_search_space
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from netwright.core.errors import SettingError
from netwright.search._encoding import Encoding
from netwright.search._proposer import Measured
from netwright.search.space import SearchSpace, draw

__all__ = ["SPARE", "ModelSampler"]

Array: TypeAlias = NDArray[np.float64]
_APART = 8  # random candidates of the start, the one farthest from all others is taken
SPARE = 3
"""How many batches are proposed at once, since trials may fail, or run while the batch is measured."""


class ModelSampler(BaseSampler):
    """Proposes by a model of everything measured, in batches, and keeps nothing that the history does not tell.

    The first ``start`` trials are random. Then the model is refitted whenever ``batch`` more trials are complete, and
    trials take the next of its proposals that nobody has tried, is trying, or has failed with. Proposals depend on the
    seed and on trials only, so a study that is resumed elsewhere goes on as it would have. A subclass says what is
    proposed.

    Args:
        space: what may be proposed; None for the decisions that all complete trials share, as Optuna's samplers do.
        start: random trials before the first model.
        batch: complete trials between two models.
        seed: source of randomness; None for another each time.
    """

    def __init__(self, space: SearchSpace | None, start: int, batch: int, seed: int | None) -> None:
        if start < 2:
            raise SettingError(f"start must be at least 2, got {start}. A model needs two observations.")
        if batch < 1:
            raise SettingError(f"batch must be at least 1, got {batch}.")
        self._space, self._start, self._batch = space, start, batch
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._encodings: dict[str, Encoding] = {}
        self._proposed: tuple[object, Array] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_encodings", "_proposed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def reseed_rng(self) -> None:
        """Go on with another source of randomness, as Optuna asks of copies that work side by side."""
        self._seed = int(np.random.SeedSequence().generate_state(1)[0])
        self._proposed = None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The space, or the decisions that all complete trials share."""
        if self._space is not None:
            return dict(self._space.decisions)
        shared = intersection_search_space(study.get_trials(deepcopy=False))
        return {name: distribution for name, distribution in shared.items() if not distribution.single()}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A decision that the model does not see, at random."""
        return draw(param_distribution, self._rng(trial.number, zlib.crc32(param_name.encode())))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A candidate; every decision of the space has a value."""
        if not search_space:
            return {}
        with self._lock:
            encoding = self._encoding(search_space)
            trials = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
            complete = [other for other in trials if self._usable(other, encoding)]
            tried = self._tried(trials, encoding)
            if len(complete) < self._start:
                return self._random(encoding, tried, self._rng(trial.number))
            used = complete[: self._fitted(len(complete))]
            mark = (id(study), tuple(search_space), len(used), hash(tuple(other.number for other in used)), self._seed)
            if self._proposed is None or self._proposed[0] != mark:
                avoid = self._tried(used, encoding) if tried else set()
                self._proposed = mark, self._propose(encoding, self._measured(study, used, encoding), avoid)
            found = self._first_new(encoding, self._proposed[1], tried)
            if found is None and tried:
                more = self._propose(encoding, self._measured(study, used, encoding), set(tried))
                found = self._first_new(encoding, more, tried)
            return self._random(encoding, tried, self._rng(trial.number)) if found is None else encoding.params(found)

    @abstractmethod
    def _propose(self, encoding: Encoding, known: Measured, avoid: set[bytes]) -> Array:
        """Genes of candidates to try, best first; none out of ``avoid``."""

    def _fitted(self, complete: int) -> int:
        """How many of the complete trials the model has seen: it is refitted after a batch, later after 2% more."""
        seen = self._start
        while seen + self._size(seen) <= complete:
            seen += self._size(seen)
        return seen

    def _size(self, seen: int) -> int:
        return max(self._batch, seen // 50)

    def _rng(self, *more: int) -> np.random.Generator:
        return np.random.default_rng([self._seed % 2**32, *more])

    def _encoding(self, search_space: dict[str, BaseDistribution]) -> Encoding:
        mark = repr(sorted(search_space.items(), key=lambda item: item[0]))
        if mark not in self._encodings:
            own = self._space is not None and dict(self._space.decisions) == search_space
            self._encodings = {mark: Encoding(self._space if own and self._space else SearchSpace(search_space))}
        return self._encodings[mark]

    @staticmethod
    def _usable(trial: FrozenTrial, encoding: Encoding) -> bool:
        if trial.state is not TrialState.COMPLETE or trial.values is None or not np.isfinite(trial.values).all():
            return False
        return _belongs(trial, encoding)

    @staticmethod
    def _tried(trials: Sequence[FrozenTrial], encoding: Encoding) -> set[bytes]:
        """Keys of what was tried; none where trials have decisions beyond the space, so that a repeat is none."""
        known = set(encoding.names)
        if any(not known.issuperset(trial.params) for trial in trials):
            return set()
        rows = [encoding.genes(trial.params) for trial in trials if trial.params and _belongs(trial, encoding)]
        return set(encoding.keys(np.array(rows))) if rows else set()

    @staticmethod
    def _measured(study: Study, trials: Sequence[FrozenTrial], encoding: Encoding) -> Measured:
        signs = np.array([-1.0 if way is StudyDirection.MAXIMIZE else 1.0 for way in study.directions])
        names = sorted({name for trial in trials for name in trial.constraints})
        violations = [[trial.constraints.get(name, 0.0) for name in names] for trial in trials]
        return Measured(
            np.array([encoding.genes(trial.params) for trial in trials]),
            np.array([trial.values for trial in trials]) * signs,
            np.array(violations, dtype=float).reshape(len(trials), len(names)),
            signs,
        )

    @staticmethod
    def _first_new(encoding: Encoding, genes: Array, tried: set[bytes]) -> Array | None:
        for row, key in zip(genes, encoding.keys(genes), strict=True):
            if key not in tried:
                found: Array = row
                return found
        return None

    @staticmethod
    def _random(encoding: Encoding, tried: set[bytes], rng: np.random.Generator) -> dict[str, Any]:
        """A valid random candidate, new where one is found; of eight, the one least like what was tried."""
        rows = encoding.random(rng, 256)
        if encoding.space.rules:
            rows = rows[encoding.valid(rows)]
        fresh = rows[[key not in tried for key in encoding.keys(rows)]] if len(rows) else rows
        if len(fresh) == 0:
            return encoding.params(rows[0]) if len(rows) else encoding.space.sample(rng)
        fresh = fresh[:_APART]
        others = np.array([np.frombuffer(key) for key in sorted(tried)])
        if len(others) == 0:
            return encoding.params(fresh[0])
        ordered = encoding.choices == 0
        gaps = np.abs(fresh[:, None, :] - others[None, -512:, :])
        nearest = np.where(ordered, gaps, gaps != 0).sum(2).min(1)
        return encoding.params(fresh[int(np.argmax(nearest))])


def _belongs(trial: FrozenTrial, encoding: Encoding) -> bool:
    """Whether the trial's decisions can be read as a candidate of the space."""
    for name, distribution in encoding.space.decisions.items():
        if name not in trial.params:
            if name not in encoding.space.active:
                return False
        elif isinstance(distribution, CategoricalDistribution):
            if trial.params[name] not in distribution.choices:
                return False
        elif isinstance(trial.params[name], str | bool | None) or not np.isfinite(trial.params[name]):
            return False
    return True
