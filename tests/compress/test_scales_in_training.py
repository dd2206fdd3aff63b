"""Scales that were searched for stay what they are, in units of the weights, when training goes on."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.compress import EasyQuant, Int8
from netwright.compress._quantizers import WeightQuantizer
from netwright.core.artifact import export_onnx, load_weights, save_weights
from netwright.core.data import Data
from netwright.core.errors import ArtifactError
from netwright.core.task import Task


def task() -> Task:
    torch.manual_seed(0)
    splits = [TensorDataset(torch.rand(32, 6), torch.zeros(32).long()) for _ in range(3)]
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return Task("scales", model, Data(*splits), nn.functional.cross_entropy, lambda output, _: 0.0)


def quantizers(model: nn.Module) -> dict[str, WeightQuantizer]:
    return {name: part for name, part in model.named_modules() if isinstance(part, WeightQuantizer)}


def test_scales_follow_weights_by_the_factors_of_the_search():
    given = task()
    found = EasyQuant(6, candidates=9)(given.model, given)
    before = {name: part.scale.clone() for name, part in quantizers(found).items()}
    plain = {name: part.scale for name, part in quantizers(Int8(weight_bits=6)(given.model, given)).items()}
    ratios = {name: scale / plain[name] for name, scale in before.items()}
    assert any(bool((ratio != 1).any()) for ratio in ratios.values())
    found.train()(given.example(4))
    for name, part in quantizers(found).items():
        assert torch.equal(part.scale, before[name])
    with torch.no_grad():
        for value in found.parameters():
            value.mul_(3.0)
    found(given.example(4))
    for name, part in quantizers(found).items():
        torch.testing.assert_close(part.scale, 3 * before[name])
        torch.testing.assert_close(part.factor, ratios[name])


def test_a_model_rebuilt_and_loaded_trains_on(tmp_path):
    given = task()
    found = EasyQuant(6, candidates=9)(given.model, given)
    save_weights(found, tmp_path / "found.safetensors")
    other = EasyQuant(6, candidates=2, rounds=1)(given.model, given)
    load_weights(other, tmp_path / "found.safetensors")
    other.train()(given.example(4))
    for name, part in quantizers(other).items():
        assert torch.equal(part.scale, found.get_submodule(name).scale)


def test_weights_written_without_factors_are_refused_by_name_where_they_are_missing(tmp_path):
    given = task()
    old, new = Int8(weight_bits=6)(given.model, given), EasyQuant(6)(given.model, given)
    assert not any(name.endswith("factor") for name in old.state_dict())
    save_weights(old, tmp_path / "old.safetensors")
    load_weights(Int8(weight_bits=6)(given.model, given), tmp_path / "old.safetensors")
    with pytest.raises(ArtifactError, match=r"missing 0\.weight_quantizer\.factor"):
        load_weights(new, tmp_path / "old.safetensors")


def test_factors_are_not_exported(tmp_path):
    given = task()
    found = EasyQuant(6, candidates=9)(given.model, given)
    export_onnx(found, given.example(), tmp_path / "with.onnx")
    for part in quantizers(found).values():
        part.factor = None
    export_onnx(found, given.example(), tmp_path / "without.onnx")
    assert (tmp_path / "with.onnx").read_bytes() == (tmp_path / "without.onnx").read_bytes()
