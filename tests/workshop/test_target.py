"""Targets, floors and budgets from text."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netwright.core.cost import Cost, Latency
from netwright.core.errors import TargetError
from netwright.workshop.target import parse_budget, parse_keep, parse_targets

_COST = Cost(Latency(2.0, 1.9, 2.2, 1, 1, "onnxruntime", 10), 4_000_000, 1_000_000, 8_000_000, 250_000)


@pytest.mark.parametrize(
    ("text", "metric", "ratio"),
    [
        ("latency<=0.4x", "latency", 0.4),
        ("latency <= 1ms", "latency", 0.5),
        ("latency<=500us", "latency", 0.25),
        ("size<=200KB", "size", 0.2),
        ("memory<=1MB", "memory", 0.25),
        ("macs<=4M", "macs", 0.5),
        ("parameters<=1e5", "parameters", 0.4),
    ],
)
def test_units_become_shares_of_the_baseline(text: str, metric: str, ratio: float) -> None:
    (limit,) = parse_targets([text])
    assert limit.metric == metric
    assert limit.ratio(_COST) == pytest.approx(ratio)


def test_what_costs_nothing_meets_every_limit() -> None:
    (limit,) = parse_targets(["macs<=4M"])
    assert limit.ratio(replace(_COST, macs=0)) == math.inf


def test_several_targets_from_one_text_or_many() -> None:
    assert parse_targets(["latency<=0.4x,size<=0.1x"]) == parse_targets(["latency<=0.4x", "size<=0.1x"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speed<=0.4x", "Unknown metric 'speed'.*latency, memory, size, macs, parameters"),
        ("latency>=0.4x", "needs the operator <="),
        ("latency<0.4x", "needs the operator <="),
        ("latency<=0.4parsecs", "Unknown unit 'parsecs' for latency"),
        ("size<=3ms", "Unknown unit 'ms' for size"),
        ("latency<=5", "Unknown unit '' for latency"),
        ("latency<=0x", "must be positive"),
        ("latency<=-1x", "must be positive"),
        ("latency<=x", "is not a target"),
        ("latency<=1.2.3x", "is not a target"),
        ("fast please", "is not a target"),
        ("", "is not a target"),
        ("latency<=0.4x,latency<=1ms", "Two targets speak of latency"),
        ("latency<=1x", "baseline itself meets latency<=1x.*latency<=0.4x"),
        ("size<=1.5x,macs<=1x", "baseline itself meets size<=1.5x,macs<=1x"),
    ],
)
def test_a_wrong_target_says_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(TargetError, match=words):
        parse_targets([text])


def test_a_limit_of_the_baselines_own_cost_may_stand_beside_a_target() -> None:
    assert [limit.value for limit in parse_targets(["size<=0.5x,latency<=1x"])] == [0.5, 1.0]


def test_no_target_at_all() -> None:
    with pytest.raises(TargetError, match="No target"):
        parse_targets([])


@given(st.floats(-1, 1))
def test_keep_round_trips(change: float) -> None:
    keep = parse_keep(f"score>={change:+.17g}")
    assert keep.change == change
    assert parse_keep(f"score{keep.text}").change == pytest.approx(change, rel=1e-5)


def test_a_score_in_place_of_its_change_is_refused() -> None:
    with pytest.raises(TargetError, match=r"asks for a gain of 0\.95.*score>=\+0\.95"):
        parse_keep("score>=0.95")
    assert parse_keep("score>=+0.02").text == ">=+0.02"
    assert parse_keep("score>=0").change == 0


@pytest.mark.parametrize("metric", ["macs", "parameters"])
def test_less_than_one_operation_is_a_forgotten_unit(metric: str) -> None:
    with pytest.raises(TargetError, match=f"less than one.*{metric}.*<=0.5x"):
        parse_targets([f"{metric}<=0.5"])
    (limit,) = parse_targets([f"{metric}<=0.5K"])
    assert limit.value == 500


@pytest.mark.parametrize("text", ["latency>=-0.01", "score<=-0.01", "score>=-1%", "score>=-1x", "score", "score>=a"])
def test_a_wrong_keep_is_refused(text: str) -> None:
    with pytest.raises(TargetError):
        parse_keep(text)


@pytest.mark.parametrize(("text", "seconds"), [("120", 120), ("90s", 90), ("10m", 600), ("10min", 600), ("1.5h", 5400)])
def test_budgets(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "0s", "-5s", "10 parsecs", "1..2s"])
def test_a_wrong_budget_is_refused(text: str) -> None:
    with pytest.raises(TargetError):
        parse_budget(text)
