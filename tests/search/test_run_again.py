"""search.run called again after a death or an interruption, what it stores and reads, and how it ends."""

import itertools
import json
import multiprocessing
import os

import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.samplers import RandomSampler

from netwright.search import LINASSampler, Rule, SearchSpace, run

GOALS = {"cost": "minimize"}
SMALL = SearchSpace({"a": IntDistribution(0, 3), "b": IntDistribution(0, 1)})


def silent(fraction, words):
    """Progress of a test."""


def cost(params):
    return {"cost": float(sum(value for value in params.values() if isinstance(value, int)))}


def deadly(params):
    if params["a"] == 2:
        os._exit(9)
    return cost(params)


def died(folder):
    """The exit code of a process that searches, or goes on searching, where two candidates kill it."""
    options = {"out": folder, "resume": folder.exists(), "progress": silent, "evaluations": 8}
    process = multiprocessing.get_context("fork").Process(
        target=run, args=(SMALL, deadly, GOALS), kwargs={"sampler": RandomSampler(seed=0), **options}
    )
    process.start()
    process.join()
    return process.exitcode


def test_a_candidate_that_kills_the_process_twice_has_failed(tmp_path):
    folder = tmp_path / "run"
    codes = list(itertools.takewhile(lambda code: code != 0, (died(folder) for _ in range(9))))
    assert codes == [9, 9, 9, 9], "twice for either candidate, then the run ends"
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    failed = [line for line in lines if line["state"] == "failed"]
    assert sorted(line["params"]["b"] for line in failed) == [0, 1]
    assert {line["params"]["a"] for line in failed} == {2}
    assert {line["error"].partition(" of it")[0] for line in failed} == {"the process died in 2 evaluations"}
    assert sorted(line["trial"] for line in lines) == list(range(8))


def test_an_interruption_is_no_fault_of_the_candidate(tmp_path):
    asked = []

    def interrupted(params):
        asked.append(dict(params))
        if len(asked) in (3, 4, 5):
            raise KeyboardInterrupt
        return cost(params)

    for resume in (False, True, True):
        options = {"out": tmp_path / "run", "resume": resume, "progress": silent}
        with pytest.raises(KeyboardInterrupt):
            run(SMALL, interrupted, GOALS, sampler=LINASSampler(SMALL, seed=0), evaluations=8, **options)
    assert asked[2] == asked[3] == asked[4]
    sampler = LINASSampler(SMALL, seed=0)
    found = run(
        SMALL, interrupted, GOALS, sampler=sampler, evaluations=8, out=tmp_path / "run", resume=True, progress=silent
    )
    assert not found.failed
    assert found.evaluations[2].params == asked[2]


class Counted(LINASSampler):
    """Counts its fits."""

    fits = 0

    def _propose(self, encoding, known, avoid):
        self.fits += 1
        return super()._propose(encoding, known, avoid)


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution:UserWarning")
def test_choices_that_are_tuples_are_stored_and_read(tmp_path):
    kernels = CategoricalDistribution(((1, (3, 3)), (3, (5, 1)), "none"))
    space = SearchSpace({"kernels": kernels, "d": IntDistribution(1, 20)}, rules=[Rule("d", _even, "it must be even")])
    runs = []
    for evaluations, resume in ((14, False), (20, True)):
        sampler = Counted(space, start=6, batch=4, population=20, generations=1, draws=2, seed=0)
        options = {"evaluations": evaluations, "out": tmp_path / "run", "resume": resume, "progress": silent}
        runs.append(run(space, cost, GOALS, sampler=sampler, **options))
        assert sampler.fits >= 1, "what lies in the store is read as a candidate"
    assert [entry.params for entry in runs[1].evaluations[:14]] == [entry.params for entry in runs[0].evaluations]
    assert all(entry.params["kernels"] in kernels.choices for entry in runs[1].evaluations)
    assert len({tuple(entry.params.items()) for entry in runs[1].evaluations}) == 20


def _even(params):
    assert not isinstance(params["kernels"], list)
    return params["d"] % 2 == 0


def chain(length):
    """Decisions of which each counts where the one before is true: ``length + 4`` candidates, most of them rare."""
    names = [f"g{place}" for place in range(length)]
    active = {name: (lambda params, before=before: params[before]) for before, name in itertools.pairwise(names)}
    decisions = dict.fromkeys(names, CategoricalDistribution((False, True))) | {"w": IntDistribution(1, 6)}
    whole = {"w": lambda params: params[names[-1]]}
    return SearchSpace(decisions, [Rule("w", lambda params: params["w"] <= 4, "at most 4")], active | whole)


def test_rare_candidates_are_found_before_a_space_is_exhausted(monkeypatch):
    monkeypatch.setattr("netwright.search._study._DRAWS", 30)
    found = run(chain(9), cost, GOALS, sampler=RandomSampler(seed=0), evaluations=50, progress=silent)
    assert found.exhausted
    assert sorted(len(entry.params) for entry in found.evaluations) == [*range(1, 10), *[10] * 4]


def test_a_space_too_large_to_go_through_is_not_called_exhausted(monkeypatch):
    monkeypatch.setattr("netwright.search._study._DRAWS", 30)
    monkeypatch.setattr("netwright.search._study._MOST", 3071)
    found = run(chain(9), cost, GOALS, sampler=RandomSampler(seed=0), evaluations=50, progress=silent)
    assert chain(9).size == 3072
    assert not found.exhausted
    assert len(found.evaluations) < 13
