"""The end of a run: measure the finalists against the baseline, test once, write what is handed back."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from netwright.core.artifact import save_program, save_weights
from netwright.core.cost import Ratio, compare_onnx
from netwright.core.machine import machine
from netwright.core.onnx_module import OnnxModule
from netwright.core.recipe import Recipe
from netwright.core.rundir import RunDirectory
from netwright.core.task import Task
from netwright.version import __version__
from netwright.workshop.baseline import Baseline, plain
from netwright.workshop.choice import front_of, front_volume, meets, ranking, saves
from netwright.workshop.evaluation import Outcome, rebuild, structure
from netwright.workshop.final_score import final_score, final_scores
from netwright.workshop.job import Job
from netwright.workshop.kept import told
from netwright.workshop.layers import layer_table, precisions
from netwright.workshop.plan import default_workers
from netwright.workshop.point import Point, ratios
from netwright.workshop.quiet import QuietRoom
from netwright.workshop.study import Study
from netwright.workshop.target import METRICS
from netwright.workshop.verdict import asked_for, nothing_better, verdict

__all__ = ["RESULT", "Findings", "State", "conclude", "write_unbegun"]

RESULT = "result.json"
"""The file that says how a run ended, or stands."""

_FLOOR_DEPTH = 2.0  # the front's hypervolume counts scores down to this many times the loss that is accepted
_PAIRED_SECONDS = 2.0
_PAIRED = 4  # finalists, the most promising ones, that are measured at length


@dataclass(frozen=True)
class Findings:
    """What a run has found so far, and how it is written down.

    Args:
        run: the run directory.
        task: the task.
        job: what was asked for.
        baseline: the baseline.
        study: every evaluation.
    """

    run: RunDirectory
    task: Task
    job: Job
    baseline: Baseline
    study: Study

    def points(self) -> list[Point]:
        """Every candidate that was measured."""
        return [entry.point for entry in self.study.entries if entry.point is not None]

    def write(self, state: "State", elapsed: float) -> dict[str, Any]:
        """Write ``result.json`` and return what it says."""
        base = replace(self.baseline.point, test=state.baseline_test, test_ci95=state.baseline_ci95)
        chosen = () if state.chosen is None else (state.chosen,)
        everything = [self.baseline.point, *self.points(), *state.recovered, *chosen]
        floor = base.val + _FLOOR_DEPTH * min(self.job.keep.change, -1e-3)
        content = {
            **_heading(self.job, state.status, state.explanation),
            "baseline": base.to_dict(),
            "chosen": None if state.chosen is None else state.chosen.to_dict(),
            "ratios": dict.fromkeys(METRICS, 1.0) if state.chosen is None else ratios(state.chosen, base),
            "latency_ratio": None if state.ratio is None else asdict(state.ratio),
            "score_drop": state.drop,
            "front": [point.to_dict() for point in front_of(everything, base, self.job.limits)],
            "hypervolume": front_volume(everything, base, self.job.limits, floor),
            "evaluations": len(self.study.entries),
            "failed": self.study.failed,
            "wall_s": round(elapsed, 3),
        }
        self.run.write(RESULT, content)
        return content

    def write_interrupted(self, elapsed: float) -> dict[str, Any]:
        """Write the state of a run that is not finished: valid at every moment."""
        count = len(self.study.entries)
        sentence = f"The run was not finished: {count} candidates were evaluated. Go on with --resume."
        return self.write(State("interrupted", sentence), elapsed)


def write_unbegun(run: RunDirectory, job: Job, elapsed: float) -> dict[str, Any]:
    """Write ``result.json`` of a run that was stopped before its baseline was measured."""
    content = {
        **_heading(job, "interrupted", "Stopped before the baseline was measured. Go on with --resume."),
        "baseline": None,
        "chosen": None,
        "ratios": None,
        "latency_ratio": None,
        "score_drop": None,
        "front": [],
        "hypervolume": 0.0,
        "evaluations": 0,
        "failed": 0,
        "wall_s": round(elapsed, 3),
    }
    run.write(RESULT, content)
    return content


def _heading(job: Job, status: str, explanation: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "netwright": __version__,
        "task": job.name,
        "seed": job.seed,
        "status": status,
        "explanation": explanation,
        "target": {limit.metric: limit.text for limit in job.limits},
        "keep": {"score": job.keep.text},
        "machine": machine(),
    }


@dataclass(frozen=True)
class State:
    """How a run ended.

    Args:
        status: "met", "not_met" or "interrupted".
        explanation: one sentence.
        chosen: the point handed back.
        ratio: its latency against the baseline's, measured in one process.
        drop: change of the test score and its interval.
        recovered: every candidate that was recovered in full.
        baseline_test: the baseline's score on the test split.
        baseline_ci95: its interval.
    """

    status: str
    explanation: str
    chosen: Point | None = None
    ratio: Ratio | None = None
    drop: dict[str, Any] | None = None
    recovered: tuple[Point, ...] = ()
    baseline_test: float | None = None
    baseline_ci95: tuple[float, float] | None = None


def conclude(
    findings: Findings,
    finals: Sequence[Outcome],
    recipe: Recipe,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Choose among the finalists, write the artifacts, test once, and write the result.

    Only a finalist that saves something can be chosen (see :func:`netwright.workshop.choice.saves`); where there is
    none, the baseline itself is handed back and the explanation says so.
    """
    base, job = findings.baseline.point, findings.job

    def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:  # what saves something, the best first
        by_point = {id(outcome.point): outcome for outcome in outcomes}
        points = [outcome.point for outcome in outcomes if outcome.point is not None]
        better = [point for point in points if saves(point, base, job.limits, job.keep)]
        return [by_point[id(point)] for point in ranking(better, base, job.limits, job.keep)]

    paired = [_paired(findings, outcome) for outcome in ranked(finals)[:_PAIRED]]
    at_length = {outcome.request.number: outcome for outcome in paired}
    measured = [at_length.get(outcome.request.number, outcome) for outcome in finals]
    chosen = next(iter(ranked(paired)), None)
    _write_artifacts(findings, chosen, recipe)
    findings.run.write("finals.json", list(map(told, measured)))
    errors = [outcome.error for outcome in finals if outcome.point is None]
    state = _judge(findings, chosen, errors[0] if errors and len(errors) == len(finals) else None)
    others = tuple(one.point for one in measured if one.point is not None and one is not chosen)
    return findings.write(replace(state, recovered=others), clock())


def _paired(findings: Findings, outcome: Outcome) -> Outcome:
    """The outcome with its latency measured anew against the baseline's, at length and with nothing else running."""
    assert outcome.point is not None
    measuring = findings.job.measuring
    path = findings.run.save("model.onnx", lambda place: place.write_bytes(outcome.artifact))
    example = findings.task.example(max(measuring.batch, 1))
    with QuietRoom().measure():
        ratio = compare_onnx(
            path,
            findings.run.path / "baseline.onnx",
            example,
            batch=measuring.batch,
            threads=measuring.threads,
            seconds=_PAIRED_SECONDS,
        )
    return replace(outcome, point=replace(outcome.point, latency_ratio=ratio))


def _judge(findings: Findings, chosen: Outcome | None, stopped: str | None) -> State:
    """How the run ended.

    Args:
        findings: all that was found.
        chosen: what is handed back, None for the baseline.
        stopped: why every full recovery failed, None where one did not.
    """
    task, run, job, base = findings.task, findings.run, findings.job, findings.baseline.point
    baseline = OnnxModule(run.path / "baseline.onnx", default_workers())
    if chosen is None or chosen.point is None:
        alone = final_score(task, baseline)
        met = meets(base, base, job.limits, job.keep)
        sentence = nothing_better(findings.study, stopped)
        if met:
            sentence = f"The baseline meets {asked_for(job)} already. {sentence}"
        return State("met" if met else "not_met", sentence, baseline_test=alone.score, baseline_ci95=alone.interval)
    found = final_scores(task, baseline, OnnxModule(run.path / "model.onnx", default_workers()))
    change = found.after.score - found.before.score
    point = replace(chosen.point, test=found.after.score, test_ci95=found.after.interval)
    met, sentence = verdict(job, base, point, change)
    return State(
        status="met" if met else "not_met",
        explanation=sentence,
        chosen=point,
        ratio=point.latency_ratio,
        drop={"test": change, "ci95": None if found.change is None else list(found.change)},
        baseline_test=found.before.score,
        baseline_ci95=found.before.interval,
    )


def _write_artifacts(findings: Findings, chosen: Outcome | None, recipe: Recipe) -> None:
    """model.onnx, model.pt2, model.safetensors, recipe.json, history.json and layers.json."""
    run, base = findings.run, findings.baseline
    example = findings.task.example(2)
    model = base.model if chosen is None else rebuild(base.model, findings.task, chosen, run.path)
    artifact = base.artifact if chosen is None else chosen.artifact
    run.save("model.onnx", lambda path: path.write_bytes(artifact))
    run.save("model.pt2", lambda path: save_program(model, example, path))
    run.save("model.safetensors", lambda path: save_weights(model, path))
    steps = () if chosen is None else chosen.request.steps
    run.write(
        "recipe.json",
        {
            "schema": 1,
            "netwright": __version__,
            "task": findings.job.name,
            "task_file": findings.job.file,
            "given": isinstance(findings.job.task, Task),
            "seed": findings.job.seed,
            "training": json.loads(recipe.to_json()),
            "steps": [step.to_dict() for step in steps],
            "recovery": None if chosen is None else {"epochs": chosen.epochs, "seed": chosen.request.seed},
            "imitates": base.teacher is not None,
        },
    )
    history = [] if chosen is None else [plain(record) for record in chosen.history]
    run.write("history.json", {"baseline": list(base.history), "chosen": history})
    before = base.model if chosen is None else structure(base.model, findings.task, steps, chosen.request.seed)
    run.write("layers.json", layer_table(base.model, before, example, precisions(model, steps)))
