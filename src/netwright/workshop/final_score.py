"""The test split, read once for each model: scores, and how sure they are."""

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from netwright.core.errors import TaskError
from netwright.core.evaluate import Model, evaluate, predict, score_interval, score_outputs
from netwright.core.task import Task

__all__ = ["FinalScore", "FinalScores", "final_score", "final_scores"]

_ENDS = (0.025, 0.975)  # of an interval that holds 95%


@dataclass(frozen=True)
class FinalScore:
    """A score on the test split.

    Args:
        score: the score.
        interval: its 95% interval over the items; None where the task scores by a function of its own, and where the
            score is undefined on most draws of the items, or too slow for so many.
    """

    score: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class FinalScores:
    """Two models on the test split.

    Args:
        before: the one.
        after: the other.
        change: 95% interval of ``after - before`` on the same items; None where there is none.
    """

    before: FinalScore
    after: FinalScore
    change: tuple[float, float] | None


def final_score(task: Task, model: Model) -> FinalScore:
    """The score of one model on the test split."""
    if task.evaluate is not None:
        return FinalScore(evaluate(model, task, "test"), None)
    outputs, targets = predict(model, task, "test")
    return FinalScore(score_outputs(task, outputs, targets), _interval(task, outputs, targets))


def final_scores(task: Task, before: Model, after: Model) -> FinalScores:
    """The scores of two models on the test split, and how sure their difference is.

    The three intervals are of the same draws of the items, so that each draw is scored once for each model.
    """
    if task.evaluate is not None:
        return FinalScores(final_score(task, before), final_score(task, after), None)
    first, targets = predict(before, task, "test")
    second, _ = predict(after, task, "test")
    scores = [score_outputs(task, outputs, targets) for outputs in (first, second)]
    drawn: list[list[float]] = []

    def difference(outputs: Any, targets: Tensor) -> float:
        drawn.append([_try_score(task, each, targets) for each in outputs])
        return drawn[-1][1] - drawn[-1][0]

    change = _interval(replace(task, score=difference), (first, second), targets)
    if change is None:
        return FinalScores(FinalScore(scores[0], None), FinalScore(scores[1], None), None)
    ends = np.nanquantile(np.array(drawn), _ENDS, axis=0).T.tolist()
    one, other = (FinalScore(score, (low, high)) for score, (low, high) in zip(scores, ends, strict=True))
    return FinalScores(one, other, change)


def _interval(task: Task, outputs: Any, targets: Tensor) -> tuple[float, float] | None:
    with suppress(TaskError):  # a score that most draws of the items leave undefined has none
        return score_interval(task, outputs, targets)
    return None


def _try_score(task: Task, outputs: Any, targets: Tensor) -> float:
    try:
        return score_outputs(task, outputs, targets)
    except TaskError:  # a draw with one class only, say
        return math.nan
