"""Which candidates deserve a full recovery, and which is handed back."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from subjects import point

from netwright.workshop.choice import (
    REFERENCE,
    Finalist,
    excess,
    front_of,
    front_volume,
    next_finalist,
    ranking,
    regain,
    saves,
    shortfall,
)
from netwright.workshop.point import Point
from netwright.workshop.target import parse_keep, parse_targets

BASE = replace(point(0.9), latency_ratio=None)
LATENCY = parse_targets(["latency<=0.4x"])
BOTH = parse_targets(["latency<=0.4x,size<=200KB"])
KEEP = parse_keep("score>=-0.01")

VALUES = st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, 0.8, 1.0])
POINTS = st.lists(st.builds(point, st.sampled_from([0.5, 0.85, 0.88, 0.9, 0.95]), VALUES, VALUES), max_size=9)


def triple(one: Point) -> tuple[float, float, float]:
    assert one.latency_ratio is not None
    return -one.val, one.latency_ratio.median, one.cost.size_bytes / 1e6


@given(POINTS)
@settings(max_examples=100, deadline=None)
def test_the_front_is_that_of_brute_force(points: list[Point]) -> None:
    def beaten(one: Point) -> bool:
        return any(
            all(a <= b for a, b in zip(triple(other), triple(one), strict=True)) and triple(other) != triple(one)
            for other in points
        )

    found = front_of(points, BASE, BOTH)
    assert {triple(one) for one in found} == {triple(one) for one in points if not beaten(one)}
    assert len(found) == len({triple(one) for one in found}), "of twins one stays"


def test_metrics_without_a_target_do_not_count_for_the_front() -> None:
    fast_and_big, slow_and_small = point(0.9, 0.2, 0.9), point(0.9, 0.3, 0.1)
    assert front_of([fast_and_big, slow_and_small], BASE, LATENCY) == [fast_and_big]
    assert len(front_of([fast_and_big, slow_and_small], BASE, BOTH)) == 2


def test_excess_is_the_worst_factor() -> None:
    assert excess(point(0.9, 0.2), BASE, LATENCY) == pytest.approx(0.5)
    assert excess(point(0.9, 0.8), BASE, LATENCY) == pytest.approx(2.0)
    assert excess(point(0.9, 0.2, 0.6), BASE, BOTH) == pytest.approx(3.0)
    assert excess(point(0.9, 0.4, 0.2), BASE, BOTH) == pytest.approx(1.0)


def test_latency_counts_as_it_was_measured_beside_the_baseline() -> None:
    one = point(0.9, 0.2)
    alone = replace(one, cost=replace(one.cost, latency=replace(one.cost.latency, median_ms=40.0)))
    assert excess(alone, BASE, LATENCY) == pytest.approx(0.5)
    assert excess(replace(alone, latency_ratio=None), BASE, LATENCY) == pytest.approx(50.0)


def test_shortfall_is_what_the_score_lacks() -> None:
    assert shortfall(point(0.85), BASE, KEEP) == pytest.approx(0.04)
    assert shortfall(point(0.89), BASE, KEEP) == pytest.approx(0.0)
    assert shortfall(point(0.95), BASE, KEEP) == pytest.approx(-0.06)
    assert shortfall(point(0.91), BASE, parse_keep("score>=+0.02")) == pytest.approx(0.01)


def test_the_order_in_which_candidates_are_handed_back() -> None:
    meets_smallest = point(0.896, 0.1)
    meets = point(0.9, 0.3)
    meets_twin_with_less_score = point(0.897, 0.3)
    keeps_near = point(0.95, 0.5)
    keeps_far = point(0.99, 0.9)
    lacks_little = point(0.88, 0.05)
    lacks_much = point(0.5, 0.01)
    expected = [
        meets_smallest,
        meets,
        meets_twin_with_less_score,
        keeps_near,
        keeps_far,
        lacks_little,
        lacks_much,
    ]
    assert ranking(expected[::-1], BASE, LATENCY, KEEP) == expected
    assert ranking(expected[3:] + expected[:3], BASE, LATENCY, KEEP) == expected


@pytest.mark.parametrize(
    ("one", "target", "expected"),
    [
        (point(0.9, 1.0, 0.3), "latency<=2s,size<=500KB", True),  # the latency is met as it is
        (point(0.9, 1.0, 0.3), "latency<=0.4x,size<=500KB", True),  # nearer to the target, and nowhere further
        (point(0.9, 1.1, 0.3), "latency<=0.4x,size<=500KB", False),
        (point(0.9, 1.1, 0.3), "latency<=2s,size<=500KB", True),  # dearer than the baseline, and still allowed
        (point(0.9, 1.0, 1.0), "latency<=2s,size<=500KB", False),
        (point(0.9, 0.9, 0.9), "latency<=0.4x,size<=500KB", True),
        (point(0.9, 0.9, 0.9), "latency<=2s", True),  # the baseline meets it, and so does this
        (point(0.8, 0.1, 0.1), "latency<=2s", False),  # which the baseline does with more score
    ],
)
def test_what_may_take_the_place_of_the_baseline(one: Point, target: str, expected: bool) -> None:
    assert saves(one, BASE, parse_targets([target]), KEEP) is expected


def test_a_reserve_of_score_goes_before_the_last_bit_of_cost() -> None:
    safe, edge, slow = point(0.896, 0.2), point(0.891, 0.1), point(0.9, 0.5)
    assert ranking([slow, edge, safe], BASE, LATENCY, KEEP) == [safe, edge, slow]
    closer = point(0.891, 0.45)
    assert ranking([closer, slow], BASE, LATENCY, KEEP) == [slow, closer], "beyond the target too"
    exact = parse_keep("score>=0")
    assert ranking([point(0.9, 0.2), cheaper := point(0.9, 0.1)], BASE, LATENCY, exact)[0] is cheaper


def following(points: list[Point], standing: list[Point], trained: float = 0.0, insure: bool = True) -> Point | None:
    found = next_finalist([Finalist(p, trained) for p in points], standing, BASE, LATENCY, KEEP, insure=insure)
    return None if found is None else found.point


def schedule(points: list[Point], trained: float = 0.0, insure: bool = True) -> list[Point]:
    """All finalists, where full recovery changes nothing."""
    waiting, standing = list(points), []
    while (found := following(waiting, standing, trained, insure)) is not None:
        standing.append(found)
        waiting.remove(found)
    return standing


def test_finalists_may_lack_what_recovery_gives_back() -> None:
    cheap, dear = point(0.9, 0.1), point(0.95, 0.3)
    nearly, hardly = point(0.88, 0.2), point(0.87, 0.05)
    over, lost = point(0.9, 0.5), point(0.7, 0.01)
    # the safe one, a chance of half the cost, one that would cost less, then insurance
    expected = [cheap, hardly, lost, dear, nearly, over]
    for points in (expected, expected[::-1], expected[3:] + expected[:3]):
        assert schedule(points) == expected
        assert schedule(points, insure=False) == [cheap, hardly]
        assert schedule(points, trained=1.0, insure=False) == [cheap], "a full recovery changes nothing then"


def test_where_nothing_promises_a_gain_one_is_tried_that_would_be_one() -> None:
    """A second one that keeps the score and costs more than the first could never be handed back."""
    safe, second = point(0.9, 0.4), point(0.95, 0.45)
    near, far, dear = point(0.8, 0.1), point(0.6, 0.01), point(0.85, 0.6)
    assert following([second, far, near, dear], [safe]) is near
    assert following([second, far, near, dear], [safe], insure=False) is None
    assert following([second, dear], [safe]) is second


def test_the_expected_gain_weighs_cost_against_what_is_lacking() -> None:
    """0.025 is lacking at most: chances 0.5 and 0.9 of a gain of log 4 and log 2."""
    safe, bold, near = point(0.9, 0.4), point(0.88, 0.1), point(0.892, 0.2)
    assert regain(KEEP, 0.0) == pytest.approx(0.03)
    assert regain(KEEP, 0.75) == pytest.approx(0.0075)
    chances = [1 - (0.895 - p.val) / 0.03 for p in (bold, near)]
    gains = [chance * math.log(factor) for chance, factor in zip(chances, (4, 2), strict=True)]
    assert gains[0] > gains[1]
    assert following([bold, near], [safe]) is bold
    assert following([replace(bold, val=0.87), near], [safe]) is near
    assert following([bold, near], [safe, point(0.9, 0.05)], insure=False) is None, "dearer than what stands"


def test_the_first_keeps_the_score_with_the_reserve() -> None:
    edge, safe = point(0.892, 0.1), point(0.896, 0.3)
    assert following([edge, safe], []) is safe
    assert following([edge], [safe]) is edge


def test_a_target_that_is_met_goes_before_a_gain() -> None:
    slow, meets, cheaper = point(0.9, 0.8), point(0.88, 0.39), point(0.87, 0.1)
    assert following([slow, meets, cheaper], []) is slow
    assert following([meets, cheaper], [slow]) is meets
    assert following([cheaper, point(0.9, 0.5)], [slow, meets]) is cheaper, "meets lacks score, so it does not stand"


def test_without_a_safe_candidate_the_nearest_comes_first() -> None:
    near, far, costly = point(0.88, 0.3), point(0.87, 0.2), point(0.5, 0.9)
    assert schedule([far, costly, near]) == [near, far, costly]
    assert following([], []) is None


@given(POINTS, st.booleans())
@settings(max_examples=50, deadline=None)
def test_insured_finals_lose_nobody(points: list[Point], trained: bool) -> None:
    found = schedule(points, float(trained))
    assert sorted(map(repr, found)) == sorted(map(repr, points))


@given(POINTS)
@settings(max_examples=50, deadline=None)
def test_ranking_loses_nobody(points: list[Point]) -> None:
    assert sorted(map(id, ranking(points, BASE, BOTH, KEEP))) == sorted(map(id, points))


def test_the_volume_by_hand() -> None:
    floor = 0.88
    assert front_volume([], BASE, LATENCY, floor) == 0.0
    assert front_volume([BASE], BASE, LATENCY, floor) == pytest.approx((REFERENCE - 1.0) / REFERENCE)
    # the score of the baseline at 0.4 of its latency: all of the box but the part below 0.4
    assert front_volume([point(0.9, 0.4)], BASE, LATENCY, floor) == pytest.approx((REFERENCE - 0.4) / REFERENCE)
    # half of the allowed loss
    assert front_volume([point(0.89, 0.4)], BASE, LATENCY, floor) == pytest.approx(0.5 * (REFERENCE - 0.4) / REFERENCE)
    assert front_volume([point(0.88, 0.01)], BASE, LATENCY, floor) == 0.0, "at the floor nothing counts"
    assert front_volume([point(0.99, 0.4)], BASE, LATENCY, floor) == front_volume(
        [point(0.9, 0.4)], BASE, LATENCY, floor
    ), "more score than the baseline's adds nothing"
    whole = front_volume([point(0.9, 0.4, 0.2)], BASE, BOTH, floor)
    assert whole == pytest.approx((REFERENCE - 0.4) * (REFERENCE - 0.2) / REFERENCE**2)


@given(POINTS, POINTS)
@settings(max_examples=60, deadline=None)
def test_the_volume_grows_with_the_points_and_stays_a_share(points: list[Point], more: list[Point]) -> None:
    less, all_ = (front_volume(some, BASE, BOTH, 0.8) for some in (points, points + more))
    assert 0.0 <= less <= all_ + 1e-12 <= 1.0 + 1e-9
