"""The study behind a search: Optuna proposes, the log is the truth, known candidates are answered from memory."""

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState, create_trial

from netwright.core.journal import new_journal
from netwright.core.records import reading_line
from netwright.core.rundir import RunDirectory
from netwright.search._encoding import restored
from netwright.search._log import BEGUN, EVALUATIONS, entry_of, line_of, number_of
from netwright.search._workers import Answer
from netwright.search.result import Direction, Evaluation, Limit, SearchResult
from netwright.search.space import Params, SearchSpace, values

__all__ = ["Search"]

_JOURNAL = "study.journal"
_NAME = "netwright"
_REPEATS = 50  # proposals in a row that are invalid or known before a random new candidate is taken
_DRAWS = 1000  # random candidates in a row that are known before the others are looked for one by one
_MOST = 100_000  # combinations of decisions up to which they are
_DEATHS = 2  # evaluations of a candidate that its process did not survive before it has failed

Key: TypeAlias = tuple[tuple[str, Any], ...]


class _Study(optuna.Study):
    """A study that is asked from outside of ``optimize``, where Optuna's own cannot be stopped.

    Attributes:
        stopped: whether the sampler has nothing more to propose.
    """

    stopped = False

    def stop(self) -> None:
        """Called by such a sampler."""
        self.stopped = True


class Search:
    """The study, the log, and what is known by candidate.

    Args:
        folder: where the log and the study lie; None for nowhere.
        space: what may be proposed.
        objectives: the direction of each.
        limits: the constraints.
        sampler: proposes.
        seed: source of random candidates.
    """

    def __init__(
        self,
        folder: RunDirectory | None,
        space: SearchSpace,
        objectives: Mapping[str, Direction],
        limits: Sequence[Limit],
        sampler: BaseSampler,
        seed: int,
    ) -> None:
        self._folder, self._space, self._objectives, self._limits = folder, space, objectives, limits
        self._names = [limit.exact for limit in limits]
        self.entries: list[Evaluation] = []
        self._known: dict[Key, Evaluation | None] = {}
        self._before, self._proposing = 0.0, 0.0
        for number, line in enumerate(folder.lines(EVALUATIONS) if folder is not None else [], start=1):
            self._take(number, line)
        self._start, self._exhausted = time.monotonic(), False
        self._rng = np.random.default_rng([seed, len(self.entries)])
        self._next = 1 + max((entry.number for entry in self.entries), default=-1)
        self._numbers: dict[int, int] = {}  # Optuna's own begin anew when a run resumes, and count repeats
        self._others = self._every()
        self._begun: dict[str, Any] | None = None
        self._bury()
        self.started = len(self.entries)
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        memory = InMemoryStorage()  # it keeps choices as they are, where a journal makes lists of tuples
        self._filled(memory)
        self._study = _Study(_NAME, memory, sampler)
        self._journal = None if folder is None else self._filled(new_journal(folder.path / _JOURNAL))
        optuna.logging.set_verbosity(level)

    def _filled(self, storage: BaseStorage) -> optuna.Study:
        """A study of everything that the log holds."""
        study = optuna.create_study(storage=storage, directions=list(self._objectives.values()), study_name=_NAME)
        study.add_trials([self._frozen(entry) for entry in self.entries])
        return study

    def ask(self) -> tuple[optuna.Trial, dict[str, Any]] | None:
        """A valid candidate that nobody evaluates or has evaluated; None when there is no other.

        There is none either once the sampler has asked to stop.
        """
        begun = time.monotonic()
        try:
            job = self._proposed()
            if job is None and not self._study.stopped:
                job = self._other()
            if job is None:
                left = self._study.stopped and any(map(self._open, self._every()))
                self._exhausted = not left and self._space.size <= max(_MOST, len(self._known))
            return job
        finally:
            self._proposing += time.monotonic() - begun

    def _proposed(self) -> tuple[optuna.Trial, dict[str, Any]] | None:
        """What the sampler proposes; None where it repeats itself or has nothing more."""
        for _ in range(_REPEATS):
            if self._study.stopped or len(self._known) >= self._space.size:
                break
            job = self._taken(self._study.ask(dict(self._space.decisions)))
            if job is not None:
                return job
        return None

    def _other(self) -> tuple[optuna.Trial, dict[str, Any]] | None:
        """A random candidate that is new, or else the next of all that is; None where none is found."""
        for _ in range(_DRAWS):
            params = self._space.sample(self._rng)
            if self._space.key(params) not in self._known:
                return self._given(params)
        other = next(filter(self._open, self._others), None)
        return None if other is None else self._given(other)

    def _open(self, params: Params) -> bool:
        return self._space.key(params) not in self._known and self._space.valid(params)

    def _every(self) -> Iterator[Params]:
        """Every combination of decisions where they are not too many; none else."""
        if self._space.size <= _MOST:
            names = list(self._space.decisions)
            for combination in itertools.product(*map(values, self._space.decisions.values())):
                yield dict(zip(names, combination, strict=True))

    def _given(self, params: Params) -> tuple[optuna.Trial, dict[str, Any]] | None:
        self._study.enqueue_trial(dict(params))
        return self._taken(self._study.ask(dict(self._space.decisions)))

    def _taken(self, trial: optuna.Trial) -> tuple[optuna.Trial, dict[str, Any]] | None:
        if not self._space.valid(trial.params):
            self._study.tell(trial, state=TrialState.FAIL)
            return None
        key = self._space.key(trial.params)
        if key not in self._known:
            self._known[key] = None
            self._numbers[trial.number] = self._next
            self._next += 1
            self.started += 1
            return trial, dict(key)
        self._answer(trial, self._known[key])
        return None

    def begin(self, params: dict[str, Any]) -> None:
        """Record durably that this process is about to evaluate a candidate, and may not survive it."""
        if self._folder is not None:
            self._begun = {"params": params, "state": "begun"}
            self._folder.append(BEGUN, self._begun)

    def end(self) -> None:
        """Record that what was begun and is not told was interrupted, which is no fault of its own."""
        if self._folder is not None and self._begun is not None:
            self._folder.append(BEGUN, {**self._begun, "state": "interrupted"})
            self._begun = None

    def _bury(self) -> None:
        """Record as failed what was begun twice and neither ended nor was interrupted."""
        deaths: Counter[Key] = Counter()
        lines = self._folder.lines(BEGUN) if self._folder is not None else []
        for number, line in enumerate(lines, start=1):
            with reading_line(BEGUN, number):
                key = self._space.key(restored(line["params"], self._space))
                deaths[key] += 1 if line["state"] == "begun" else -1
        for key, count in deaths.items():
            if count >= _DEATHS and key not in self._known:
                words = f"the process died in {count} evaluations of it, without an exception; it is not tried again"
                self._record(Evaluation(self._next, dict(key), None, words, (), 0.0))
                self._next += 1

    def _take(self, number: int, line: Any) -> None:
        """Know what a line of the log says.

        Raises:
            CorruptRunError: it is no evaluation of a candidate of the space.
        """
        with reading_line(EVALUATIONS, number):
            entry = entry_of(line, self._space)
            self._frozen(entry)
            self._known[self._space.key(entry.params)] = entry
            self._before = max(self._before, number_of(line["finished_s"]))
            self._proposing = max(self._proposing, number_of(line.get("proposing_s", 0.0)))  # older versions had none
            self.entries.append(entry)

    def _record(self, entry: Evaluation) -> None:
        if self._folder is not None:
            times = {"finished_s": self._elapsed(), "proposing_s": self._proposing}
            self._folder.append(EVALUATIONS, {**line_of(entry), **times})
        self.entries.append(entry)
        self._known[tuple(entry.params.items())] = entry

    def tell(self, trial: optuna.Trial, params: dict[str, Any], answer: Answer) -> None:
        """Record durably what became of a candidate, then let the sampler know."""
        needed = [*self._objectives, *(limit.metric for limit in self._limits)]
        metrics, error = _read(answer, needed)
        violations = () if metrics is None else tuple(limit.violation(metrics) for limit in self._limits)
        entry = Evaluation(self._numbers.pop(trial.number), params, metrics, error, violations, answer.seconds)
        self._record(entry)
        self._begun = None
        if self._journal is not None:
            self._journal.add_trial(self._frozen(entry))
        self._answer(trial, entry)

    def _answer(self, trial: optuna.Trial, entry: Evaluation | None) -> None:
        if entry is None or entry.metrics is None:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        for name, violation in zip(self._names, entry.violations, strict=True):
            trial.set_constraint(name, violation)
        self._study.tell(trial, [entry.metrics[name] for name in self._objectives])

    def _frozen(self, entry: Evaluation) -> optuna.trial.FrozenTrial:
        decisions = {name: self._space.decisions[name] for name in entry.params}
        if entry.metrics is None:
            return create_trial(state=TrialState.FAIL, params=dict(entry.params), distributions=decisions)
        return create_trial(
            values=[entry.metrics[name] for name in self._objectives],
            params=dict(entry.params),
            distributions=decisions,
            constraints=dict(zip(self._names, entry.violations, strict=True)),
        )

    def words(self) -> str:
        """How it stands, for the bar."""
        failed = sum(entry.metrics is None for entry in self.entries)
        return f"{len(self.entries)} evaluated" + (f", {failed} failed" if failed else "")

    def result(self) -> SearchResult:
        """Everything so far."""
        return SearchResult(self._objectives, tuple(self.entries), self._elapsed(), self._proposing, self._exhausted)

    def _elapsed(self) -> float:
        return self._before + time.monotonic() - self._start


def _read(answer: Answer, needed: Sequence[str]) -> tuple[dict[str, float] | None, str | None]:
    """The metrics of an answer, or why it is none."""
    if answer.value is None:
        return None, answer.error
    missing = [name for name in needed if name not in answer.value]
    if missing:
        return (
            None,
            f"the evaluation returned no {missing[0]!r}; it returned {', '.join(map(repr, answer.value)) or 'nothing'}",
        )
    for name, value in answer.value.items():
        if name in needed and (isinstance(value, str) or not math.isfinite(value)):
            return None, f"metric {name!r} is {value}"
    metrics = {name: value for name, value in answer.value.items() if not isinstance(value, str)}
    return {name: value for name, value in metrics.items() if math.isfinite(value)}, None
