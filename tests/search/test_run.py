"""search.run: nothing twice, failures with reasons, constraints, resumption, workers, bad input."""

import json
import math
import os
import threading
from concurrent.futures import wait
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution

from netwright.core.errors import CorruptRunError, RunDirectoryError, SettingError
from netwright.core.front import non_dominated
from netwright.search import LINASSampler, Rule, SearchSpace, SpaceError, run
from netwright.search._workers import Workers

SPACE = SearchSpace({"a": IntDistribution(0, 15), "b": IntDistribution(0, 15)})
GOALS = {"score": "maximize", "cost": "minimize"}


def quick(space=SPACE, seed=0):
    return LINASSampler(space, start=8, batch=8, population=40, generations=2, draws=4, seed=seed)


class Problem:
    """Counts what it is asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, params):
        self.asked.append((params["a"], params["b"]))
        return {"score": params["a"] + 0.1 * params["b"], "cost": params["a"] ** 2 + params["b"], "extra": 1.0}


def silent(fraction, words):
    """Progress of a test."""


def test_the_front_is_of_measured_points_and_a_hard_constraint_holds():
    problem, told = Problem(), []
    found = run(
        SPACE,
        problem,
        GOALS,
        sampler=quick(),
        evaluations=40,
        constraints=["cost<=100", "extra>=1"],
        progress=lambda fraction, words: told.append((fraction, words)),
    )
    assert len(problem.asked) == len(set(problem.asked)) == len(found.evaluations) == 40
    assert told[-1] == (1.0, "40 evaluated")
    front = list(found.front)
    assert {(entry.params["a"], entry.params["b"]) for entry in front} <= set(problem.asked)
    assert all(entry.metrics["cost"] <= 100 for entry in front)
    assert non_dominated(found.values(front)).all()
    volumes = found.hypervolumes((0, 300))
    assert volumes == sorted(volumes)
    assert volumes[-1] == pytest.approx(found.front.hypervolume((0, 300)))
    assert 0 < found.proposing_s < found.seconds


@pytest.mark.parametrize("sampler", [optuna.samplers.RandomSampler, optuna.samplers.NSGAIISampler])
def test_samplers_that_repeat_themselves_cost_no_evaluation(sampler):
    problem = Problem()
    space = SearchSpace({"a": IntDistribution(0, 4), "b": CategoricalDistribution((0, 1, 2))})
    found = run(space, problem, GOALS, sampler=sampler(seed=0), evaluations=50, progress=silent)
    assert sorted(problem.asked) == sorted((a, b) for a in range(5) for b in range(3))
    assert found.exhausted
    assert not run(SPACE, problem, GOALS, sampler=sampler(seed=0), evaluations=5, progress=silent).exhausted


def test_invalid_candidates_are_never_evaluated():
    problem = Problem()
    space = SearchSpace(SPACE.decisions, rules=[Rule("b", lambda p: p["a"] + p["b"] == 15, "the sum must be 15")])
    run(space, problem, GOALS, sampler=optuna.samplers.RandomSampler(seed=0), evaluations=12, progress=silent)
    assert len(problem.asked) == 12
    assert all(a + b == 15 for a, b in problem.asked)


def test_failures_have_their_reason_and_the_search_goes_on():
    def evaluate(params):
        kind = params["a"] % 5
        if kind == 0:
            raise RuntimeError("out of memory")
        if kind == 1:
            return {"score": math.nan, "cost": 1.0}
        if kind == 2:
            return {"score": 1.0}
        return 3.0 if kind == 3 else {"score": 1.0, "cost": 1.0, "other": math.nan, "name": "x"}

    found = run(SPACE, evaluate, GOALS, sampler=quick(), evaluations=40, progress=silent)
    assert {entry.error for entry in found.failed} == {
        "RuntimeError: out of memory",
        "metric 'score' is nan",
        "the evaluation returned no 'cost'; it returned 'score'",
        "the evaluation returned float, not metrics by name",
    }
    assert all(entry.metrics == {"score": 1.0, "cost": 1.0} for entry in found.evaluations if entry.metrics)
    assert len(found.evaluations) == 40


def test_a_run_resumes_where_it_died(tmp_path: Path):
    whole = run(SPACE, Problem(), GOALS, sampler=quick(), evaluations=30, out=tmp_path / "whole", progress=silent)
    first = Problem()

    def dies(params):
        if len(first.asked) == 17:
            raise KeyboardInterrupt
        return first(params)

    with pytest.raises(KeyboardInterrupt):
        run(SPACE, dies, GOALS, sampler=quick(), evaluations=30, out=tmp_path / "part", progress=silent)
    assert json.loads((tmp_path / "part" / "result.json").read_text())["evaluations"] == 17
    with (tmp_path / "part" / "evaluations.jsonl").open("a") as log:
        log.write('{"trial": 99, "sta')
    second = Problem()
    part = run(
        SPACE, second, GOALS, sampler=quick(), evaluations=30, out=tmp_path / "part", resume=True, progress=silent
    )
    assert len(second.asked) == 13
    assert not set(first.asked) & set(second.asked)
    assert [entry.params for entry in part.evaluations] == [entry.params for entry in whole.evaluations]
    assert json.loads((tmp_path / "part" / "result.json").read_text())["evaluations"] == 30


def test_numbers_are_unique_after_a_resumption(tmp_path: Path):
    """A sampler that repeats itself uses up numbers of Optuna's; those of evaluations go on from the log's."""
    space = SearchSpace({"a": IntDistribution(0, 4), "b": IntDistribution(0, 2)})
    for evaluations, resume in ((8, False), (11, True), (15, True)):
        sampler = optuna.samplers.RandomSampler(seed=evaluations)
        options = {"evaluations": evaluations, "resume": resume, "out": tmp_path / "run", "progress": silent}
        found = run(space, Problem(), GOALS, sampler=sampler, **options)
        assert [entry.number for entry in found.evaluations] == list(range(evaluations))
    lines = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["trial"] for line in lines] == list(range(15))


@pytest.mark.parametrize("condition", [lambda p: p["b"] == 1, lambda p: p.get("b", 1) == 1], ids=["item", "get"])
def test_conditions_on_conditional_decisions_run_and_resume(condition, tmp_path: Path):
    one = CategoricalDistribution((0, 1))
    space = SearchSpace({"a": one, "b": one, "c": one}, active={"b": lambda p: p["a"] == 1, "c": condition})
    asked = []

    def evaluate(params):
        asked.append(dict(params))
        return {"score": sum(params.values()), "cost": float(len(params))}

    for evaluations, resume in ((2, False), (9, True)):
        sampler = optuna.samplers.RandomSampler(seed=0)
        options = {"evaluations": evaluations, "resume": resume, "out": tmp_path / "run", "progress": silent}
        found = run(space, evaluate, GOALS, sampler=sampler, **options)
    assert found.exhausted
    assert sorted(map(len, asked)) == [1, 2, 3, 3]
    assert [entry.params for entry in found.evaluations] == asked


def test_folders_that_cannot_be_used(tmp_path: Path):
    folder = tmp_path / "run"
    run(SPACE, Problem(), GOALS, sampler=quick(), evaluations=3, out=folder, progress=silent)
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        run(SPACE, Problem(), GOALS, evaluations=3, out=folder)
    with pytest.raises(RunDirectoryError, match="other objectives"):
        run(SPACE, Problem(), {"score": "maximize"}, evaluations=3, out=folder, resume=True)
    with pytest.raises(RunDirectoryError, match="no run to resume"):
        run(SPACE, Problem(), GOALS, evaluations=3, out=tmp_path / "none", resume=True)
    log = folder / "evaluations.jsonl"
    log.write_text(log.read_text() + '{"trial": 1}\n')
    with pytest.raises(CorruptRunError, match="line 4, is not an evaluation"):
        run(SPACE, Problem(), GOALS, evaluations=5, out=folder, resume=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objectives": {}}, "at least one objective"),
        ({"objectives": {"score": "max"}}, "must be 'maximize' or 'minimize', got 'max'"),
        ({"evaluations": 0}, "evaluations must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"constraints": ["cost<5ms"]}, "not of the form"),
        ({"constraints": ["cost<=5", "cost>=6"]}, "cost<=5 and cost>=6 contradict each other"),
        ({"resume": True}, "resume needs a run"),
    ],
)
def test_bad_settings(change, words):
    with pytest.raises(SettingError, match=words):
        run(SPACE, Problem(), **{"objectives": GOALS, **change})


def test_a_space_without_candidates_is_refused_before_anything_is_written(tmp_path: Path):
    space = SearchSpace(SPACE.decisions, rules=[Rule("a", lambda p: p["a"] > 99, "more than 99")])
    with pytest.raises(SpaceError, match="more than 99"):
        run(space, Problem(), GOALS, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def crashing(params):
    """Kills its process for some candidates."""
    if params["a"] == 3:
        os._exit(9)
    return {"score": float(params["a"]), "cost": float(params["b"])}


def test_processes_side_by_side_and_one_that_dies():
    space = SearchSpace({"a": IntDistribution(2, 4), "b": IntDistribution(0, 1)})
    found = run(space, crashing, GOALS, sampler=quick(space), evaluations=10, workers=2, progress=silent)
    assert len(found.evaluations) == 6
    assert sorted(entry.params["a"] for entry in found.failed) == [3, 3]
    assert all(entry.error == "its process died twice, without an exception" for entry in found.failed)


def with_more(params):
    """Returns what no process can be sent, beside the metrics; for some candidates in the place of one."""

    def unsendable():
        """A function within a function cannot be pickled."""

    if params["a"] == 3:
        return {"score": unsendable, "cost": 1.0}
    return {"score": params["a"], "cost": params["b"] / 2, "model": unsendable}


@pytest.mark.parametrize("workers", [1, 2])
def test_what_cannot_be_sent_between_processes_is_left_out(workers):
    space = SearchSpace({"a": IntDistribution(2, 4), "b": IntDistribution(0, 1)})
    found = run(space, with_more, GOALS, sampler=quick(space), evaluations=6, workers=workers, progress=silent)
    for entry in found.evaluations:
        if entry.params["a"] == 3:
            assert entry.error.startswith("metric 'score' is <function with_more")
        else:
            assert entry.metrics == {"score": entry.params["a"], "cost": entry.params["b"] / 2}
    assert len(found.failed) == 2


def answers(workers):
    found = {}
    while workers.busy:
        found |= dict(workers.next())
    workers.close()
    return found


def test_a_candidate_that_cannot_be_sent_fails_alone():
    workers = Workers(with_more, 2)
    workers.submit("bad", {"a": threading.Lock()})
    workers.submit("good", {"a": 2, "b": 0})
    found = answers(workers)
    assert found["bad"].error.startswith("it cannot be sent between processes: ")
    assert found["good"].value["score"] == 2


def test_a_candidate_begun_after_a_death_lets_no_other_be_forgotten():
    workers = Workers(crashing, 2)
    workers.submit("dies", {"a": 3, "b": 0})
    wait(workers._running)
    workers.submit("lives", {"a": 4, "b": 0})
    found = answers(workers)
    assert found["dies"].error == "its process died twice, without an exception"
    assert found["lives"].value["score"] == 4
