"""OMPQ against naive sums and exhaustive search."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.compress._quantizers import WeightQuantizer
from netwright.compress.ompq import OMPQ, _allocate, _importance, _orthogonality
from netwright.core.data import Data
from netwright.core.errors import TransformError
from netwright.core.task import Task
from netwright.testing import check_transform
from tests.compress.zoo_tasks import zoo_task


def naive_cka(x, y):
    """By loops over items, in the form of covariances."""
    x, y = x - x.mean(0), y - y.mean(0)

    def product(a, b):
        total = 0.0
        for i in range(a.shape[1]):
            for j in range(b.shape[1]):
                total += sum(a[k, i] * b[k, j] for k in range(len(a))) ** 2
        return total

    return product(x, y) / (product(x, x) * product(y, y)) ** 0.5


def test_cka_equals_loops():
    random = np.random.default_rng(0)
    outputs = [random.normal(size=(6, width)) for width in (3, 5, 2)]
    found = _orthogonality(outputs)
    for i, j in itertools.product(range(3), repeat=2):
        assert found[i, j] == pytest.approx(naive_cka(outputs[i], outputs[j]), rel=1e-10)


def test_importance_by_hand():
    """A layer like the others counts less, and each takes the mean with those after it."""
    similarity = np.array([[1.0, 0.9, 0.8], [0.9, 1.0, 0.1], [0.8, 0.1, 1.0]])
    first, second, third = np.exp(-1.7), np.exp(-1.0), np.exp(-0.9)
    wanted = [(first + second + third) / 3, (second + third) / 2, third]
    assert _importance(similarity, 2.0) == pytest.approx(wanted)
    assert _importance(np.ones((1, 1)), 2.0) == pytest.approx([1.0])


def test_outputs_and_weights_are_those_of_the_layers():
    """From the inputs to the rounded weights, by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(16, 5)
    splits = [TensorDataset(x, torch.zeros(16).long()) for _ in range(3)]
    task = Task("three", lambda: model, Data(*splits), nn.functional.cross_entropy, lambda o, t: 0.0)
    outputs = [model[: place + 1](x).detach().numpy().astype(float) for place in (0, 2, 4)]
    alike = np.array([[naive_cka(one, two) for two in outputs] for one in outputs])
    own = np.exp(-1.5 * (alike.sum(1) - 1) / 2)
    theta = [own[place:].mean() for place in range(3)]
    settings = OMPQ(4.3, bits=(2, 4, 7), beta=1.5, items=16)
    found = settings.importance(model, task)
    assert list(found) == ["0.weight", "2.weight", "4.weight"]
    assert list(found.values()) == pytest.approx(theta, rel=1e-5)
    sizes, best, chosen = (35, 28, 12), -1.0, ()
    for bits in itertools.product((2, 4, 7), repeat=3):
        value = float(np.dot(theta, bits))
        if np.dot(sizes, bits) <= 4.3 * 75 and value > best:
            best, chosen = value, bits
    rounded = settings(model, task)
    for name, bits in zip(found, chosen, strict=True):
        weight = model.get_parameter(name).detach().numpy().astype(float)
        step = abs(weight).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
        got = rounded.get_submodule(f"{name}_quantizer")(rounded.get_parameter(name)).detach().numpy()
        assert got == pytest.approx(np.rint(weight / step) * step, abs=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_allocation_equals_exhaustive_search(seed):
    random = np.random.default_rng(seed)
    importance, sizes = random.uniform(0.1, 1, 4), random.integers(1, 50, 4).astype(float)
    limit, bits = 4.3 * sizes.sum(), (2, 3, 4, 6, 8)
    best = max(sum(importance * choice) for choice in itertools.product(bits, repeat=4) if sum(sizes * choice) <= limit)
    chosen = _allocate(importance, sizes, bits, limit)
    assert sum(sizes * chosen) <= limit + 1e-9
    assert sum(importance * chosen) == pytest.approx(best, rel=1e-6)


def test_behaves_as_a_transform():
    check_transform(lambda: OMPQ(5.0), onnx_tolerance=0.02)  # the runtime may round activations in products of its own


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"bits": (1,)}, "from 2 to 8"), ({"average_bits": 1.5}, "smallest reachable is 2"), ({"items": 1}, "items")],
)
def test_refuses(settings, message):
    with pytest.raises(TransformError, match=message):
        OMPQ(**settings)


@pytest.mark.parametrize("name", ["resnet", "mlp-mixer", "siamese", "two-inputs", "hf-bert", "gru"])
def test_runs_on_models_of_many_kinds(name):
    model, task = zoo_task(name)
    result = OMPQ(4.0)(model, task)
    widths = {2 ** (bits - 1) - 1: bits for bits in range(2, 9)}
    spent = total = 0
    for path, each in result.named_modules():
        if isinstance(each, WeightQuantizer):
            count = result.get_parameter(path.removesuffix("_quantizer")).numel()
            spent, total = spent + count * widths[each.integers.high], total + count
    assert 0 < spent <= 4.0 * total
    assert all(value.isfinite().all() for value in flat(task.outputs(result, task.example())))


def flat(output):
    return [output] if isinstance(output, torch.Tensor) else list(output)


def test_what_cannot_be_ranked():
    model, task = zoo_task("gated-mlp")
    one = dataclasses.replace(task, data=Data(task.data.train[:1], task.data.val, task.data.test))
    with pytest.raises(TransformError, match="at least 2 training items"):
        OMPQ()(model, one)
    wild = [(item * torch.inf, target) for item, target in task.data.train]
    with pytest.raises(TransformError, match="not finite on training data"):
        OMPQ()(model, dataclasses.replace(task, data=Data(wild, task.data.val, task.data.test)))
    with pytest.raises(TransformError, match="nothing to quantize"):
        OMPQ()(nn.Sequential(nn.Tanh()), task)
