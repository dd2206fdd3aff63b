"""How predictors see what was measured: the good side plainly, the bad side dimly."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scale", "bounded"]

Array: TypeAlias = NDArray[np.float64]
_LARGEST = 1e150
_FARTHEST = 1e100


class Scale:
    r"""The scale of each objective, told from the first, random points; how bad the bad is does not count.

    With ``m`` the median and ``w = m - best`` the width of the good side of the first points, an objective becomes ``z
    = (y - m) / w`` where ``y <= m`` and ``z = log(1 + (y - m) / w)`` beyond: smooth, one to one, and blind to the long
    tail of candidates that do not work at all, which would else take up a predictor's whole attention. The hypervolume
    ends at ``m + 2 w``. Values are taken within 1e150 of 0 and ``z`` within 1e100, so that no number overflows.

    Args:
        values: all points ``(n, m)``, to be minimized.
        start: how many of them were random.
    """

    def __init__(self, values: Array, start: int) -> None:
        values = np.clip(values, -_LARGEST, _LARGEST)
        first = values[:start]
        self.middle = np.median(first, axis=0)
        width = self.middle - first.min(0)
        width = np.where(width > 0, width, self.middle - values.min(0))
        width = np.where(width > 0, width, values.std(0))
        self.width = np.where(width > 0, width, 1.0)

    def reference(self) -> Array:
        """Where the hypervolume ends, ``(m,)``."""
        found: Array = self.middle + 2.0 * self.width
        return found

    def warp(self, values: Array) -> Array:
        """``z`` of ``y``."""
        with np.errstate(over="ignore"):
            far = (np.clip(values, -_LARGEST, _LARGEST) - self.middle) / self.width
        far = np.clip(far, -_FARTHEST, _FARTHEST)
        return np.where(far > 0, np.log1p(np.maximum(far, 0.0)), far)

    def unwarp(self, warped: Array) -> Array:
        """``(y - m) / w`` of ``z``, in which the reference is 2."""
        return np.where(warped > 0, np.expm1(np.clip(warped, 0.0, 50.0)), warped)


def bounded(violations: Array) -> Array:
    """``v / w`` up to 1, ``1 + log(v / w)`` beyond, with ``w`` three times the median of ``|v|``.

    How far beyond a limit the far ones are counts little: else some candidates that do not work at all make a predictor
    so unsure of everything that none looks infeasible.
    """
    violations = np.clip(violations, -_LARGEST, _LARGEST)
    width = 3.0 * float(np.median(np.abs(violations))) or float(np.abs(violations).max()) or 1.0
    share = violations / width
    return np.where(share > 1, 1.0 + np.log(np.maximum(share, 1.0)), share)
