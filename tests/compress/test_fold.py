"""Batch norms folded into layers: only where that is the same function, and shared layers stay shared."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from netwright.compress._batch_norms import thaw
from netwright.compress._fold import fold_batch_norms, op_name, source_of
from netwright.compress._quantizers import WeightQuantizer
from netwright.compress.quantize import Int8, trace
from netwright.core.data import Data
from netwright.core.task import Task


def task_of(model: nn.Module, inputs: torch.Tensor) -> Task:
    splits = [TensorDataset(inputs, torch.zeros(len(inputs)).long()) for _ in range(3)]
    return Task("folded", model, Data(*splits), lambda output, _: output.square().mean(), lambda output, _: 0.0)


def shaken(model: nn.Module) -> nn.Module:
    """In evaluation mode, with norms that change what they read."""
    torch.manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            for value in (part.weight, part.bias, part.running_mean):
                if value is not None:
                    value.data.normal_()
            if part.running_var is not None:
                part.running_var.uniform_(0.5, 4.0)
    return model.eval()


def folded(model: nn.Module, inputs: torch.Tensor) -> tuple[int, nn.Module]:
    """How many norms were folded, after a check that the function is the same."""
    module = trace(model, task_of(model, inputs))
    count = fold_batch_norms(module)
    module.recompile()
    torch.testing.assert_close(module(inputs), model(inputs), rtol=1e-4, atol=1e-5)
    return count, module


@pytest.mark.parametrize(
    ("layer", "norm", "shape", "count"),
    [
        (nn.Linear(5, 4), nn.BatchNorm1d(4), (6, 5), 1),
        (nn.Linear(5, 5), nn.BatchNorm1d(3), (6, 3, 5), 0),
        (nn.Linear(4, 4), nn.BatchNorm1d(4), (6, 4, 4), 0),
        (nn.Linear(4, 4), nn.BatchNorm2d(4), (6, 4, 4, 4), 0),
        (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), (6, 3, 5), 1),
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), (6, 3, 5, 5), 1),
    ],
)
def test_only_norms_of_output_channels_are_folded(layer, norm, shape, count):
    model = shaken(nn.Sequential(layer, norm))
    inputs = torch.randn(shape)
    assert folded(model, inputs)[0] == count
    rounded = Int8()(model, task_of(model, inputs))(inputs)
    assert float(((rounded - model(inputs)).norm() / model(inputs).norm()).detach()) < 0.05


class OfTheBatch(nn.Module):
    """A norm that takes its statistics from the batch in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.register_buffer("mean", torch.randn(3))
        self.register_buffer("variance", torch.rand(3) + 0.5)

    def forward(self, x):
        return functional.batch_norm(self.conv(x), self.mean.clone(), self.variance.clone(), training=True)


class Computed(nn.Module):
    """A norm whose gain is computed from a parameter."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        norm = self.norm
        mean, variance = norm.running_mean, norm.running_var
        return functional.batch_norm(self.conv(x), mean, variance, norm.weight.exp(), norm.bias)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)),
        OfTheBatch,
        Computed,
    ],
    ids=["untracked", "training", "computed"],
)
def test_norms_without_stored_tensors_stay_in_the_graph(build):
    model, inputs = shaken(build()), torch.randn(8, 2, 6, 6)
    assert folded(model, inputs)[0] == 0
    module = trace(model, task_of(model, inputs))
    assert thaw(module) == 0
    torch.testing.assert_close(module(inputs), model(inputs))
    rounded = Int8()(model, task_of(model, inputs))(inputs)
    assert float(((rounded - model(inputs)).norm() / model(inputs).norm()).detach()) < 0.05


class Encoder(nn.Module):
    """Called twice by :class:`Siamese`."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.conv(x)).relu()


class Siamese(nn.Module):
    """One encoder on an image and its mirror image; ``plain`` reads the convolution without the norm too."""

    def __init__(self, plain=False):
        super().__init__()
        self.encoder, self.plain = Encoder(), plain

    def forward(self, x):
        both = self.encoder(x) - 2 * self.encoder(x.flip(3))
        return both + 3 * self.encoder.conv(x) if self.plain else both


@pytest.mark.parametrize("plain", [False, True])
def test_shared_layers_stay_shared(plain):
    model, inputs = shaken(Siamese(plain)), torch.randn(8, 2, 6, 6)
    count, module = folded(model, inputs)
    assert count == 2
    convolutions = [node for node in module.graph.nodes if op_name(node) == "conv2d"]
    for place in (1, 2):
        assert len({node.args[place].target for node in convolutions}) == 1 + plain
    assert {source_of(node.args[1]) for node in convolutions} == {"encoder.conv.weight"}
    rounded = Int8()(model, task_of(model, inputs))
    assert len(list(rounded.parameters())) == 2 + 2 * plain
    assert sum(isinstance(part, WeightQuantizer) for part in rounded.modules()) == 1 + plain


def test_a_norm_after_itself_is_folded_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.norm(self.conv(x)))

    assert folded(shaken(Twice()), torch.randn(4, 2, 6, 6))[0] == 2


@pytest.mark.parametrize("free", ["none", "0.weight", "1.weight", "1.bias"])
def test_what_is_frozen_stays_frozen(free):
    model = shaken(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)))
    for name, value in model.named_parameters():
        value.requires_grad_(name == free or name.startswith("2"))
    found = Int8()(copy.deepcopy(model), task_of(model, torch.randn(4, 2, 6, 6)))
    trains = {name: value.requires_grad for name, value in found.named_parameters()}
    assert trains == {"0.weight": free != "none", "0.bias": free != "none", "2.weight": True, "2.bias": True}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("momentum", [0.01, None])
def test_thawed_norms_follow_the_data_as_fast_as_the_given_ones(momentum, in_place):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=momentum), nn.ReLU(in_place)).eval()
    inputs = torch.randn(4, 2, 6, 6)
    module = trace(model, task_of(model, inputs))
    assert thaw(module) == 1
    [norm] = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    for each in (model, module):
        each.train()(inputs)
    torch.testing.assert_close(norm.running_mean, model[1].running_mean)
    torch.testing.assert_close(norm.running_var, model[1].running_var)
