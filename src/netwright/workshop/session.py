"""One stretch of a run, from its start or resume to its end."""

import math
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from netwright.core.graph import Graph
from netwright.core.recipe import Recipe
from netwright.core.rundir import RunDirectory
from netwright.core.task import Task
from netwright.core.transform import Progress
from netwright.workshop.baseline import Baseline, make_baseline
from netwright.workshop.choice import Finalist, next_finalist
from netwright.workshop.engine import Engine
from netwright.workshop.evaluation import Outcome, Request, Subject, most_epochs
from netwright.workshop.finish import Findings, conclude, write_unbegun
from netwright.workshop.job import Job
from netwright.workshop.local import LocalEngine
from netwright.workshop.plan import Plan, make_plan
from netwright.workshop.point import Point, ratios
from netwright.workshop.study import Entry, Proposal, Study

__all__ = ["Session", "make_engine"]

_TICK = 0.25  # seconds between looks at the clock
_CLOSING = 8.0  # seconds that the last measurements, the artifacts and the report take
_FINALISTS = 2  # candidates for each worker that time is kept for to recover them in full
_MARGIN = 1.25  # on the time that this is known to take
_LEAST_TRAINED = 0.01  # of a full recovery, below which a candidate tells nothing of the time that one takes
_TEACHER_SHARE = 0.1  # of the budget may go into the teacher's outputs
_CLOCK = "clock.json"


def make_engine(kind: Literal["local", "ray"], subject: Subject, workers: int) -> Engine:
    """The engine of that name.

    Raises:
        NetwrightError: Ray was asked for and is not installed, or its cluster cannot be reached.
    """
    if kind == "local":
        return LocalEngine(subject, workers)
    from netwright.workshop.ray_engine import RayEngine  # Ray is an extra: loaded only where it is asked for

    return RayEngine(subject, workers)


@dataclass
class Session:
    """The phases of a run, one after the other; see :func:`netwright.workshop.run.run_job`.

    Args:
        run: the run directory, owned.
        job: what is asked for.
        task: the task, checked.
        graph: the trace of its untrained model.
        progress: told how far the run is.
    """

    run: RunDirectory
    job: Job
    task: Task
    graph: Graph
    progress: Progress
    _start: float = field(default_factory=time.perf_counter, init=False)
    _before: float = field(default=0.0, init=False)
    _findings: Findings | None = field(default=None, init=False)
    _phases: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.run.has(_CLOCK):
            self._before = float(self.run.read(_CLOCK, "elapsed_s")["elapsed_s"])

    @property
    def _recipe(self) -> Recipe:
        return self.task.recipe or Recipe()

    def elapsed(self) -> float:
        """Seconds of the run so far, earlier stretches included."""
        return self._before + time.perf_counter() - self._start

    def go(self) -> dict[str, Any]:
        """All phases; the content of ``result.json``."""
        share = self.job.budget * _TEACHER_SHARE
        baseline = make_baseline(self.run, self.job, self.task, self._recipe, self._training, share)
        self._mark("baseline")
        self._tell("choosing operand types and branches by measurement")
        plan = make_plan(self.run, self.job, self.task, baseline, self.graph, self.elapsed)
        study = Study(
            self.run,
            plan.space,
            baseline.point,
            self.job.limits,
            self.job.keep,
            self.job.seed,
            self.job.sampler,
            longest=most_epochs(self.task, self._recipe),
        )
        self._findings = Findings(self.run, self.task, self.job, baseline, study)
        self._findings.write_interrupted(self.elapsed())
        self._mark("plan")
        engine = make_engine(self.job.engine, self._subject(baseline), plan.workers)
        try:
            self._search(engine, study, plan, self._findings)
            self._mark("search")
            finals = self._finals(engine, study, plan)
            self._mark("finals")
        finally:
            engine.close()
        self._tell("measuring and testing the chosen model")
        self._save_clock()
        result = conclude(self._findings, finals, self._recipe, self.elapsed)
        self._mark("closing")
        busy = math.fsum(entry.seconds for entry in study.entries) + math.fsum(outcome.seconds for outcome in finals)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.run.write(
            "phases.json",
            {"seconds": self._phases, "busy_s": busy, "workers": plan.workers, "peak_memory_bytes": peak},
        )
        return result

    def interrupted(self) -> dict[str, Any]:
        """Leave a valid result behind; its content."""
        self._save_clock()
        if self._findings is not None:
            return self._findings.write_interrupted(self.elapsed())
        return write_unbegun(self.run, self.job, self.elapsed())

    def _subject(self, baseline: Baseline) -> Subject:
        return Subject(
            task=self.task,
            model=baseline.model,
            teacher=baseline.teacher,
            artifact=baseline.artifact,
            recipe=self._recipe,
            measuring=self.job.measuring,
        )

    def _search(self, engine: Engine, study: Study, plan: Plan, findings: Findings) -> None:
        """Propose and evaluate until the time for it ends or nothing new is found."""
        flying: dict[int, Proposal] = {}
        spent = [entry.seconds for entry in study.entries]
        exhausted = False
        while True:
            usual = statistics.median(spent) if spent else plan.candidate_seconds
            while len(flying) < engine.workers and not exhausted and self._may_start(study, plan, len(flying), usual):
                proposal = study.ask()
                if proposal is None:
                    exhausted = True
                    break
                flying[proposal.number] = proposal
                engine.submit(
                    Request(
                        number=proposal.number,
                        steps=proposal.steps,
                        seconds=plan.candidate_seconds,
                        seed=self.job.seed + proposal.number,
                        params=proposal.params,
                    )
                )
            if not flying:
                return
            for outcome in engine.wait(_TICK):
                study.tell(flying.pop(outcome.request.number), outcome, self.elapsed())
                spent.append(outcome.seconds)
                self._save_clock()
                findings.write_interrupted(self.elapsed())
            self._tell(self._headline(study))

    def _may_start(self, study: Study, plan: Plan, flying: int, usual: float) -> bool:
        """Whether another candidate fits into the time; the first one always does, for nothing follows without it."""
        done = len(study.entries) + flying
        if self.job.evaluations is not None and done >= self.job.evaluations:
            return False
        left = self.job.budget - self.elapsed() - usual - _CLOSING
        return done == 0 or left > plan.final_seconds or left > self._reserved(study, plan)

    def _next(self, study: Study, begun: Sequence[int], standing: Sequence[Point], workers: int) -> Entry | None:
        """The entry to recover in full next; in the first round one for each worker, for it costs no time."""
        assert self._findings is not None
        waiting = {
            id(entry.point): (entry, Finalist(entry.point, study.trained(entry)))
            for entry in study.entries
            if entry.point is not None and entry.number not in begun
        }
        found = next_finalist(
            [one for _, one in waiting.values()],
            standing,
            self._findings.baseline.point,
            self.job.limits,
            self.job.keep,
            insure=len(begun) < workers,
        )
        return None if found is None else waiting[id(found.point)][0]

    def _lineup(self, study: Study, workers: int) -> list[Entry]:
        """The first who would be recovered in full, as far as is known now: up to two for each worker."""
        found: list[Entry] = []
        while len(found) < _FINALISTS * workers:
            standing = [entry.point for entry in found if entry.point is not None]
            entry = self._next(study, [entry.number for entry in found], standing, workers)
            if entry is None:
                break
            found.append(entry)
        return found

    def _reserved(self, study: Study, plan: Plan) -> float:
        """Time for full recovery: what the plan keeps for it, or less where the longest recoveries take less."""
        spent = []
        for entry in self._lineup(study, plan.workers):
            trained = study.trained(entry)
            if trained < _LEAST_TRAINED:
                return plan.final_seconds
            spent.append(entry.seconds + plan.candidate_seconds * (1 / trained - 1))
        needed = max(max(spent, default=math.inf), math.fsum(spent) / plan.workers)
        return min(plan.final_seconds, _MARGIN * needed)

    def _finals(self, engine: Engine, study: Study, plan: Plan) -> list[Outcome]:
        """Recover the most promising candidates in full, and further ones while the time allows."""
        count = len(self._lineup(study, engine.workers))
        rounds = max(1, -(-count // engine.workers))
        left = max(self.job.budget - self.elapsed() - _CLOSING, plan.candidate_seconds)
        usual = statistics.median([entry.seconds for entry in study.entries]) if study.entries else 0.0
        overhead = max(0.0, usual - plan.candidate_seconds)
        seconds = max(left / rounds - overhead, plan.candidate_seconds)
        begun: list[int] = []
        flying: dict[int, Point] = {}
        outcomes: list[Outcome] = []
        while True:
            while len(flying) < engine.workers:
                longest = max((outcome.seconds for outcome in outcomes), default=seconds + overhead)
                if len(begun) >= count and self.elapsed() + longest > self.job.budget - _CLOSING:
                    break
                done = [outcome.point for outcome in outcomes if outcome.point is not None]
                entry = self._next(study, begun, [*flying.values(), *done], engine.workers)
                if entry is None or entry.point is None:
                    break
                begun.append(entry.number)
                flying[entry.number] = entry.point
                engine.submit(
                    Request(
                        number=entry.number,
                        steps=entry.point.steps,
                        seconds=seconds,
                        seed=self.job.seed + entry.number,
                        deliver=True,
                    )
                )
            if not flying:
                return outcomes
            for outcome in engine.wait(_TICK):
                del flying[outcome.request.number]
                outcomes.append(outcome)
            self._tell(f"full recovery of the most promising, {len(outcomes)} of {max(count, len(begun))} done")

    def _mark(self, phase: str) -> None:
        """Note how long the phase took that ends here."""
        self._phases[phase] = self.elapsed() - self._before - math.fsum(self._phases.values())

    def _headline(self, study: Study) -> str:
        assert self._findings is not None
        base = self._findings.baseline.point
        points = self._findings.points()
        text = f"{len(study.entries)} candidates"
        kept = [point for point in points if point.val >= base.val + self.job.keep.change]
        if kept:
            metric = self.job.limits[0].metric
            best = min(ratios(point, base)[metric] for point in kept)
            text += f", best {metric} with the score kept {best:.2f}x"
        return text + (f", {study.failed} failed" if study.failed else "")

    def _training(self, fraction: float, what: str) -> None:
        self._tell(f"baseline: {what}")

    def _tell(self, what: str) -> None:
        self.progress(min(0.99, self.elapsed() / self.job.budget), what)

    def _save_clock(self) -> None:
        self.run.write(_CLOCK, {"elapsed_s": self.elapsed()})
