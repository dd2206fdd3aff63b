"""One stretch of a run, from its start or resume to its end."""

import math
import resource
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from netwright.core.graph import Graph
from netwright.core.recipe import Recipe
from netwright.core.records import reading
from netwright.core.rundir import RunDirectory
from netwright.core.task import Task
from netwright.core.transform import Progress
from netwright.workshop.baseline import Baseline, make_baseline
from netwright.workshop.engine import Engine
from netwright.workshop.evaluation import Request, Subject, most_epochs
from netwright.workshop.finals import CLOSING, Finals
from netwright.workshop.finish import Findings, conclude, write_unbegun
from netwright.workshop.job import Job
from netwright.workshop.kept import forget_outcomes
from netwright.workshop.local import LocalEngine
from netwright.workshop.plan import Plan, make_plan
from netwright.workshop.point import ratios
from netwright.workshop.study import Proposal, Study

__all__ = ["Session", "make_engine"]

_TICK = 0.25  # seconds between looks at the clock
_SEEN = 12  # candidates after which, if none keeps the score, one is recovered in full
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
        began: on ``time.perf_counter``, when this stretch of the run began.
    """

    run: RunDirectory
    job: Job
    task: Task
    graph: Graph
    progress: Progress
    began: float
    _before: float = field(default=0.0, init=False)
    _findings: Findings | None = field(default=None, init=False)
    _phases: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.run.has(_CLOCK):
            with reading(self.run.path / _CLOCK, "the time that the run took"):
                self._before = float(self.run.read(_CLOCK, "elapsed_s")["elapsed_s"])

    @property
    def _recipe(self) -> Recipe:
        return self.task.recipe or Recipe()

    def elapsed(self) -> float:
        """Seconds of the run so far, earlier stretches included."""
        return self._before + time.perf_counter() - self.began

    def go(self) -> dict[str, Any]:
        """All phases; the content of ``result.json``.

        Raises:
            NetwrightError: what the user can mend, such as a task that no worker can read; the run stays unfinished.
        """
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
            finals = Finals(self.run, self.job, baseline.point, study, plan)
            finals.recall()
            self._search(engine, study, plan, finals, self._findings)
            self._mark("search")
            outcomes = finals.run(engine, self.elapsed, self._tell)
            self._mark("finals")
        finally:
            engine.close()
        self._tell("measuring and testing the chosen model")
        self._save_clock()
        result = conclude(self._findings, outcomes, self._recipe, self.elapsed)
        forget_outcomes(self.run)
        self._mark("closing")
        busy = math.fsum(entry.seconds for entry in study.entries) + math.fsum(outcome.seconds for outcome in outcomes)
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

    def _search(self, engine: Engine, study: Study, plan: Plan, finals: Finals, findings: Findings) -> None:
        """Propose and evaluate until the time for it ends, nothing new is found, or everything fails."""
        flying: dict[int, Proposal] = {}
        recovering = 0
        spent = [entry.seconds for entry in study.entries]
        exhausted = False
        while True:
            usual = statistics.median(spent) if spent else plan.candidate_seconds
            while (
                len(flying) + recovering < engine.workers
                and not exhausted
                and self._may_start(study, plan, finals, len(flying), usual)
            ):
                first = finals.first() if len(study.entries) >= _SEEN and not recovering else None
                if first is not None:
                    recovering = 1
                    engine.submit(first)
                    continue
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
            if not flying and not recovering:
                return
            for outcome in engine.wait(_TICK):
                if outcome.request.deliver:
                    recovering = 0
                    finals.keep(outcome)
                    continue
                study.tell(flying.pop(outcome.request.number), outcome, self.elapsed())
                spent.append(outcome.seconds)
                self._save_clock()
                findings.write_interrupted(self.elapsed())
            exhausted = exhausted or study.hopeless(engine.workers)
            self._tell(self._headline(study))

    def _may_start(self, study: Study, plan: Plan, finals: Finals, flying: int, usual: float) -> bool:
        """Whether another candidate fits into the time; the first one always does, for nothing follows without it."""
        done = len(study.entries) + flying
        if self.job.evaluations is not None and done >= self.job.evaluations:
            return False
        left = self.job.budget - self.elapsed() - usual - CLOSING
        return done == 0 or left > plan.final_seconds or left > finals.reserved()

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
