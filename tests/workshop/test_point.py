"""Candidates as plain data."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from subjects import INT8, point, prune

from netwright.compress import Int8, Prune
from netwright.core.cost import Cost, Latency, Ratio
from netwright.core.errors import RecipeError, TransformError
from netwright.workshop.point import Point, Step, key, ratios

NUMBERS = st.floats(0, 1e6, allow_nan=False)
COUNTS = st.integers(0, 10**12)
PLAIN = st.none() | st.booleans() | st.integers(-100, 100) | NUMBERS | st.text(max_size=5)
SETTINGS = st.dictionaries(st.text(max_size=5), PLAIN | st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2))
LATENCIES = st.builds(
    Latency,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    st.integers(1, 64),
    st.integers(1, 8),
    st.sampled_from(["onnxruntime", "torch"]),
    st.integers(1, 1000),
)
RATIOS = st.builds(Ratio, NUMBERS, NUMBERS, NUMBERS, st.booleans(), NUMBERS, st.integers(1, 100))
POINTS = st.builds(
    Point,
    st.lists(st.builds(Step, st.text(min_size=1, max_size=8), SETTINGS), max_size=3).map(tuple),
    NUMBERS,
    st.builds(Cost, LATENCIES, COUNTS, COUNTS, COUNTS, COUNTS),
    st.none() | RATIOS,
    st.none() | NUMBERS,
    st.none() | st.tuples(NUMBERS, NUMBERS),
)


@given(POINTS)
@settings(max_examples=80, deadline=None)
def test_a_point_round_trips_through_json(one: Point) -> None:
    assert Point.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_a_point_has_the_fields_of_result_json() -> None:
    written = point(0.9, 0.5, 0.25, prune(first=0.5), INT8).to_dict()
    assert set(written) == {
        "steps",
        "score",
        "latency_ms",
        "memory_bytes",
        "size_bytes",
        "macs",
        "parameters",
        "latency_ratio",
    }
    assert written["score"] == {"val": 0.9, "test": None, "test_ci95": None}
    assert written["steps"][0] == {
        "method": "netwright.compress:Prune",
        "settings": {"ratios": {"0": 0.5}, "saliency": "magnitude"},
    }
    assert {"median", "p10", "p90", "batch", "threads", "runtime"} <= set(written["latency_ms"])


def test_ratios_are_shares_of_the_baseline() -> None:
    base = point(0.9)
    one = point(0.8, 0.25, 0.1)
    assert ratios(one, base) == pytest.approx(
        {"latency": 0.25, "memory": 1.0, "size": 0.1, "macs": 1.0, "parameters": 1.0}
    )
    assert ratios(base, one)["size"] == pytest.approx(10.0)
    nothing = replace(base, cost=replace(base.cost, macs=0))
    assert ratios(one, nothing)["macs"] == 1.0, "a network without products has no ratio of them"


def test_key_tells_steps_apart_but_not_the_order_of_settings() -> None:
    one = Step("a:B", {"x": 1, "y": {"p": 0.5, "q": 0.25}})
    same = Step("a:B", {"y": {"q": 0.25, "p": 0.5}, "x": 1})
    assert key((one,)) == key((same,))
    for other in ((), (one, one), (Step("a:C", one.settings),), (Step("a:B", {"x": 2, "y": one.settings["y"]}),)):
        assert key(other) != key((one,))
    assert key((prune(first=0.5), INT8)) != key((INT8, prune(first=0.5)))


def test_a_step_builds_its_transform() -> None:
    assert prune(first=0.5).build() == Prune({"0": 0.5}, saliency="magnitude")
    assert INT8.build() == Int8(activation="uint8", weight="int8")
    with pytest.raises(RecipeError, match="nowhere"):
        Step("nowhere:Prune", {}).build()


@pytest.mark.parametrize("method", ["os:mkdir", "netwright.core.fit:fit", "torch.nn:Linear", "pathlib:Path"])
def test_a_step_that_is_no_transform_is_not_called(method: str, tmp_path: Path) -> None:
    step = Step(method, {"path": str(tmp_path / "made")})
    with pytest.raises(TransformError, match=f"{method} is not a transform"):
        step.build()
    assert not (tmp_path / "made").exists()
