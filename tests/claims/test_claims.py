"""Every claim runs, small: none may rot."""

import math

import pytest

from claims._harness import find, load

NAMES = list(find())


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_small(name: str) -> None:
    claim = load(name)
    found = claim.run(0, smoke=True)
    assert {"method", "baseline"} <= set(found)
    assert all(math.isfinite(value) for value in found.values())


def test_there_are_claims() -> None:
    assert len(NAMES) > 20
