"""Predictions, scores and their intervals."""

import math
import time
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import netwright.core.evaluate as core_evaluate
from netwright.core.data import Data
from netwright.core.errors import TaskError
from netwright.core.evaluate import evaluate, paired_interval, predict, score_interval, score_outputs
from netwright.core.score import accuracy
from netwright.core.task import Task


def make_task(size: int = 50, **changes: Any) -> Task:
    generator = torch.Generator().manual_seed(0)
    splits = [
        TensorDataset(torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(3)
    ]
    settings: dict[str, Any] = {
        "name": "noise",
        "model": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)),
        "data": Data(*splits),
        "loss": functional.cross_entropy,
        "score": accuracy,
    }
    return Task(**(settings | changes))


def test_predict_concatenates_every_kind_of_output() -> None:
    task = make_task()
    model = task.build()
    model[2].eval()
    expected = model.eval()(task.data.val.tensors[0])  # type: ignore[attr-defined]
    model.train()
    model[2].eval()
    outputs, targets = predict(model, task, "val", batch_size=7)
    assert torch.allclose(outputs, expected, atol=1e-6)
    assert not outputs.requires_grad
    assert torch.equal(targets, task.data.val.tensors[1])  # type: ignore[attr-defined]
    assert [part.training for part in model] == [True, True, False]
    pair = predict(lambda x: (x, x.sum(1)), task, "test", batch_size=7)[0]
    assert [tuple(part.shape) for part in pair] == [(50, 4), (50,)]
    named = predict(lambda x: {"a": x, "b": (x,)}, task, "test", batch_size=7)[0]
    assert named["b"][0].shape == (50, 4)
    half = predict(lambda x: x.bfloat16(), task, "test")[0]
    assert half.dtype == torch.float32


def test_predict_refuses() -> None:
    task = make_task()
    with pytest.raises(TaskError, match="no split 'validation'"):
        predict(task.build(), task, "validation")
    with pytest.raises(TaskError, match=r"returned a str .*Task\(output="):
        predict(lambda x: "word", task, "val")
    with pytest.raises(TaskError, match="first axis must be the batch"):
        predict(lambda x: x.sum(), task, "val", batch_size=7)


def test_a_metric_of_torchmetrics_scores_batch_by_batch() -> None:
    metric = MulticlassAccuracy(num_classes=3, average="micro")
    metric.update(torch.tensor([0]), torch.tensor([0]))
    task, plain = make_task(score=metric), make_task()
    model = task.build()
    assert evaluate(model, task, "test", batch_size=7) == pytest.approx(evaluate(model, plain, "test"))
    assert float(metric.compute()) == 1.0  # the user's own metric was not touched
    outputs, targets = predict(model, task, "test")
    assert score_outputs(task, outputs, targets) == pytest.approx(score_outputs(plain, outputs, targets))
    assert score_interval(task, outputs, targets, resamples=50) == pytest.approx(
        score_interval(plain, outputs, targets, resamples=50)
    )


def test_an_evaluation_of_the_users_own_wins() -> None:
    seen: list[tuple[str, bool, bool]] = []

    def own(model: nn.Module, split: str) -> float:
        seen.append((split, model.training, torch.is_grad_enabled()))
        return 0.25

    task = make_task(evaluate=own)
    model = task.build().train()
    assert evaluate(model, task, "val") == 0.25
    assert seen == [("val", False, False)]
    assert model.training
    with pytest.raises(TaskError, match=r"needs an nn\.Module"):
        evaluate(lambda x: x, task, "val")
    broken = make_task(score=None, evaluate=lambda model, split: next(iter(())))
    with pytest.raises(TaskError, match=r"evaluate\(model, 'val'\) raised StopIteration on a Sequential"):
        evaluate(model, broken, "val")
    with pytest.raises(TaskError, match="no score="):
        score_outputs(make_task(score=None, evaluate=own), torch.zeros(1), torch.zeros(1))


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (lambda o, t: math.nan, "is nan"),
        (lambda o, t: torch.tensor(math.inf), "is inf"),
        (lambda o, t: "good", "must be a number, got str"),
        (lambda o, t: torch.zeros(2), "must be a number, got Tensor"),
        (lambda o, t: o @ t, "raised RuntimeError on outputs of shape"),
        (lambda o, t: 1 / int((o.argmax(1) > 5).sum()), "raised ZeroDivisionError on outputs of shape"),
        (lambda o, t: {}["f1"], "raised KeyError on outputs of shape"),
    ],
)
def test_scores_that_are_not_finite_numbers(score: Any, said: str) -> None:
    task = make_task(score=score)
    with pytest.raises(TaskError, match=said):
        evaluate(task.build(), task, "val")


def test_interval_agrees_with_the_binomial() -> None:
    size, right = 400, 340
    task = make_task()
    targets = torch.zeros(size, dtype=torch.long)
    outputs = torch.zeros(size, 3)
    outputs[:right, 0] = 1
    outputs[right:, 1] = 1
    low, high = score_interval(task, outputs, targets, resamples=2000)
    expected = stats.binom.ppf([0.025, 0.975], size, right / size) / size
    assert (low, high) == pytest.approx(tuple(expected), abs=0.006)
    narrow = score_interval(task, outputs, targets, resamples=2000, level=0.5)
    assert low < narrow[0] < right / size < narrow[1] < high
    assert score_interval(task, outputs, targets, seed=1) != score_interval(task, outputs, targets, seed=2)
    assert score_interval(task, outputs, targets, seed=1) == score_interval(task, outputs, targets, seed=1)


def test_paired_interval_is_of_the_difference_b_minus_a() -> None:
    task, size = make_task(), 300
    targets = torch.zeros(size, dtype=torch.long)
    a = torch.zeros(size, 3)
    a[: size // 2, 0], a[size // 2 :, 1] = 1, 1
    b = a.clone()
    b[-30:] = torch.tensor([1.0, 0.0, 0.0])  # b gets 30 more right
    low, high = paired_interval(task, a, b, targets)
    assert 0.05 < low < 0.1 < high < 0.15
    assert paired_interval(task, b, a, targets) == pytest.approx((-high, -low))
    assert paired_interval(task, a, a, targets) == (0.0, 0.0)
    wide = [interval[1] - interval[0] for interval in (score_interval(task, a, targets), (low, high))]
    assert wide[1] < wide[0]  # pairing removes what is common


def test_intervals_leave_out_draws_without_a_score() -> None:
    def picky(outputs: Tensor, targets: Tensor) -> float:
        if targets.unique().numel() < 2:
            raise ValueError("one class only")
        return accuracy(outputs, targets)

    outputs, targets = torch.randn(6, 3), torch.tensor([0, 0, 0, 0, 0, 1])
    low, high = score_interval(make_task(score=picky), outputs, targets, resamples=300)
    assert 0 <= low <= high <= 1
    with pytest.raises(TaskError, match="undefined on most"):
        score_interval(make_task(score=picky), outputs, torch.zeros(6).long())


def test_large_outputs_get_fewer_resamples() -> None:
    calls: list[int] = []

    def counting(outputs: Tensor, targets: Tensor) -> float:
        calls.append(len(targets))
        return 0.5

    score_interval(make_task(score=counting), torch.zeros(2, 2_000_000), torch.zeros(2))
    assert len(calls) == 125


def test_slow_scores_get_fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, pause = [0], 0.005

    def sleeping(outputs: Tensor, targets: Tensor) -> float:
        calls[0] += 1
        time.sleep(pause)
        return accuracy(outputs, targets)

    def called(*outputs: Tensor, resamples: int = 1000) -> int:
        calls[0] = 0
        (paired_interval if len(outputs) == 2 else score_interval)(task, *outputs, targets, resamples=resamples)
        return calls[0]

    task, outputs, targets = make_task(score=sleeping), torch.randn(50, 3), torch.randint(3, (50,))
    monkeypatch.setattr(core_evaluate, "_SECONDS", 0.75)
    assert 100 <= called(outputs) <= 150
    assert called(outputs, outputs + 1) == 200, "fewer draws say nothing"
    assert called(outputs, resamples=10) == 10
    monkeypatch.setattr(core_evaluate, "_SECONDS", 0.05)
    monkeypatch.setattr(core_evaluate, "_LONGEST", 0.4)
    assert called(outputs, resamples=20) == 20
    with pytest.raises(TaskError, match=r"takes 0\.0\d+ s is too slow for an interval"):
        called(outputs)
    assert calls[0] <= 11


def test_a_first_call_that_is_slow_is_no_slow_score(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def loading(outputs: Tensor, targets: Tensor) -> float:
        calls.append(len(targets))
        time.sleep(0.2 if len(calls) == 1 else 0)
        return accuracy(outputs, targets)

    monkeypatch.setattr(core_evaluate, "_SECONDS", 0.1)
    low, high = score_interval(make_task(score=loading), torch.randn(50, 3), torch.randint(3, (50,)))
    assert low < high
    assert len(calls) == 100
