"""EasyQuant against a brute-force search in float64."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.compress._quantizers import WeightQuantizer
from netwright.compress.easy_quant import EasyQuant
from netwright.core.data import Data
from netwright.core.errors import TransformError
from netwright.core.task import Task
from netwright.testing import check_transform
from tests.compress.zoo_tasks import zoo_task


def test_weight_scales_equal_brute_force():
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    x = torch.rand(16, 6)
    splits = [TensorDataset(x, torch.zeros(16).long()) for _ in range(3)]
    task = Task("one", lambda: layer, Data(*splits), nn.functional.cross_entropy, lambda o, t: 0.0)
    found = EasyQuant(bits=6, rounds=1, candidates=9, calibration_items=16)(layer, task)
    (quantizer,) = [each for each in found.modules() if isinstance(each, WeightQuantizer)]
    top = x.numpy().astype(float).max()
    data = np.clip(np.rint(x.numpy().astype(float) / (top / 63)), 0, 63) * (top / 63)
    bias = layer.bias.detach().numpy().astype(float)
    for channel, row in enumerate(layer.weight.detach().numpy().astype(float)):
        exact = x.numpy().astype(float) @ row + bias[channel]
        best, chosen = -2.0, 0.0
        for factor in sorted([*np.linspace(0.4, 1.2, 9), 1.0], key=lambda each: abs(each - 1)):
            step = abs(row).max() / 31 * factor
            output = data @ (np.clip(np.rint(row / step), -31, 31) * step) + bias[channel]
            score = exact @ output / np.sqrt(exact @ exact * (output @ output))
            if score > best + 1e-9:
                best, chosen = score, step
        assert float(quantizer.scale[channel]) == pytest.approx(chosen, rel=1e-5)


def test_behaves_as_a_transform():
    check_transform(lambda: EasyQuant(candidates=3, rounds=1, reduce_range=True), onnx_tolerance=0.05)


@pytest.mark.parametrize("bits", [5, 9, True, 7.5])
def test_refuses_bits(bits):
    with pytest.raises(TransformError, match="8, 7 or 6"):
        EasyQuant(bits=bits)


@pytest.mark.parametrize("name", ["resnet", "mobilenet-v2", "siamese", "hf-bert"])
def test_runs_on_models_of_many_kinds(name):
    model, task = zoo_task(name)
    result = EasyQuant(6, candidates=3, rounds=1, calibration_items=8)(model, task)
    wanted, found = (task.outputs(each, task.example()).detach() for each in (model, result))
    cosine = nn.functional.cosine_similarity(wanted.flatten(), found.flatten(), 0)
    assert float(cosine) > 0.9


def test_a_weight_that_two_layers_read_is_fitted_once():
    model, task = zoo_task("siamese")
    seen = []
    for each in (EasyQuant(6, candidates=5, rounds=1, calibration_items=8)(model, task) for _ in range(2)):
        seen.append([module.scale for module in each.modules() if isinstance(module, WeightQuantizer)])
    assert len(seen[0]) < sum(1 for _ in model.parameters())
    for one, two in zip(*seen, strict=True):
        assert torch.equal(one, two)


def test_outputs_that_cannot_tell_scales_apart_keep_the_full_range():
    """The cosine does not see a common factor: with one feature all factors are equally good."""
    layer = nn.Linear(1, 2, bias=False)
    splits = [TensorDataset(torch.ones(4, 1), torch.zeros(4).long()) for _ in range(3)]
    task = Task("one", lambda: layer, Data(*splits), nn.functional.cross_entropy, lambda o, t: 0.0)
    found = EasyQuant(8)(layer, task)
    assert torch.allclose(found(torch.ones(1, 1)), layer(torch.ones(1, 1)), rtol=0.01)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"candidates": 1}, "candidates"), ({"rounds": 0}, "rounds"), ({"calibration_items": 0.5}, "calibration_items")],
)
def test_refuses_counts(settings, said):
    with pytest.raises(TransformError, match=f"EasyQuant.{said} must be"):
        EasyQuant(**settings)


def test_nothing_to_quantize():
    _, task = zoo_task("gated-mlp")
    with pytest.raises(TransformError, match="EasyQuant: Sequential has no convolution or linear layer"):
        EasyQuant()(nn.Sequential(nn.Tanh()), task)
