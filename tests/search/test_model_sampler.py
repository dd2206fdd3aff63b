"""What samplers with a model make of a history: further decisions, workers side by side, trials of another space."""

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from netwright.search import LINASSampler, Rule, SearchSpace
from netwright.search._encoding import Encoding

optuna.logging.set_verbosity(optuna.logging.ERROR)

WIDE = IntDistribution(0, 20)
SPACE = SearchSpace({"x": WIDE, "y": WIDE})
BATCH = 6


def small(space=None, kind=LINASSampler, seed=0):
    return kind(space, start=6, batch=BATCH, population=40, generations=2, draws=4, seed=seed)


def value(params):
    return float((params["x"] - 7) ** 2 + params["y"])


def points(trials, *names):
    return [tuple(trial.params[name] for name in names or ("x", "y")) for trial in trials]


def went_on(study, count, space=SPACE):
    for _ in range(count):
        trial = study.ask(dict(space.decisions))
        study.tell(trial, value(trial.params))
    return study


def suggested(study, count, more):
    """A study of ``x``, ``y`` and what ``more`` suggests."""

    def objective(trial):
        more(trial)
        return value({name: trial.suggest_int(name, 0, 20) for name in ("x", "y")})

    study.optimize(objective, n_trials=count)
    return study


@pytest.mark.parametrize(
    "fixed",
    [lambda trial: trial.suggest_categorical("model", ["resnet"]), lambda trial: trial.suggest_int("k", 4, 4)],
    ids=["categorical", "int"],
)
@pytest.mark.parametrize("space", [None, SPACE], ids=["shared", "given"])
def test_a_decision_with_one_value_changes_no_proposal(fixed, space):
    plain = suggested(optuna.create_study(sampler=small(space)), 30, lambda trial: None)
    beside = suggested(optuna.create_study(sampler=small(space)), 30, fixed)
    assert points(beside.trials) == points(plain.trials)
    assert len(set(points(beside.trials))) == 30


def branches(trial):
    if trial.suggest_categorical("branch", ["left", "right"]) == "left":
        trial.suggest_float("a", 0, 1)
    else:
        trial.suggest_int("b", 0, 9)


@pytest.mark.parametrize(
    ("space", "more"),
    [
        (None, branches),
        (None, lambda trial: trial.suggest_int("moves", 0, 8 + trial.number)),
        (SPACE, lambda trial: trial.suggest_float("z", 0, 1)),
    ],
    ids=["conditional", "moving", "beyond the space"],
)
def test_with_further_decisions_a_batch_takes_one_proposal_after_the_other(space, more):
    study = suggested(optuna.create_study(sampler=small(space)), 24, more)
    for first in (6, 12, 18):
        assert len(set(points(study.trials[first : first + BATCH]))) == BATCH


def test_the_random_start_spreads_whatever_trials_decide_beside():
    plain = suggested(optuna.create_study(sampler=small(SPACE)), 6, lambda trial: None)
    beside = suggested(optuna.create_study(sampler=small(SPACE)), 6, lambda trial: trial.suggest_float("z", 0, 1))
    assert points(beside.trials) == points(plain.trials)


class Watched(LINASSampler):
    """Its proposals can be seen."""

    rows: list

    def _propose(self, encoding, known, avoid):
        found = super()._propose(encoding, known, avoid)
        self.rows = [tuple(encoding.params(row).values()) for row in found]
        return found


def test_after_every_fit_the_best_proposal_comes_first():
    few = IntDistribution(0, 2)
    sampler = small(SearchSpace({"x": few, "y": few}), Watched)
    study = optuna.create_study(sampler=sampler)
    for number in range(24):
        trial = study.ask({"x": few, "y": few, "z": FloatDistribution(0, 1)})
        if number in (6, 12, 18):
            assert points([trial]) == sampler.rows[:1]
        study.tell(trial, value(trial.params))


def test_after_the_last_proposal_comes_the_first_again():
    study = suggested(optuna.create_study(sampler=small(SPACE)), 6, lambda trial: trial.suggest_float("z", 0, 1))
    for _ in range(36):
        trial = study.ask({**SPACE.decisions, "z": FloatDistribution(0, 1)})
        study.tell(trial, state=TrialState.FAIL)
    tried = points(study.trials[6:])
    assert len(set(tried[:18])) == 18
    assert tried[18:] == tried[:18]


def test_one_old_trial_with_a_further_decision_lets_no_other_be_repeated():
    study = optuna.create_study(sampler=small())
    wider = {**SPACE.decisions, "z": FloatDistribution(0, 1)}
    study.add_trial(create_trial(value=200.0, params={"x": 20, "y": 20, "z": 0.5}, distributions=wider))
    study = suggested(study, 30, lambda trial: None)
    assert len(set(points(study.trials[1:]))) == 30


def test_trials_that_break_a_rule_are_not_learned_from_where_features_know_others_only():
    sums = {(x, y): x + y for x in range(21) for y in range(21) if x >= y}
    rule = Rule("y", lambda p: p["x"] >= p["y"], "y may not pass x")
    space = SearchSpace(SPACE.decisions, rules=[rule], features=lambda p: [sums[p["x"], p["y"]]])
    study = optuna.create_study(sampler=small(space))
    for _ in range(8):
        study.add_trial(create_trial(value=0.0, params={"x": 1, "y": 2}, distributions=SPACE.decisions))
    went_on(study, 20, space)
    assert all(trial.params["x"] >= trial.params["y"] for trial in study.trials[8:])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_trials_that_suggest_in_turns_take_the_proposals_in_their_own_order(order):
    study = went_on(optuna.create_study(sampler=small(SPACE)), 12)
    copy = optuna.create_study(sampler=small(SPACE))
    copy.add_trials(study.get_trials())
    wanted = [copy.ask(dict(SPACE.decisions)).params for _ in range(3)]
    trials = [study.ask() for _ in range(3)]
    for name in ("x", "y"):
        for place in order:
            trials[place].suggest_int(name, 0, 20)
    assert [trial.params for trial in trials] == wanted
    assert len(set(points(trials))) == 3


def test_a_worker_that_died_before_it_suggested_costs_no_proposal():
    running, failed = (optuna.create_study(sampler=small(SPACE)) for _ in range(2))
    running.ask()
    failed.tell(failed.ask(), state=TrialState.FAIL)
    assert points(went_on(running, 20).trials[1:]) == points(went_on(failed, 20).trials[1:])


class Overtaken(Watched):
    """While it proposes, another worker begins with the best proposal."""

    study: optuna.Study

    def _propose(self, encoding, known, avoid):
        found = super()._propose(encoding, known, avoid)
        best = encoding.params(found[0])
        self.study.add_trial(create_trial(state=TrialState.RUNNING, params=best, distributions=dict(SPACE.decisions)))
        return found


def test_what_others_begin_while_a_batch_is_proposed_is_not_begun_again():
    sampler = small(SPACE, Overtaken)
    sampler.study = went_on(optuna.create_study(sampler=sampler), 6)
    assert points([sampler.study.ask(dict(SPACE.decisions))]) == sampler.rows[1:2]


@pytest.mark.parametrize(
    ("distribution", "other"),
    [
        (WIDE, IntDistribution(0, 90)),
        (FloatDistribution(0, 20), FloatDistribution(-90, 90)),
        (IntDistribution(0, 20, step=4), IntDistribution(0, 20)),
        (CategoricalDistribution((1, 7, 20)), CategoricalDistribution((1, 3, 90))),
    ],
    ids=["int", "float", "step", "choice"],
)
def test_old_trials_outside_the_space_teach_nothing(distribution, other):
    """Read as the nearest value of the space, they would make it the best one."""
    space = SearchSpace({"x": distribution, "y": WIDE})
    strange, failed = (optuna.create_study(sampler=small(space)) for _ in range(2))
    for y in range(8):
        old = {"x": 3 if isinstance(other, IntDistribution) and other.high == 20 else 90, "y": y}
        strange.add_trial(create_trial(value=-999.0, params=old, distributions={"x": other, "y": WIDE}))
        failed.add_trial(create_trial(state=TrialState.FAIL))
    assert points(went_on(strange, 20, space).trials[8:]) == points(went_on(failed, 20, space).trials[8:])


def test_a_trial_that_lacks_a_decision_which_counts_is_none_of_the_space():
    space = SearchSpace({"x": WIDE, "y": WIDE}, active={"y": lambda p: p["x"] > 9})
    sampler, encoding = small(space), Encoding(space)

    def trial(**params):
        return create_trial(value=0.0, params=params, distributions=dict.fromkeys(params, WIDE))

    assert sampler._usable(trial(x=3), encoding)
    assert sampler._usable(trial(x=12, y=1), encoding)
    assert not sampler._usable(trial(x=12), encoding)


def naive(encoding, tried, rng):
    """The random start with every row checked."""
    rows = [row for row in encoding.random(rng, 256) if encoding.space.valid(encoding.params(row))]
    fresh = [row for row in rows if encoding.keys(row[None])[0] not in tried][:8]
    if not fresh:
        return encoding.params(rows[0]) if rows else encoding.space.sample(rng)
    if not tried:
        return encoding.params(fresh[0])
    before = [np.frombuffer(key) for key in tried]
    return encoding.params(max(fresh, key=lambda row: min(np.abs(row - old).sum() for old in before)))


@pytest.mark.parametrize(("high", "most"), [(20, 19), (20, 3), (20, 1), (20, 0), (1, 1)])
def test_the_random_start_is_the_same_with_few_rows_checked(high, most):
    asked = []

    def holds(params):
        asked.append(params)
        return params["x"] <= most and params["y"] <= most

    wide = IntDistribution(0, high)
    space = SearchSpace({"x": wide, "y": wide}, rules=[Rule("x", holds, "small")])
    encoding, checked = Encoding(space), Encoding(space)
    tried = set[bytes]()
    for seed in range(12):
        wanted = naive(encoding, tried, np.random.default_rng(seed))
        asked.clear()
        found = LINASSampler._random(checked, tried, np.random.default_rng(seed))
        assert found == wanted
        assert most < 19 or len(asked) <= 16
        tried.add(encoding.keys(encoding.genes(found)[None])[0])


class Counted(LINASSampler):
    """Counts its fits."""

    fits = 0

    def _propose(self, encoding, known, avoid):
        self.fits += 1
        return super()._propose(encoding, known, avoid)


def test_trials_that_end_late_let_no_model_be_fitted_anew():
    sampler = small(SPACE, Counted)
    study, rng, waiting = optuna.create_study(sampler=sampler), np.random.default_rng(0), []
    for _ in range(100):
        waiting.append(study.ask(dict(SPACE.decisions)))
        if len(waiting) == 8:
            trial = waiting.pop(int(rng.integers(8)))
            study.tell(trial, value(trial.params))
    assert sampler.fits <= 20  # 15 batches of six after the first six, were they told one after the other
    assert len(set(points(study.trials))) == 100


def test_the_model_sees_trials_in_the_order_in_which_they_ended():
    class Watching(LINASSampler):
        seen: np.ndarray

        def _propose(self, encoding, known, avoid):
            self.seen = known.values[:, 0]
            return super()._propose(encoding, known, avoid)

    sampler = small(SPACE, Watching)
    study = optuna.create_study(sampler=sampler)
    trials = [study.ask(dict(SPACE.decisions)) for _ in range(7)]
    for place in (3, 6, 0, 5, 4, 1, 2):
        study.tell(trials[place], float(place))
    study.ask(dict(SPACE.decisions))
    assert sampler.seen.tolist() == [3, 6, 0, 5, 4, 1]


def test_a_sampler_for_a_second_study_starts_from_that_one(monkeypatch):
    """A study that is gone may leave its address to the next one."""
    monkeypatch.setattr("netwright.search._model_sampler.id", lambda thing: 7, raising=False)
    used, fresh = small(SPACE), small(SPACE)
    suggested(optuna.create_study(sampler=used), 7, lambda trial: None)
    wanted = optuna.create_study(sampler=fresh)
    second = optuna.create_study(sampler=used)
    for each in (wanted, second):
        for _ in range(13):
            trial = each.ask(dict(SPACE.decisions))
            each.tell(trial, float(20 * trial.params["y"] - trial.params["x"]))
    assert points(second.trials) == points(wanted.trials)
