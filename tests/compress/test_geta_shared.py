"""GETA where a convolution is called twice with a batch norm after it, and where a kernel does not train."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.compress._quantizers import WeightQuantizer
from netwright.compress.geta import GETA
from netwright.testing import small_tasks


class Encoder(nn.Module):
    """A convolution that is called twice, with a norm after it, between one with a fixed kernel and a linear layer."""

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.register_buffer("blur", torch.full((1, 1, 3, 3), 1 / 9))
        self.fixed, self.free = fixed, nn.Conv2d(1, 1, 3, padding=1)
        self.conv, self.norm, self.head = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Linear(6, 3)
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        soft = functional.conv2d(x, self.blur, padding=1) if self.fixed else self.free(x)
        both = [self.norm(self.conv(each)).relu().mean((2, 3)) for each in (x, soft)]
        return self.head(both[0] - both[1])


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("ratio", "budget"), [(0.0, 0), (0.0, 1), (0.5, 2)])
def test_shared_convolutions_and_fixed_kernels(fixed, ratio, budget) -> None:
    torch.manual_seed(0)
    model = Encoder(fixed).eval()
    task = dataclasses.replace(small_tasks()[0], model=model)
    small = GETA(ratio, least_bits=7, most_bits=8)(model, task, budget=budget)
    widths = GETA.widths(small)
    learned = {"conv.weight_folded", "head.weight"} | (set() if fixed else {"free.weight"})
    assert set(widths) == learned
    units = 3 if ratio else 6
    assert small.get_parameter("conv.weight_folded").shape == (units, 1, 3, 3)
    kernels = [part for part in small.modules() if isinstance(part, WeightQuantizer)]
    assert len(kernels) == fixed
    if budget == 0:
        wanted = model(task.example(8))
        assert float(((small(task.example(8)) - wanted).norm() / wanted.norm()).detach()) < 0.1


def test_fixed_kernels_are_rounded_to_the_most_bits() -> None:
    torch.manual_seed(0)
    model = Encoder(True).eval()
    task = dataclasses.replace(small_tasks()[0], model=model)
    small = GETA(0.0, most_bits=5)(model, task, budget=0)
    [kernel] = [part for part in small.modules() if isinstance(part, WeightQuantizer)]
    assert (kernel.integers.low, kernel.integers.high) == (-15, 15)
