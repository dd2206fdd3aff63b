"""What the numbers of a few seeds say: paired differences and their interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

__all__ = ["Verdict", "interval", "judge"]

_LEVEL = 0.95


@dataclass(frozen=True)
class Verdict:
    """The comparison of a method with its baseline over paired seeds.

    ``ratio`` is None where the baseline's mean is 0; ``ci95`` (of method - baseline) and ``holds`` are None where
    there is one seed only.
    """

    mean_method: float
    mean_baseline: float
    ratio: float | None
    ci95: tuple[float, float] | None
    holds: bool | None


def judge(method: Sequence[float], baseline: Sequence[float], better: str, parity: float | None = None) -> Verdict:
    """Whether the paired difference ``method - baseline`` is what the claim says.

    Without ``parity`` the claim holds when the 95% interval of the mean difference lies wholly above 0 (``better`` is
    "higher") or below it ("lower"). With ``parity`` it holds when the interval lies within ``[-parity, parity]``.

    Example:
        >>> judge([3.0, 4.0, 5.0], [1.0, 2.0, 2.5], "higher").holds
        True
        >>> judge([3.0, 4.0, 5.0], [1.0, 2.0, 2.5], "lower").holds
        False
    """
    mean_method, mean_baseline = math.fsum(method) / len(method), math.fsum(baseline) / len(baseline)
    ratio = mean_method / mean_baseline if mean_baseline else None
    differences = [a - b for a, b in zip(method, baseline, strict=True)]
    if len(differences) < 2:
        return Verdict(mean_method, mean_baseline, ratio, None, None)
    low, high = interval(differences)
    return Verdict(mean_method, mean_baseline, ratio, (low, high), _holds(low, high, better, parity))


def _holds(low: float, high: float, better: str, parity: float | None) -> bool:
    if parity is not None:
        return -parity <= low and high <= parity
    return low > 0 if better == "higher" else high < 0


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of the mean of ``values`` by Student's t: ``mean -+ t(n - 1) s / sqrt(n)``.

    Example:
        >>> [round(end, 3) for end in interval([1.0, 2.0, 3.0])]
        [-0.484, 4.484]
    """
    count = len(values)
    mean = math.fsum(values) / count
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stats.t.ppf((1 + _LEVEL) / 2, count - 1)) * spread / math.sqrt(count)
    return mean - half, mean + half
