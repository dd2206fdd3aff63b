"""The search: Optuna proposes, evaluations answer, the log on disk is the truth.

Every finished evaluation is a line of ``evaluations.jsonl``, on disk before anything else happens
with it. The Optuna study (``study.journal``, for its dashboard and its samplers) is made anew from those lines
whenever a run resumes, so that a study left torn by a crash can lose nothing.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from netwright.core.journal import new_journal
from netwright.core.records import reading, reading_line
from netwright.core.rundir import RunDirectory
from netwright.search import LINASSampler
from netwright.workshop.choice import regain
from netwright.workshop.evaluation import Outcome
from netwright.workshop.job import Sampler
from netwright.workshop.point import Point, Step, key, ratios
from netwright.workshop.space import Space
from netwright.workshop.target import Keep, Limit

__all__ = ["EVALUATIONS", "Entry", "Proposal", "Study"]

EVALUATIONS = "evaluations.jsonl"
"""The log of a run directory with one line for every finished evaluation."""
_JOURNAL = "study.journal"
_POPULATION = 16
_START, _BATCH = 12, 4  # evaluations before the first predictors, and between two fits of them
_FLOOR = "score"  # name of the constraint: how far the score lies below what can be worth a full recovery
_HOPED = 0.5  # of what such a recovery may give back
_HOPELESS = 8  # failures without one success, after which a run ends
_TINY = 1e-12  # the least share of a cost
_TRIES = 3  # proposals of the sampler that only repeat what is known before it is helped
_RANDOM = 200  # random ones that do so before the space counts as used up


@dataclass(frozen=True)
class Entry:
    """A finished evaluation, as its line has it."""

    number: int
    point: Point | None
    params: Mapping[str, Any]
    epochs: float
    seed: int
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class Proposal:
    """What to evaluate next."""

    number: int
    params: dict[str, Any]
    steps: tuple[Step, ...]
    trial: optuna.Trial


class Study:
    """Proposes candidates and remembers what became of them.

    Args:
        run: where the log and the study lie.
        space: what may be proposed.
        baseline: the reference of every ratio.
        limits: the targets; their metrics are minimized beside the score, which is maximized.
        keep: the floor of the score, a constraint for the sampler.
        seed: source of the sampler's randomness.
        sampler: "linas" for evolution on predictors, "nsga2" for evolution on what was measured.
        longest: epochs of a full recovery, which gives back some of the score that a short one leaves lost.
    """

    def __init__(
        self,
        run: RunDirectory,
        space: Space,
        baseline: Point,
        limits: Sequence[Limit],
        keep: Keep,
        seed: int,
        sampler: Sampler = "linas",
        *,
        longest: float,
    ) -> None:
        self._run, self._space, self._baseline, self._keep = run, space, baseline, keep
        self._longest = longest
        self._metrics = tuple(limit.metric for limit in limits)
        lines = run.lines(EVALUATIONS)
        self.entries = _entries(run.path / EVALUATIONS, lines)
        self.failed = sum(entry.point is None for entry in self.entries)
        self._next = 1 + max((entry.number for entry in self.entries), default=-1)
        with reading(run.path / EVALUATIONS, "evaluations of this run"):
            self._known = {
                key(space.steps(entry.params) if entry.point is None else entry.point.steps) for entry in self.entries
            }
        self._rng = np.random.default_rng([seed, len(lines)])
        self._kind, self._seed = sampler, seed
        self.gains: tuple[float, ...] = ()
        self._study = self._made(lines)

    def ask(self) -> Proposal | None:
        """The next candidate, one that was not proposed before; None when the sampler finds no other.

        The ladder comes first, its later rungs in the form that the earlier ones show to be cheapest.
        """
        for params in self._space.ladder(self._form(), counted="latency" not in self._metrics):
            if self._is_new(self._space.steps(params)):
                return self._given(params)
        for _ in range(_TRIES):
            trial = self._study.ask(self._space.distributions())
            steps = self._space.steps(trial.params)
            if self._is_new(steps):
                return self._proposal(trial, steps)
            self._study.tell(trial, state=TrialState.FAIL)
        space = self._space.search_space()
        for _ in range(_RANDOM):
            params = space.sample(self._rng)
            if self._is_new(self._space.steps(params)):
                return self._given(params)
        return None

    def _form(self) -> int:
        """Which way of writing weights cost least, next to the first one, where both were tried on the same network.

        One that does not keep the score counts as if it cost nearly three times as much.
        """
        forms = self._space.forms()
        costs: dict[str, dict[int, float]] = {}
        for entry in self.entries:
            used = [number for number, form in enumerate(forms) if form.items() <= entry.params.items()]
            if entry.point is not None and used:
                network = {name: value for name, value in entry.params.items() if name not in forms[0]}
                shares = ratios(entry.point, self._baseline)
                cost = math.fsum(math.log(max(shares[metric], _TINY)) for metric in self._metrics)
                lost = float(self._violation(entry) > 0)
                costs.setdefault(repr(sorted(network.items())), {})[used[0]] = cost + lost
        gaps = [[cost[n] - cost[0] for cost in costs.values() if n in cost and 0 in cost] for n in range(len(forms))]
        return min(range(len(forms)), key=lambda number: fmean(gaps[number]) if gaps[number] else float(number > 0))

    def _given(self, params: Mapping[str, Any]) -> Proposal:
        self._study.enqueue_trial(dict(params))
        trial = self._study.ask(self._space.distributions())
        return self._proposal(trial, self._space.steps(trial.params))

    def _is_new(self, steps: Sequence[Step]) -> bool:
        return bool(steps) and key(steps) not in self._known

    def _proposal(self, trial: optuna.Trial, steps: tuple[Step, ...]) -> Proposal:
        self._known.add(key(steps))
        self._next += 1
        return Proposal(self._next - 1, dict(trial.params), steps, trial)

    def tell(self, proposal: Proposal, outcome: Outcome, finished: float) -> Entry:
        """Record what became of a proposal, durably, then let the sampler know."""
        line = {
            "trial": proposal.number,
            "state": "failed" if outcome.point is None else "ok",
            "point": None if outcome.point is None else outcome.point.to_dict(),
            "error": outcome.error,
            "seconds": outcome.seconds,
            "finished_s": finished,
            "params": proposal.params,
            "epochs": outcome.epochs,
            "seed": outcome.request.seed,
        }
        entry = _entry(line)
        self.entries.append(entry)  # first, so that an interruption while it is written out still counts it
        self._run.append(EVALUATIONS, line)
        self.failed += entry.point is None
        if proposal.trial.study is not self._study:  # proposed before the study was made anew
            self._study.add_trial(self._frozen(line))
        elif entry.point is None:
            self._study.tell(proposal.trial, state=TrialState.FAIL)
        else:
            proposal.trial.set_constraint(_FLOOR, self._violation(entry))
            self._study.tell(proposal.trial, self._values(entry.point))
        return entry

    def hopeless(self, workers: int) -> bool:
        """Whether so many candidates failed, and none else, that the rest would too."""
        return self.failed == len(self.entries) >= max(_HOPELESS, 2 * workers)

    def cause(self) -> str:
        """Why most of those failed that did; empty where none did."""
        counts = Counter(entry.error or "" for entry in self.entries if entry.point is None)
        return counts.most_common(1)[0][0] if counts else ""

    def learn(self, gains: Sequence[float]) -> None:
        """Take into account what full recoveries gave back.

        They say how much score a candidate may lack, so the sampler sees all that was evaluated anew.
        """
        if tuple(gains) != self.gains:
            self.gains = tuple(gains)
            self._study = self._made(self._run.lines(EVALUATIONS))

    def _made(self, lines: Sequence[Mapping[str, Any]]) -> optuna.Study:
        """A study of what the lines tell."""
        made = self._open(self._run.path / _JOURNAL, self._sampler(self._kind, self._seed + len(lines)))
        with reading(self._run.path / EVALUATIONS, "evaluations of this run"):
            made.add_trials([self._frozen(line) for line in lines])
        return made

    def _sampler(self, name: Sampler, seed: int) -> optuna.samplers.BaseSampler:
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=_POPULATION, seed=seed)
        ideal = max(self._baseline.val, self._floor), *(-math.inf for _ in self._metrics)
        return LINASSampler(self._space.search_space(), start=_START, batch=_BATCH, ideal=ideal, seed=seed)

    def _open(self, path: Path, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return optuna.create_study(
            storage=new_journal(path),
            directions=[StudyDirection.MAXIMIZE, *(StudyDirection.MINIMIZE for _ in self._metrics)],
            sampler=sampler,
            study_name="netwright",
        )

    def _frozen(self, line: Mapping[str, Any]) -> FrozenTrial:
        entry = _entry(line)
        known = self._space.distributions()
        distributions = {name: known[name] for name in line["params"] if name in known}
        params = {name: line["params"][name] for name in distributions}  # older versions had other decisions
        if entry.point is None:
            return create_trial(state=TrialState.FAIL, params=params, distributions=distributions)
        return create_trial(
            values=self._values(entry.point),
            params=params,
            distributions=distributions,
            constraints={_FLOOR: self._violation(entry)},
        )

    def _values(self, point: Point) -> list[float]:
        shares = ratios(point, self._baseline)
        return [point.val, *(shares[metric] for metric in self._metrics)]

    def trained(self, entry: Entry) -> float:
        """The share of a full recovery that a candidate had, at most 1."""
        return min(1.0, entry.epochs / self._longest)

    @property
    def _floor(self) -> float:
        return self._baseline.val + self._keep.change

    def _violation(self, entry: Entry) -> float:
        """How far a candidate is from a score that a full recovery may well raise to the floor."""
        assert entry.point is not None
        return self._floor - entry.point.val - _HOPED * regain(self._keep, self.trained(entry), self.gains)


def _entries(path: Path, lines: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """The evaluations that the lines of the log tell of.

    Raises:
        CorruptRunError: a line that is JSON, but not an evaluation.
    """
    found = []
    for number, line in enumerate(lines, start=1):
        with reading_line(path, number):
            found.append(_entry(line))
    return found


def _entry(line: Mapping[str, Any]) -> Entry:
    point = None if line["point"] is None else Point.from_dict(line["point"])
    params, error = dict(line["params"]), line["error"]
    reason = None if error is None else str(error)
    return Entry(int(line["trial"]), point, params, float(line["epochs"]), line["seed"], float(line["seconds"]), reason)
