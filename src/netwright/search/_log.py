"""The logs of a search: a line for each evaluation, as it is written and as it is read again."""

import math
import operator
from collections.abc import Mapping
from typing import Any

from netwright.search._encoding import restored
from netwright.search.result import Evaluation
from netwright.search.space import SearchSpace

__all__ = ["BEGUN", "EVALUATIONS", "entry_of", "line_of", "number_of"]

EVALUATIONS = "evaluations.jsonl"
"""The log of a run directory with one line for every finished evaluation."""
BEGUN = "begun.jsonl"
"""The log of what a process began to evaluate, and of what it was interrupted in."""


def line_of(entry: Evaluation) -> dict[str, Any]:
    """An evaluation as a line of the log."""
    return {
        "trial": entry.number,
        "state": "failed" if entry.metrics is None else "ok",
        "params": dict(entry.params),
        "metrics": None if entry.metrics is None else dict(entry.metrics),
        "error": entry.error,
        "violations": list(entry.violations),
        "seconds": entry.seconds,
    }


def entry_of(line: Mapping[str, Any], space: SearchSpace) -> Evaluation:
    """The evaluation in a line of the log; to be called within :func:`netwright.core.records.reading_line`."""
    params, metrics = restored(line["params"], space), line["metrics"]
    return Evaluation(
        operator.index(line["trial"]),
        params,
        None if metrics is None else {name: number_of(value) for name, value in metrics.items()},
        line["error"],
        tuple(map(number_of, line["violations"])),
        number_of(line["seconds"]),
    )


def number_of(value: Any) -> float:
    """A number out of a log.

    Raises:
        TypeError: it is another value.
        ValueError: it is NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    if not math.isfinite(value):
        raise ValueError(f"{value!r} is not finite")
    return value
