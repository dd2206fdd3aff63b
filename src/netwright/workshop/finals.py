"""The last phase of a search: the most promising candidates are recovered in full."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from netwright.core.rundir import RunDirectory
from netwright.workshop.choice import Finalist, excess, next_finalist
from netwright.workshop.engine import Engine
from netwright.workshop.evaluation import Outcome, Request
from netwright.workshop.job import Job
from netwright.workshop.kept import keep_outcome, kept_outcomes
from netwright.workshop.plan import Plan
from netwright.workshop.point import Point
from netwright.workshop.study import Entry, Study

__all__ = ["CLOSING", "Finals"]

CLOSING = 8.0
"""Seconds that the last measurements, the artifacts and the report take."""

_TICK = 0.25  # seconds between looks at the clock
_FINALISTS = 2  # candidates for each worker that time is kept for
_MARGIN = 1.25  # on the time that their recovery is known to take
_LEAST_TRAINED = 0.01  # of a full recovery, below which a candidate tells nothing of the time that one takes


@dataclass(frozen=True)
class Finals:
    """Full recovery of the most promising candidates (see :func:`netwright.workshop.choice.next_finalist`).

    Args:
        run_directory: where what is recovered lies, until the run has a result.
        job: what is asked for.
        baseline: the reference of every ratio.
        study: every evaluation.
        plan: how long a brief recovery takes, and how much time is kept for full ones.
    """

    run_directory: RunDirectory
    job: Job
    baseline: Point
    study: Study
    plan: Plan

    def reserved(self) -> float:
        """Time for full recovery: what the plan keeps for it, or less where the longest recoveries take less."""
        spent = []
        for entry in self._lineup(self.plan.workers):
            trained = self.study.trained(entry)
            if trained < _LEAST_TRAINED:
                return self.plan.final_seconds
            spent.append(entry.seconds + self.plan.candidate_seconds * (1 / trained - 1))
        needed = max(max(spent, default=math.inf), math.fsum(spent) / self.plan.workers)
        return min(self.plan.final_seconds, _MARGIN * needed)

    def first(self) -> Request | None:
        """The first full recovery, which is better done in the middle of the search.

        What it gives back says which candidates a full recovery can save, and so what to look for. None after one, or
        where none costs less than the cheapest that keeps the score already.
        """
        if self.study.gains or kept_outcomes(self.run_directory):
            return None
        floor = self.baseline.val + self.job.keep.change
        sound = [entry for entry in self.study.entries if entry.point is not None and entry.point.val >= floor]
        best = min(sound, key=self._cost, default=None)
        if best is None or best.point is None:
            entry = self._next([], [], 1)
        else:
            entry = self._next([best.number], [best.point], 2)
        if entry is None or (best is not None and self._cost(entry) >= self._cost(best)):
            return None
        return self._request(entry, max(self.plan.final_seconds / _FINALISTS, self.plan.candidate_seconds))

    def _cost(self, entry: Entry) -> float:
        return math.inf if entry.point is None else excess(entry.point, self.baseline, self.job.limits)

    def keep(self, outcome: Outcome) -> None:
        """Write a full recovery that is done, and let the study learn from it."""
        keep_outcome(self.run_directory, outcome)
        self.recall()

    def recall(self) -> None:
        """Let the study learn from every full recovery that is on disk."""
        self.study.learn(self._gains(kept_outcomes(self.run_directory)))

    def run(self, engine: Engine, clock: Callable[[], float], tell: Callable[[str], None]) -> list[Outcome]:
        """Recover those who promise most, and further ones while the time allows.

        Each is on disk when it is done, and what an earlier stretch of the run recovered is not recovered again.

        Args:
            engine: with all its workers free.
            clock: seconds of the run so far.
            tell: told how far it is.
        """
        outcomes = kept_outcomes(self.run_directory)
        begun = [outcome.request.number for outcome in outcomes]
        count = len(self._lineup(engine.workers))
        seconds, overhead = self._shares(max(1, -(-(count - len(begun)) // engine.workers)), clock())
        flying: dict[int, Point] = {}
        while True:
            while len(flying) < engine.workers:
                longest = max((outcome.seconds for outcome in outcomes), default=seconds + overhead)
                if len(begun) >= count and clock() + longest > self.job.budget - CLOSING:
                    break
                done = [outcome.point for outcome in outcomes if outcome.point is not None]
                entry = self._next(begun, [*flying.values(), *done], engine.workers, self._gains(outcomes))
                if entry is None or entry.point is None:
                    break
                begun.append(entry.number)
                flying[entry.number] = entry.point
                engine.submit(self._request(entry, seconds))
            if not flying:
                return outcomes
            for outcome in engine.wait(_TICK):
                del flying[outcome.request.number]
                keep_outcome(self.run_directory, outcome)
                outcomes.append(outcome)
            tell(f"full recovery of the most promising, {len(outcomes)} of {max(count, len(begun))} done")

    def _request(self, entry: Entry, seconds: float) -> Request:
        assert entry.point is not None
        return Request(entry.number, entry.point.steps, seconds, self.job.seed + entry.number, deliver=True)

    def _shares(self, rounds: int, elapsed: float) -> tuple[float, float]:
        """Training time of one, and what else it takes, where so many follow one another."""
        least = self.plan.candidate_seconds
        usual = statistics.median([entry.seconds for entry in self.study.entries]) if self.study.entries else 0.0
        overhead = max(0.0, usual - least)
        left = max(self.job.budget - elapsed - CLOSING, least)
        return max(left / max(rounds, 1) - overhead, least), overhead

    def _lineup(self, workers: int) -> list[Entry]:
        """The first who would be recovered, as far as is known now: up to two for each worker."""
        found: list[Entry] = []
        while len(found) < _FINALISTS * workers:
            standing = [entry.point for entry in found if entry.point is not None]
            entry = self._next([entry.number for entry in found], standing, workers)
            if entry is None:
                break
            found.append(entry)
        return found

    def _gains(self, outcomes: Sequence[Outcome]) -> list[float]:
        """How much score the full recoveries gave back."""
        briefly = {entry.number: entry.point.val for entry in self.study.entries if entry.point is not None}
        return [
            outcome.point.val - briefly[outcome.request.number]
            for outcome in outcomes
            if outcome.point is not None and outcome.request.number in briefly
        ]

    def _next(
        self, begun: Sequence[int], standing: Sequence[Point], workers: int, gains: Sequence[float] | None = None
    ) -> Entry | None:
        """Who follows; in the first round one for each worker, for it costs no time."""
        waiting = {
            id(entry.point): (entry, Finalist(entry.point, self.study.trained(entry)))
            for entry in self.study.entries
            if entry.point is not None and entry.number not in begun
        }
        candidates = [one for _, one in waiting.values()]
        insure = len(begun) < workers
        known = self.study.gains if gains is None else gains
        found = next_finalist(
            candidates, standing, self.baseline, self.job.limits, self.job.keep, insure=insure, gains=known
        )
        return None if found is None else waiting[id(found.point)][0]
