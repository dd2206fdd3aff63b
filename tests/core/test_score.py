"""Scores against transcriptions in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netwright.core.errors import TaskError
from netwright.core.score import accuracy, class_rows, negative_bits, negative_perplexity, r2


@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 7), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_class_scores_against_plain_python(n: int, time: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(n, time, classes, generator=generator)
    targets = torch.randint(-1, classes, (n, time), generator=generator)
    targets[0, 0] = 0
    hits, bits, count = 0, 0.0, 0
    for i in range(n):
        for t in range(time):
            if targets[i, t] < 0:
                continue
            logits = outputs[i, t].tolist()
            hits += max(range(classes), key=logits.__getitem__) == int(targets[i, t])
            bits += math.log2(math.exp(logits[int(targets[i, t])]) / sum(map(math.exp, logits)))
            count += 1
    assert accuracy(outputs, targets) == pytest.approx(hits / count)
    assert negative_bits(outputs, targets) == pytest.approx(bits / count, abs=1e-5)
    assert negative_perplexity(outputs, targets) == pytest.approx(-(2 ** (-bits / count)), rel=1e-5)


def test_classes_stand_second_in_a_segmentation() -> None:
    outputs = torch.randn(2, 3, 4, 5)
    targets = torch.randint(3, (2, 4, 5))
    assert accuracy(outputs, targets) == pytest.approx(float((outputs.argmax(1) == targets).float().mean()))
    rows = class_rows(outputs, targets)
    assert rows is not None
    assert rows[0].shape == (40, 3)


@given(st.integers(3, 20), st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_r2_against_plain_python(n: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs, targets = torch.randn(2, n, columns, generator=generator)
    scores = []
    for column in range(columns):
        y, z = targets[:, column].tolist(), outputs[:, column].tolist()
        mean = sum(y) / n
        residual = sum((a - b) ** 2 for a, b in zip(y, z, strict=True))
        scores.append(1 - residual / sum((a - mean) ** 2 for a in y))
    assert r2(outputs, targets) == pytest.approx(sum(scores) / columns, rel=1e-6, abs=1e-6)
    assert r2(outputs[:, :1], targets[:, 0]) == pytest.approx(scores[0], rel=1e-6, abs=1e-6)


def test_better_is_higher() -> None:
    targets = torch.tensor([0, 1])
    good, bad = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    for score in (accuracy, negative_bits, negative_perplexity):
        assert score(good, targets) > score(bad, targets)
    assert r2(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])) > r2(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2]))


def test_refusals() -> None:
    with pytest.raises(TaskError, match=r"outputs 4x3 .* targets 5 "):
        accuracy(torch.zeros(4, 3), torch.zeros(5).long())
    with pytest.raises(TaskError, match="every one is negative"):
        accuracy(torch.zeros(2, 3), torch.tensor([-100, -100]))
    with pytest.raises(TaskError, match="got outputs tuple"):
        accuracy((torch.zeros(2, 3),), torch.zeros(2).long())  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(TaskError, match="one shape, got 4 and 5"):
        r2(torch.zeros(4), torch.zeros(5))
    with pytest.raises(TaskError, match="same for every item"):
        r2(torch.zeros(4), torch.ones(4))
