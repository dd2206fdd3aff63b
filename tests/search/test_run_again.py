"""search.run called again after a death or an interruption, what it stores and reads, and how it ends."""

import itertools
import json
import math
import multiprocessing
import os
import sys

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.samplers import BruteForceSampler, GridSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from netwright.core.errors import CorruptRunError, RunDirectoryError
from netwright.search import LINASSampler, Rule, SearchSpace, SpaceError, run

GOALS = {"cost": "minimize"}
SMALL = SearchSpace({"a": IntDistribution(0, 3), "b": IntDistribution(0, 1)})
CORNERS = [(0, 0), (0, 1), (3, 0), (3, 1)]


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


@pytest.mark.parametrize("workers", [1, 2])
def test_a_candidate_that_exits_has_failed(workers):
    found = run(SMALL, exits, GOALS, evaluations=8, workers=workers, progress=silent)
    assert [entry.error for entry in found.failed] == ["SystemExit: 3"] * 2
    assert len(found.evaluations) == 8


def exits(params):
    if params["a"] == 2:
        sys.exit(3)
    return cost(params)


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


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution:UserWarning")
@pytest.mark.parametrize("kind", [TPESampler, NSGAIISampler])
def test_samplers_of_optuna_choose_tuples_beside_a_folder(kind, tmp_path):
    kernels = CategoricalDistribution(((3, 3), (5, 5), None))
    space = SearchSpace({"kernels": kernels, "d": IntDistribution(1, 4)})
    for evaluations, resume in ((7, False), (40, True)):
        options = {"evaluations": evaluations, "out": tmp_path / "run", "resume": resume, "progress": silent}
        found = run(space, cost, GOALS, sampler=kind(seed=0), **options)
    assert {entry.params["kernels"] for entry in found.evaluations} == set(kernels.choices)
    journal = JournalStorage(JournalFileBackend(str(tmp_path / "run" / "study.journal")))
    stored = optuna.load_study(study_name=None, storage=journal).trials
    assert [trial.values for trial in stored] == [[entry.metrics["cost"]] for entry in found.evaluations]


@pytest.mark.filterwarnings("ignore:BruteForceSampler is experimental")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_sampler_that_has_no_more_ends_the_search(workers):
    options = {"evaluations": 8, "workers": workers, "progress": silent}
    grid = GridSampler({"a": [0, 3], "b": [0, 1]}, seed=0)
    found = run(SMALL, cost, GOALS, sampler=grid, **options)
    assert sorted((entry.params["a"], entry.params["b"]) for entry in found.evaluations) == CORNERS
    assert not found.exhausted
    odd = SearchSpace(SMALL.decisions, rules=[Rule("a", lambda params: params["a"] % 2 == 1, "it must be odd")])
    found = run(odd, cost, GOALS, sampler=BruteForceSampler(seed=0), **options)
    assert found.exhausted
    assert len(found.evaluations) == 4


def test_a_grid_goes_on_where_it_was_left(tmp_path):
    for evaluations, resume in ((2, False), (8, True), (9, True)):
        options = {"evaluations": evaluations, "out": tmp_path / "run", "resume": resume, "progress": silent}
        found = run(SMALL, cost, GOALS, sampler=GridSampler({"a": [0, 3], "b": [0, 1]}, seed=0), **options)
    assert sorted((entry.params["a"], entry.params["b"]) for entry in found.evaluations) == CORNERS


def test_the_time_of_proposing_is_that_of_all_calls(tmp_path):
    spent = []
    for evaluations, resume in ((4, False), (6, True), (6, True)):
        options = {"evaluations": evaluations, "out": tmp_path / "run", "resume": resume, "progress": silent}
        spent.append(run(SMALL, cost, GOALS, sampler=RandomSampler(seed=0), **options).proposing_s)
    assert spent[0] > 0
    assert spent == sorted(spent)


@pytest.mark.parametrize(
    ("log", "change"),
    [
        ("evaluations.jsonl", {"finished_s": None}),
        ("evaluations.jsonl", {"finished_s": "soon"}),
        ("evaluations.jsonl", {"metrics": {"cost": "low"}}),
        ("evaluations.jsonl", {"metrics": {"score": 1.0}}),
        ("evaluations.jsonl", {"metrics": {"cost": math.nan}}),
        ("evaluations.jsonl", {"params": {"a": 99, "b": 0}}),
        ("evaluations.jsonl", {"params": {"a": 1}}),
        ("evaluations.jsonl", {"params": {"a": 1, "b": 0, "c": 0}}),
        ("evaluations.jsonl", {"params": {"a": [1], "b": 0}}),
        ("evaluations.jsonl", {"trial": "first"}),
        ("evaluations.jsonl", {"seconds": None}),
        ("evaluations.jsonl", {"violations": [1.0, 2.0]}),
        ("evaluations.jsonl", []),
        ("begun.jsonl", {"params": 3}),
        ("begun.jsonl", {"params": {"a": 1}}),
        ("begun.jsonl", []),
    ],
)
def test_a_line_that_was_changed_is_named(log, change, tmp_path):
    options = {"evaluations": 3, "sampler": RandomSampler(seed=0), "out": tmp_path / "run", "progress": silent}
    run(SMALL, cost, GOALS, **options)
    lines = [json.loads(line) for line in (tmp_path / "run" / log).read_text().splitlines()]
    lines[1] = lines[1] | change if change else change
    (tmp_path / "run" / log).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CorruptRunError, match=f"{log}, line 2, is not an evaluation"):
        run(SMALL, cost, GOALS, resume=True, **options)


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


def test_features_that_know_valid_candidates_only(tmp_path):
    areas = {(w, g): w * g for w in range(1, 9) for g in (1, 2, 3) if w % g == 0}
    space = SearchSpace(
        {"w": IntDistribution(1, 8), "g": CategoricalDistribution((1, 2, 3))},
        rules=[Rule("g", lambda params: params["w"] % params["g"] == 0, "it must divide w")],
        features=lambda params: [areas[params["w"], params["g"]]],
    )
    found = run(space, lambda params: {"cost": areas[params["w"], params["g"]]}, GOALS, progress=silent)
    assert len(found.evaluations) == len(areas)
    assert not found.failed


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution:UserWarning")
@pytest.mark.parametrize("choice", [dict, math.inf, math.nan], ids=["class", "infinite", "nan"])
def test_choices_that_json_cannot_hold_need_no_folder(choice, tmp_path):
    space = SearchSpace({"kind": CategoricalDistribution(("plain", choice)), "d": IntDistribution(1, 4)})
    found = run(space, lambda params: {"cost": params["d"]}, GOALS, evaluations=30, progress=silent)
    assert len(found.evaluations) == 8
    with pytest.raises(SpaceError, match="'kind' has the choice"):
        run(space, lambda params: {"cost": params["d"]}, GOALS, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_constraints_are_told_apart_to_the_last_digit(tmp_path):
    options = {"evaluations": 3, "out": tmp_path / "run", "progress": silent}
    near = ["cost<=1234567", "cost>=-1.5"]
    found = run(SMALL, cost, GOALS, constraints=["cost<=1234570", "cost<=1234571"], evaluations=2, progress=silent)
    assert [len(entry.violations) for entry in found.evaluations] == [2, 2]
    run(SMALL, cost, GOALS, constraints=near, **options)
    for other in ("cost<=1234570", "cost<=1234567.5"):
        with pytest.raises(RunDirectoryError, match="other constraints"):
            run(SMALL, cost, GOALS, constraints=[other, near[1]], resume=True, **options)
    mark = tmp_path / "run" / "run.json"
    stored = json.loads(mark.read_text())
    assert stored["constraints"] == ["cost<=1234567.0", "cost>=-1.5"]
    mark.write_text(json.dumps(stored | {"constraints": ["cost<=1.23457e+06", "cost>=-1.5"]}))  # an older version's
    assert len(run(SMALL, cost, GOALS, constraints=near, resume=True, **options).evaluations) == 3


@pytest.mark.parametrize("sign", [1, -1])
def test_objectives_as_large_as_numbers_go_are_learned_from(sign):
    space = SearchSpace({"a": IntDistribution(0, 40), "b": IntDistribution(0, 40)})
    sampler = LINASSampler(space, start=6, batch=6, population=20, generations=1, draws=2, seed=0)

    def huge(params):
        return {
            "cost": sign * (1.7e308 if params["a"] % 2 else 1e-300 * params["b"]),
            "far": (params["b"] - 20) * 8e306,
        }

    found = run(space, huge, GOALS, sampler=sampler, evaluations=20, constraints=["far<=0"], progress=silent)
    assert len(found.evaluations) == 20


@pytest.mark.filterwarnings("ignore:Choices for a categorical distribution:UserWarning")
def test_choices_without_a_hash_are_refused():
    space = SearchSpace({"kernel": CategoricalDistribution(([3, 3], [5, 5]))})
    with pytest.raises(SpaceError, match="Give a tuple or a name for it"):
        run(space, cost, GOALS, progress=silent)


def test_a_folder_stays_where_it_was_when_the_working_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()

    def moving(params):
        os.chdir(tmp_path / "other")
        return cost(params)

    run(SMALL, moving, GOALS, evaluations=3, out="run", progress=silent)
    assert (tmp_path / "run" / "result.json").exists()
    assert not any((tmp_path / "other").iterdir())
