"""What a search teaches, on functions of which it is known."""

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.samplers import RandomSampler
from scipy.stats import kendalltau

from netwright.core.errors import SettingError
from netwright.search import Rule, SearchSpace, importance, predictor_quality, run
from netwright.search._encoding import Encoding
from netwright.search.predictors import TreeEnsemble, stack

SPACE = SearchSpace(
    {"much": IntDistribution(0, 20), "little": IntDistribution(0, 20), "nothing": CategoricalDistribution(("a", "b"))}
)
GOALS = {"high": "maximize", "low": "minimize"}


def evaluate(params):
    return {"high": 10.0 * params["much"] + params["little"], "low": float(params["little"])}


@pytest.fixture(scope="module")
def found():
    return run(SPACE, evaluate, GOALS, evaluations=80, sampler=RandomSampler(seed=0), progress=lambda *_: None)


def test_importance_is_that_of_a_linear_function(found):
    """For independent decisions shuffling one raises the error by twice its share of the variance."""
    worth = importance(found, SPACE)
    assert list(worth["high"]) == ["much", "little", "nothing"]
    assert worth["high"]["much"] == pytest.approx(2 * 100 / 101, rel=0.2)
    assert next(iter(worth["low"])) == "little"
    assert worth["low"]["little"] == pytest.approx(2.0, rel=0.2)
    assert abs(worth["low"]["much"]) < 0.1


def test_importance_is_the_error_that_a_shuffle_adds(found):
    encoding, entries = Encoding(SPACE), found.evaluations
    genes = np.array([encoding.genes(entry.params) for entry in entries])
    y = np.array([entry.metrics["low"] for entry in entries])
    trees = TreeEnsemble(seed=4).fit(encoding.features(genes), y)
    rng, errors = np.random.default_rng([4, 1]), {name: [] for name in encoding.names}
    for place, name in enumerate(encoding.names):
        for _ in range(10):
            mixed = genes.copy()
            mixed[:, place] = rng.permutation(mixed[:, place])
            errors[name].append(((trees.predict(encoding.features(mixed))[0] - y) ** 2).mean())
    base = ((trees.predict(encoding.features(genes))[0] - y) ** 2).mean()
    expected = {name: (np.mean(each) - base) / y.var() for name, each in errors.items()}
    assert importance(found, SPACE, seed=4)["low"] == pytest.approx(expected)


def test_importance_asks_nothing_about_candidates_that_break_a_rule():
    """A shuffle that breaks a rule is left out of the mean, and features are never told of it."""
    rule = Rule("b", lambda p: p["a"] + p["b"] <= 6, "the sum may not pass 6")
    sums = {(a, b): float(a + b) for a in range(7) for b in range(7) if a + b <= 6}
    decisions = {"a": IntDistribution(0, 6), "b": IntDistribution(0, 6), "c": IntDistribution(0, 6)}
    space = SearchSpace(decisions, rules=[rule], features=lambda p: [sums[p["a"], p["b"]]])
    options = {"evaluations": 60, "sampler": RandomSampler(seed=0), "progress": lambda *_: None}
    found = run(space, lambda p: {"cost": 5.0 * p["a"] + p["b"]}, {"cost": "minimize"}, **options)
    worth = importance(found, space)["cost"]
    assert next(iter(worth)) == "a"
    assert worth["a"] > 1
    assert abs(worth["c"]) < 0.1


def test_a_decision_that_no_shuffle_can_change_has_no_importance():
    """Where every candidate lies on ``a + b == 9``, a shuffle of one of them breaks the rule or changes nothing."""
    rule = Rule("b", lambda p: p["a"] + p["b"] == 9, "the sum must be 9")
    space = SearchSpace({"a": IntDistribution(0, 9), "b": IntDistribution(0, 9)}, rules=[rule])
    options = {"evaluations": 10, "sampler": RandomSampler(seed=0), "progress": lambda *_: None}
    found = run(space, lambda p: {"cost": float(p["a"])}, {"cost": "minimize"}, **options)
    assert importance(found, space)["cost"] == {"a": 0.0, "b": 0.0}


def test_quality_is_the_rank_correlation_on_later_candidates(found):
    entries = predictor_quality(found, SPACE, points=3, seed=2)
    assert [entry.objective for entry in entries] == ["high"] * 3 + ["low"] * 3
    assert [entry.seen for entry in entries[:3]] == [12, 40, 68]
    encoding = Encoding(SPACE)
    inputs = encoding.features(np.array([encoding.genes(entry.params) for entry in found.evaluations]))
    y = found.values()[:, 0]
    predicted = stack(inputs[:40], y[:40], seed=2).predict(inputs[40:])[0]
    assert entries[1].kendall_tau == pytest.approx(kendalltau(predicted, y[40:]).statistic)
    assert entries[2].kendall_tau > 0.9, "a maximized objective is predicted with its sign turned"


def test_too_little_says_nothing():
    few = run(SPACE, evaluate, GOALS, evaluations=5, sampler=RandomSampler(seed=0), progress=lambda *_: None)
    assert predictor_quality(few, SPACE) == []
    assert importance(few, SPACE) == {}
    with pytest.raises(SettingError, match="points must be at least 1"):
        predictor_quality(few, SPACE, points=0)


def test_a_budget_ends_the_search():
    import time

    def slow(params):
        time.sleep(0.05)
        return evaluate(params)

    found = run(SPACE, slow, GOALS, budget_s=0.4, sampler=RandomSampler(seed=0), progress=lambda *_: None)
    assert 1 <= len(found.evaluations) < 12
    with pytest.raises(SettingError, match="budget_s must be positive"):
        run(SPACE, slow, GOALS, budget_s=0.0)


def test_candidates_that_break_a_constraint_teach_as_much(found):
    """Three in a hundred are feasible; everything is measured all the same."""
    bound = run(
        SPACE,
        evaluate,
        GOALS,
        evaluations=80,
        sampler=RandomSampler(seed=0),
        constraints=["low<=1"],
        progress=lambda *_: None,
    )
    assert 0 < sum(entry.feasible for entry in bound.evaluations) < 8
    assert [entry.params for entry in bound.evaluations] == [entry.params for entry in found.evaluations]
    assert importance(bound, SPACE) == importance(found, SPACE)
    assert predictor_quality(bound, SPACE) == predictor_quality(found, SPACE)


def test_a_rank_correlation_needs_ranks():
    def measured(evaluate, count):
        return run(SPACE, evaluate, GOALS, evaluations=count, sampler=RandomSampler(seed=0), progress=lambda *_: None)

    for count in (8, 9, 12):
        seen = [
            entry.seen for entry in predictor_quality(measured(evaluate, count), SPACE) if entry.objective == "high"
        ]
        assert seen == sorted(set(seen))
        assert seen[0] == 4
        assert count - seen[-1] >= 4
    level = predictor_quality(measured(lambda params: evaluate(params) | {"low": 3.0}, 30), SPACE)
    assert {entry.objective for entry in level} == {"high"}, "equal values have no rank, which is not a rank of 0"
