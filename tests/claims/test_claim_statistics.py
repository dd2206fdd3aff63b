import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from claims._statistics import interval, judge

numbers = st.floats(-100, 100, allow_nan=False)


@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=12))
def test_interval_and_verdict_agree_with_scipy(pairs):
    method, baseline = (list(side) for side in zip(*pairs, strict=True))
    assume(np.std(np.subtract(method, baseline)) > 1e-6)  # scipy divides by it; constant differences are tested below
    verdict = judge(method, baseline, "higher")
    wanted = stats.ttest_rel(method, baseline).confidence_interval(0.95)
    assert verdict.ci95 == pytest.approx((wanted.low, wanted.high), rel=1e-9, abs=1e-9)
    assert verdict.mean_method == pytest.approx(np.mean(method))
    assert verdict.mean_baseline == pytest.approx(np.mean(baseline))
    p_greater = stats.ttest_rel(method, baseline, alternative="greater").pvalue
    if abs(p_greater - 0.025) > 1e-6 and abs(p_greater - 0.975) > 1e-6:
        assert verdict.holds == (p_greater < 0.025)
        assert judge(method, baseline, "lower").holds == (p_greater > 0.975)


def test_interval_by_hand():
    # differences 1, 2, 3: mean 2, s = 1, t(2) at 97.5% is 4.30265
    half = 4.302652729911275 / math.sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half), rel=1e-9)


def test_pairing_matters():
    baseline = [1.0, 10.0, 100.0]
    method = [1.1, 10.12, 100.09]  # always about a tenth better, far less than the spread between seeds
    assert judge(method, baseline, "higher").holds is True
    assert judge(method[::-1], baseline, "higher").holds is False


def test_direction():
    lower, higher = [1.0, 1.1, 0.9], [2.0, 2.1, 1.95]
    assert judge(lower, higher, "lower").holds is True
    assert judge(lower, higher, "higher").holds is False
    assert judge(higher, lower, "higher").holds is True
    assert judge(higher, lower, "lower").holds is False


def test_a_difference_within_the_noise_does_not_hold_either_way():
    method, baseline = [1.0, 2.0, 3.0], [1.5, 1.5, 2.9]
    assert judge(method, baseline, "higher").holds is False
    assert judge(method, baseline, "lower").holds is False


def test_constant_differences_have_an_interval_of_width_zero():
    verdict = judge([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], "higher")
    assert verdict.ci95 == (1.0, 1.0)
    assert verdict.holds is True
    equal = judge([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "higher")
    assert equal.ci95 == (0.0, 0.0)
    assert equal.holds is False


def test_parity_needs_the_whole_interval_inside_the_margin():
    method, baseline = [1.00, 1.01, 0.99], [1.0, 1.0, 1.0]  # interval about -+0.025
    assert judge(method, baseline, "higher", parity=0.03).holds is True
    assert judge(method, baseline, "higher", parity=0.02).holds is False
    above = [value + 1 for value in method]
    below = [value - 1 for value in method]
    assert judge(above, baseline, "higher", parity=0.03).holds is False
    assert judge(below, baseline, "higher", parity=0.03).holds is False


def test_ratio_of_means_not_mean_of_ratios():
    assert judge([1.0, 9.0], [2.0, 3.0], "lower").ratio == pytest.approx(10 / 5)
    assert judge([1.0, 2.0], [-1.0, 1.0], "lower").ratio is None


def test_one_seed_judges_nothing():
    verdict = judge([2.0], [1.0], "higher")
    assert (verdict.ci95, verdict.holds, verdict.ratio) == (None, None, 2.0)


def test_unpaired_lists_are_refused():
    with pytest.raises(ValueError, match="zip"):
        judge([1.0, 2.0], [1.0], "higher")
