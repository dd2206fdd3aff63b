"""Scores on the test split against the intervals of the core, and what they cost."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from netwright.core.data import Data
from netwright.core.evaluate import evaluate, paired_interval, predict, score_interval
from netwright.core.score import accuracy
from netwright.core.task import Task
from netwright.workshop.final_score import FinalScore, final_score, final_scores


def data() -> Data:
    parts = []
    for start in range(3):
        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(start))
        parts.append(TensorDataset(x, (x.sum(1) > 0).long()))
    return Data(*parts)


class Counting:
    """Accuracy, and how often it was asked for."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Any, targets: Tensor) -> float:
        self.calls += 1
        return accuracy(outputs, targets)


def subject(score: Any = accuracy, **more: Any) -> tuple[Task, nn.Module, nn.Module]:
    """A task with two networks, the second one the better."""
    torch.manual_seed(1)
    worse, better = nn.Linear(4, 2), nn.Linear(4, 2)
    with torch.no_grad():
        better.weight.copy_(torch.tensor([[-1.0, -0.5, -1, -1], [1, 0.5, 1, 1]]))
    return Task("sums", worse, data(), nn.functional.cross_entropy, score, **more), worse, better


def test_the_intervals_are_those_of_the_core_for_half_the_scores() -> None:
    score = Counting()
    task, worse, better = subject(score)
    found = final_scores(task, worse, better)
    calls, score.calls = score.calls, 0
    (a, targets), (b, _) = (predict(model, task, "test") for model in (worse, better))
    assert found.before == FinalScore(evaluate(worse, task, "test"), pytest.approx(score_interval(task, a, targets)))
    assert found.after == FinalScore(evaluate(better, task, "test"), pytest.approx(score_interval(task, b, targets)))
    assert found.change == pytest.approx(paired_interval(task, a, b, targets))
    assert found.change[0] > 0, "the second is better"
    assert (calls, score.calls) == (2 + 2000, 2 + 4000)
    assert final_score(task, better) == found.after


def test_draws_on_which_the_score_is_undefined_do_not_count() -> None:
    def picky(outputs: Tensor, targets: Tensor) -> float:
        if int(targets.sum()) % 4 == 0:
            raise ValueError("undefined")
        return accuracy(outputs, targets)

    task, worse, better = subject(picky)
    found = final_scores(task, worse, better)
    (a, targets), (b, _) = (predict(model, task, "test") for model in (worse, better))
    assert found.before.interval == pytest.approx(score_interval(task, a, targets))
    assert found.after.interval == pytest.approx(score_interval(task, b, targets))
    assert found.change == pytest.approx(paired_interval(task, a, b, targets))


def test_a_score_that_is_mostly_undefined_has_no_interval() -> None:
    task, worse, better = subject()
    whole = task.data.test[:][1]

    def once(outputs: Tensor, targets: Tensor) -> float:
        if not torch.equal(targets, whole):
            raise ValueError("undefined")
        return accuracy(outputs, targets)

    found = final_scores(replace(task, score=once), worse, better)
    assert found.before == FinalScore(evaluate(worse, task, "test"), None)
    assert found.after == FinalScore(evaluate(better, task, "test"), None)
    assert found.after == final_score(replace(task, score=once), better)
    assert found.change is None


def test_a_task_that_scores_by_itself_is_asked_once_for_each() -> None:
    task, worse, better = subject(None, evaluate=lambda model, split: float(model is better))
    found = final_scores(task, worse, better)
    assert (found.before, found.after, found.change) == (FinalScore(0.0, None), FinalScore(1.0, None), None)


def test_outputs_may_be_several_tensors() -> None:
    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"first": self.inner(x), "second": x}

    task, worse, better = subject()
    plain = final_scores(task, worse, better)
    several = replace(task, score=lambda outputs, targets: accuracy(outputs["first"], targets))
    assert final_scores(several, Twice(worse), Twice(better)) == plain
