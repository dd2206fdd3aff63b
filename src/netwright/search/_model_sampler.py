"""What samplers that learn from the history share: reading it, the random start, and batches that need no memory."""

import threading
import weakref
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from datetime import datetime
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
from netwright.search._encoding import Encoding, restored
from netwright.search._proposer import Measured
from netwright.search.space import Params, SearchSpace, SpaceError, contains, draw

__all__ = ["SPARE", "ModelSampler"]

Array: TypeAlias = NDArray[np.float64]
_APART = 8  # random candidates of the start, the one farthest from all others is taken
SPARE = 3
"""How many batches are proposed at once, since trials may fail, or run while the batch is measured."""


class ModelSampler(BaseSampler):
    """Proposes by a model of everything measured, in batches, and keeps nothing that the history does not tell.

    The first ``start`` trials are random. Then the model is refitted whenever ``batch`` more trials are complete. It is
    told of them in the order in which they ended, so that one that ends late changes nothing that it was told before.
    Trials take the next of its proposals that nobody has tried, is trying, or has failed with. Where trials have
    further decisions, which the model does not see, they take one proposal after the other, and the first again after
    the last. Proposals depend on the seed and on trials only, so a study that is resumed elsewhere goes on as it would
    have. A subclass says what is proposed.

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
            others = self._others(study, trial, encoding)
            complete = sorted((other for other in others if self._usable(other, encoding)), key=_ended)
            if len(complete) < self._start:
                begun = _tried(others, encoding, trial.number)
                return self._random(encoding, begun.keys | set(begun.uses), self._rng(trial.number))
            used = complete[: self._fitted(len(complete))]
            seen = tuple(other.number for other in used)
            mark = (weakref.ref(study), tuple(search_space), seen, self._seed)  # an address is used again, this is not
            if self._proposed is None or self._proposed[0] != mark:
                avoid = _tried(used, encoding, trial.number).keys
                self._proposed = mark, self._propose(encoding, self._measured(study, used, encoding), avoid)
                others = self._others(study, trial, encoding)  # others may have begun in the meantime
            tried = _tried(others, encoding, trial.number, since=max(seen))
            found = tried.next(encoding, self._proposed[1])
            if found is None:
                more = self._propose(encoding, self._measured(study, used, encoding), set(tried.keys))
                found = tried.next(encoding, more)
            if found is None:
                return self._random(encoding, tried.keys, self._rng(trial.number))
            return encoding.params(found)

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
        return _belongs(trial, encoding) and encoding.describes(trial.params)

    @staticmethod
    def _others(study: Study, trial: FrozenTrial, encoding: Encoding) -> list[FrozenTrial]:
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        if not encoding.nested:
            return others
        copies = [copy(other) for other in others]
        for each in copies:
            each.params = restored(each.params, encoding.space)
        return copies

    @staticmethod
    def _measured(study: Study, trials: Sequence[FrozenTrial], encoding: Encoding) -> Measured:
        signs = np.array([-1.0 if way is StudyDirection.MAXIMIZE else 1.0 for way in study.directions])
        names = sorted({name for trial in trials for name in trial.constraints})
        violations = [[trial.constraints.get(name, 0.0) for name in names] for trial in trials]
        return Measured(
            encoding.rows([trial.params for trial in trials]),
            np.array([trial.values for trial in trials]) * signs,
            np.array(violations, dtype=float).reshape(len(trials), len(names)),
            signs,
        )

    @staticmethod
    def _random(encoding: Encoding, tried: set[bytes], rng: np.random.Generator) -> dict[str, Any]:
        """A valid random candidate, new where one is found; of eight, the one least like what was tried."""
        rows = encoding.random(rng, 256)
        spare: list[Array] = []
        found: list[Array] = []
        for first in range(0, len(rows), _APART):  # a few at a time, since a rule may take long
            some = rows[first : first + _APART]
            some = some[encoding.valid(some)]
            spare += [*some[:1]]
            found += [row for row, key in zip(some, encoding.keys(some), strict=True) if key not in tried]
            if len(found) >= _APART:
                break
        if not found:
            return encoding.params(spare[0]) if spare else encoding.space.sample(rng)
        fresh = np.array(found[:_APART])
        others = np.array([np.frombuffer(key) for key in sorted(tried)])
        if len(others) == 0:
            return encoding.params(fresh[0])
        ordered = encoding.choices == 0
        gaps = np.abs(fresh[:, None, :] - others[None, -512:, :])
        nearest = np.where(ordered, gaps, gaps != 0).sum(2).min(1)
        return encoding.params(fresh[int(np.argmax(nearest))])


def _ended(trial: FrozenTrial) -> tuple[datetime, int]:
    assert trial.datetime_complete is not None
    return trial.datetime_complete, trial.number


@dataclass(frozen=True)
class _Tried:
    """What the other trials of a study leave to try.

    Attributes:
        keys: of candidates that were tried, are being tried, or failed.
        uses: how often the model's decisions were taken since its last fit by trials with further decisions, where a
            repeat is none.
        waiting: trials between that fit and this one that run and have not told all decisions yet; each takes one of
            the rows that are left.
    """

    keys: set[bytes]
    uses: Counter[bytes]
    waiting: int

    def next(self, encoding: Encoding, genes: Array) -> Array | None:
        """The row to try, of ``genes`` with the best first; None where every one was tried."""
        keys = encoding.keys(genes)
        left = [place for place, key in enumerate(keys) if key not in self.keys]
        left.sort(key=lambda place: self.uses[keys[place]])
        found: Array | None = genes[left[self.waiting % len(left)]] if left else None
        return found


def _tried(trials: Sequence[FrozenTrial], encoding: Encoding, number: int, since: int = -1) -> _Tried:
    """What trials leave to try to the one of a number, the last fit having seen none beyond the number ``since``."""
    closed: list[Params] = []
    free: list[Params] = []
    waiting = 0
    for trial in trials:
        if not _belongs(trial, encoding):
            waiting += trial.state is TrialState.RUNNING and since < trial.number < number
        elif not _has_more(trial, encoding):
            closed.append(trial.params)
        elif trial.number > since:
            free.append(trial.params)
    keys, uses = (encoding.keys(encoding.rows(many)) for many in (closed, free))
    return _Tried(set(keys), Counter(uses), waiting)


def _has_more(trial: FrozenTrial, encoding: Encoding) -> bool:
    """Whether a trial has a decision beyond the space that could have been another."""
    further = trial.distributions.keys() - encoding.space.decisions.keys()
    return any(not trial.distributions[name].single() for name in further)


def _belongs(trial: FrozenTrial, encoding: Encoding) -> bool:
    """Whether the trial's decisions can be read as a candidate of the space: none is missing or out of its range."""
    missing = False
    for name, distribution in encoding.space.decisions.items():
        if name not in trial.params:
            if name not in encoding.space.active:
                return False
            missing = True
        elif isinstance(distribution, CategoricalDistribution):
            if trial.params[name] not in distribution.choices:
                return False
        elif not contains(distribution, trial.params[name]):
            return False
    if missing:
        try:
            encoding.space.reduced(trial.params)
        except SpaceError:
            return False
    return True
