"""Methods that take more than gradients from their batch refuse to train one model in several processes."""

import pytest
import torch
from torch import distributed, nn

from netwright.core.errors import RecipeError, SettingError
from netwright.core.optimization import make_optimizer
from netwright.core.recipe import Recipe
from netwright.optim import (
    AGVM,
    KFAC,
    MFAC,
    SANIA,
    DoG,
    ExactGaussNewton,
    Lion,
    OptEx,
    OptimalInputGain,
    OptimisticAMSGrad,
    Replicas,
    SaddleFreeNewton,
    Shampoo,
)

ALONE = {
    "KFAC": lambda net: KFAC(net.parameters(), net),
    "SANIA": lambda net: SANIA(net.parameters()),
    "ExactGaussNewton": lambda net: ExactGaussNewton(net.parameters()),
    "SaddleFreeNewton": lambda net: SaddleFreeNewton(net.parameters()),
    "OptimalInputGain": lambda net: OptimalInputGain(net.parameters(), net),
    "OptEx": lambda net: OptEx(torch.optim.SGD(net.parameters())),
    "OptEx ": lambda net: OptEx(torch.optim.SGD(net.parameters()), evaluate=Replicas(net)),
}
TOGETHER = [
    *(lambda net, kind=kind: kind(net.parameters()) for kind in (Lion, DoG, MFAC, Shampoo, OptimisticAMSGrad)),
    lambda net: AGVM(torch.optim.SGD(net.parameters())),
    lambda net: OptEx(torch.optim.SGD(net.parameters()), evaluate=print),  # which may speak to all processes
]


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


@pytest.fixture
def processes(monkeypatch):
    """Sets the number of processes that torch.distributed has."""
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    return lambda count: monkeypatch.setattr(distributed, "get_world_size", lambda: count)


@pytest.mark.parametrize("name", ALONE)
def test_several_processes_are_refused(name, processes):
    net = network()
    processes(4)
    words = f"^{name.strip()} trains in one process, and torch.distributed has 4: .*AdamW"
    with pytest.raises(SettingError, match=words):
        ALONE[name](net)
    assert not any(layer._forward_hooks for layer in net)
    processes(1)
    ALONE[name](net)


@pytest.mark.parametrize("make", TOGETHER)
def test_methods_that_see_averaged_gradients_are_taken(make, processes):
    processes(4)
    make(network())


def test_a_recipe_says_so(processes):
    processes(2)
    with pytest.raises(RecipeError, match="SANIA trains in one process"):
        make_optimizer(Recipe(optimizer="netwright.optim:SANIA", schedule=None), network())
