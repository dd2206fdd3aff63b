"""Spaces: what belongs, what counts, who is to blame; genes and features of candidates."""

import copy
import itertools
import pickle

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from netwright.search import Graph, LINASSampler, Rule, SearchSpace, SpaceError
from netwright.search._encoding import Encoding
from netwright.search.space import from_unit, to_unit, values

BLOCKS = SearchSpace(
    {
        "blocks": IntDistribution(1, 2),
        "width1": IntDistribution(8, 32, step=8),
        "width2": IntDistribution(8, 32, step=8),
    },
    rules=[Rule("width2", lambda p: p["width2"] >= p["width1"], "a later block may not be narrower")],
    active={"width2": lambda p: p["blocks"] > 1},
)


def test_check_names_the_decision_to_blame():
    BLOCKS.check({"blocks": 2, "width1": 8, "width2": 16})
    BLOCKS.check({"blocks": 1, "width1": 16})
    for params, words in [
        ({"blocks": 2, "width1": 16, "width2": 8}, "Decision 'width2' is invalid: a later block"),
        ({"blocks": 3, "width1": 16, "width2": 16}, "Decision 'blocks' must be one of 1 to 2"),
        ({"blocks": 2, "width1": 9, "width2": 16}, "'width1' must be one of 8 to 32 in steps of 8, got 9"),
        ({"blocks": 2, "width1": 8}, "'width2' is missing"),
        ({"blocks": 1, "width1": 8, "depth": 1}, "'depth' is no decision"),
    ]:
        with pytest.raises(SpaceError, match=words):
            BLOCKS.check(params)


def _holds(params):
    return params["a"] > 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda space: pickle.loads(pickle.dumps(space))])
def test_a_space_and_what_holds_one_can_be_copied(copied):
    space = SearchSpace(
        {"a": IntDistribution(0, 3), "b": IntDistribution(0, 1)}, [Rule("a", _holds, "2")], {"b": _holds}
    )
    assert copied(space) == space
    with pytest.raises(TypeError):
        copied(space).decisions["c"] = IntDistribution(0, 1)
    sampler = LINASSampler(space, seed=3)
    trials = [optuna.create_study(sampler=each).ask(dict(space.decisions)) for each in (sampler, copied(sampler))]
    assert trials[0].params == trials[1].params


def test_decisions_that_do_not_count_make_no_difference():
    one, other = {"blocks": 1, "width1": 32, "width2": 8}, {"blocks": 1, "width1": 32, "width2": 16}
    assert BLOCKS.valid(one)
    assert BLOCKS.key(one) == BLOCKS.key(other) == (("blocks", 1), ("width1", 32))
    encoding = Encoding(BLOCKS)
    rows = np.array([encoding.genes(one), encoding.genes(other)])
    assert len(set(encoding.keys(rows))) == 1
    np.testing.assert_array_equal(*encoding.features(rows))


def test_a_space_describes_valid_candidates_only():
    areas = {(w, g): w / g for w in range(1, 9) for g in (1, 2, 3) if w % g == 0}
    space = SearchSpace(
        {"w": IntDistribution(1, 8), "g": CategoricalDistribution((1, 2, 3))},
        rules=[Rule("g", lambda p: p["w"] % p["g"] == 0, "it must divide w")],
        features=lambda p: [areas[p["w"], p["g"]]],
        active={"g": lambda p: p["w"] > 0},
    )
    encoding = Encoding(space)
    rows = encoding.rows([{"w": w, "g": g} for w in range(1, 9) for g in (1, 2, 3)])
    assert len(set(encoding.keys(rows))) == 24
    valid = rows[encoding.valid(rows)]
    assert encoding.features(valid)[:, -1].tolist() == list(areas.values())


@pytest.mark.parametrize(
    "condition",
    [
        lambda p: p["b"] == 1,
        lambda p: p.get("b", 1) == 1,
        lambda p: p.get("b") > 0,
        lambda p: "b" not in p or p["b"] == 1,
    ],
    ids=["item", "get", "get of nothing", "in"],
)
def test_what_hangs_on_a_decision_that_does_not_count_does_not_count(condition):
    one = CategoricalDistribution((0, 1))
    space = SearchSpace(
        {"c": one, "b": one, "a": one, "d": one},
        active={"c": condition, "b": lambda p: p["a"] == 1, "d": lambda p: p["c"] == 1 and dict(p)["b"] == 1},
    )
    keys = set()
    for c, b, a, d in itertools.product((0, 1), repeat=4):
        params = {"c": c, "b": b, "a": a, "d": d}
        counted = space.reduced(params)
        assert ("b" in counted, "c" in counted, "d" in counted) == (a == 1, a == b == 1, a == b == c == 1)
        assert space.reduced(counted) == counted
        space.check(counted)
        keys.add(space.key(params))
    assert len(keys) == 5
    with pytest.raises(SpaceError, match="'c' is missing"):
        space.reduced({"b": 1, "a": 1})


@pytest.mark.parametrize(
    ("condition", "error"),
    [
        (lambda p: p["bloks"] > 1, KeyError),
        (lambda p: dict(p)["bloks"] > 1, KeyError),
        (lambda p: 1 / (p["blocks"] - 2) > 0, ZeroDivisionError),
    ],
)
def test_a_faulty_condition_does_not_fail_in_silence(condition, error):
    space = SearchSpace(BLOCKS.decisions, active={"width2": condition})
    with pytest.raises(error):
        space.reduced({"blocks": 2, "width1": 8, "width2": 8})
    others = SearchSpace(BLOCKS.decisions, active={"width2": lambda p: p.get("bloks", 2) > 1})
    assert "width2" in others.reduced({"blocks": 2, "width1": 8, "width2": 8})


def test_features_are_told_what_counts():
    told = []

    def features(params):
        told.append(dict(params))
        return [params.get("width2", 0)]

    encoding = Encoding(SearchSpace(BLOCKS.decisions, active=BLOCKS.active, features=features))
    one, two = {"blocks": 1, "width1": 32, "width2": 8}, {"blocks": 2, "width1": 32, "width2": 8}
    found = encoding.features(np.array([encoding.genes(one), encoding.genes(two)]))
    assert told == [{"blocks": 1, "width1": 32}, two]
    assert found[:, -1].tolist() == [0, 8]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SearchSpace({}), "The space is empty"),
        (lambda: SearchSpace({"a": 3}), "'a' must be an Optuna distribution, got int"),
        (
            lambda: SearchSpace({"a": IntDistribution(0, 1)}, rules=[Rule("b", bool, "")]),
            "speaks of 'b', which is no decision",
        ),
    ],
)
def test_impossible_spaces(make, words):
    with pytest.raises(SpaceError, match=words):
        make()


def test_rules_that_contradict_each_other_are_named():
    rules = [Rule("a", lambda p: p["a"] > 2, "above two"), Rule("a", lambda p: p["a"] < 2, "below two")]
    with pytest.raises(SpaceError, match=r"None of 100000 .* fewer than about one in 33333\..*'a' \(above two\)"):
        SearchSpace({"a": IntDistribution(0, 4)}, rules=rules).sample(np.random.default_rng(0))


def test_one_candidate_of_ten_thousand_is_found():
    """A tenth of the draws would miss it in every third case."""
    wide = IntDistribution(0, 99)
    space = SearchSpace({"a": wide, "b": wide}, rules=[Rule("a", lambda p: p["a"] == p["b"] == 7, "seven")])
    for seed in range(10):
        assert space.sample(np.random.default_rng(seed)) == {"a": 7, "b": 7}


def test_size_and_samples():
    assert BLOCKS.size == 2 * 4 * 4
    assert SearchSpace({"x": FloatDistribution(0, 1)}).size == np.inf
    rng = np.random.default_rng(0)
    for _ in range(50):
        BLOCKS.check(BLOCKS.sample(rng))


@given(st.integers(-5, 5), st.integers(0, 9), st.integers(1, 4), st.integers(0, 9))
def test_units_and_values_of_stepped_integers(low, span, step, place):
    distribution = IntDistribution(low, low + span * step, step=step)
    value = low + min(place, span) * step
    assert from_unit(distribution, to_unit(distribution, value)) == value


@given(st.floats(0, 1), st.sampled_from([FloatDistribution(-2, 3), FloatDistribution(1e-6, 1, log=True)]))
def test_units_and_values_of_floats(unit, distribution):
    value = from_unit(distribution, unit)
    assert distribution.low <= value <= distribution.high
    assert to_unit(distribution, value) == pytest.approx(unit, abs=1e-9)


def test_genes_round_trip_and_features():
    space = SearchSpace(
        {
            "n": IntDistribution(1, 100, log=True),
            "x": FloatDistribution(0, 1),
            "c": CategoricalDistribution(("a", "b")),
        },
        features=lambda p: [p["n"] ** 2],
    )
    encoding = Encoding(space)
    genes = encoding.random(np.random.default_rng(0), 40)
    again = np.array([encoding.genes(encoding.params(row)) for row in genes])
    assert encoding.keys(genes) == encoding.keys(again)
    features = encoding.features(genes)
    assert features.shape == (40, 2 + 2 + 1)
    assert features[:, -1].tolist() == [encoding.params(row)["n"] ** 2 for row in genes]


def test_graph_without_a_label_keeps_the_ways():
    graph = Graph(("in", "skip", "skip", "conv", "out"), ((0, 1), (1, 2), (2, 3), (3, 4), (1, 4)))
    assert graph.without("skip") == Graph(("in", "conv", "out"), ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize(
    "distribution", [IntDistribution(0, 4), FloatDistribution(0, 4), FloatDistribution(0, 4, step=1)]
)
def test_only_numbers_are_values_of_an_ordered_decision(distribution):
    space = SearchSpace({"n": distribution})
    for value in (2, 2.0, np.int64(2), np.float64(2)):
        space.check({"n": value})
    for value in ("2", True, np.True_, None, [2], float("nan"), 5):
        with pytest.raises(SpaceError, match=r"Decision 'n' must be one of 0(\.0)? to 4"):
            space.check({"n": value})
    SearchSpace({"n": CategoricalDistribution((True, "2"))}).check({"n": True})
    SearchSpace({"n": CategoricalDistribution((True, "2"))}).check({"n": "2"})


def test_an_integer_decision_has_no_broken_values():
    with pytest.raises(SpaceError, match=r"Decision 'n' must be one of 0 to 4 .* got 2\.5"):
        SearchSpace({"n": IntDistribution(0, 4)}).check({"n": 2.5})


@pytest.mark.parametrize(
    ("distribution", "wanted"),
    [
        (IntDistribution(2, 8, step=3), [2, 5, 8]),
        (IntDistribution(1, 4, log=True), [1, 2, 3, 4]),
        (FloatDistribution(0.0, 1.0, step=0.5), [0.0, 0.5, 1.0]),
        (FloatDistribution(3.0, 3.0), [3.0]),
        (CategoricalDistribution(("a", None)), ["a", None]),
    ],
)
def test_all_values_of_a_distribution(distribution, wanted):
    assert values(distribution) == wanted
    assert SearchSpace({"x": distribution}).size == len(wanted)
