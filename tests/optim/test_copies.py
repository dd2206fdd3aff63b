"""Copies of an optimizer and its model, by copy and by pickle, go on as these do and leave them alone."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.optim import (
    AGVM,
    KFAC,
    MFAC,
    SANIA,
    BertAdam,
    DiffGrad,
    DoG,
    ExactGaussNewton,
    Lion,
    OptEx,
    OptimalInputGain,
    OptimisticAMSGrad,
    SaddleFreeNewton,
    Shampoo,
    UDoG,
    module_groups,
)

# Settings that are not the defaults, so that one that a copy forgets is missed.
MAKE = {
    "agvm": lambda net: AGVM(torch.optim.AdamW(module_groups(net), lr=0.01), interval=1, momentum=0.3),
    "bert-adam": lambda net: BertAdam(net.parameters(), lr=0.01),
    "diffgrad": lambda net: DiffGrad(net.parameters(), lr=0.01),
    "dog": lambda net: DoG(net.parameters(), initial_movement=0.05, eps=0.1, average=2.0),
    "exact-gauss-newton": lambda net: ExactGaussNewton(
        net.parameters(), momentum=0.5, curvature="residual", line_search=True, adapt=1.1
    ),
    "kfac": lambda net: KFAC(net.parameters(), net, update_every=2, invert_every=3, sharing="reduce"),
    "lion": lambda net: Lion(net.parameters(), lr=0.01),
    "mfac": lambda net: MFAC(net.parameters(), lr=0.01, window=4),
    "optex": lambda net: OptEx(torch.optim.SGD(net.parameters(), lr=0.05), parallelism=3, history=5, select="gradient"),
    "optimal-input-gain": lambda net: OptimalInputGain(net.parameters(), net, hidden="bp", gains=False, ridge=0.01),
    "optimistic-amsgrad": lambda net: OptimisticAMSGrad(net.parameters(), lr=0.01, span=2, regularization=0.1),
    "saddle-free-newton": lambda net: SaddleFreeNewton(net.parameters(), subspace=3),
    "sania": lambda net: SANIA(net.parameters(), "adam", optimum=0.1),
    "sania-hutchinson": lambda net: SANIA(net.parameters(), "hutchinson", samples=2),
    "shampoo": lambda net: Shampoo(net.parameters(), lr=0.01),
    "udog": lambda net: UDoG(net.parameters(), initial_movement=0.05, damped=True),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def train(net, optimizer, times):
    for time in times:
        torch.manual_seed(time)
        inputs, targets = torch.randn(8, 3).double(), torch.randn(8, 2).double()

        def closure(inputs=inputs, targets=targets):
            outputs = net(inputs)
            loss = functional.mse_loss(outputs, targets)
            if optimizer.closure_kind == "graph":
                return loss
            if optimizer.closure_kind == "outputs":
                return loss, outputs
            optimizer.zero_grad()
            if isinstance(optimizer, AGVM):
                (loss / 2).backward(retain_graph=True)
                optimizer.observe()
                (loss / 2 + outputs.square().mean()).backward()
            else:
                loss.backward()
            return loss

        optimizer.step(closure)
    return [param.detach().clone() for param in net.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", MAKE)
def test_a_copy_goes_on_as_the_original(name, way):
    net = network()
    optimizer = MAKE[name](net)
    before = train(net, optimizer, range(5))
    twin, copied = way((net, optimizer))
    again, another = way((twin, copied))
    ahead = train(twin, copied, range(5, 9))
    assert same(before, net.parameters())
    assert not same(before, ahead)
    assert same(train(net, optimizer, range(5, 9)), ahead)
    del net, optimizer, twin, copied
    assert same(train(again, another, range(5, 9)), ahead)


@pytest.mark.parametrize("name", ["dog", "agvm", "optex"])
def test_a_copy_does_not_step_the_original_where_a_schedule_watches_it(name):
    net = network()
    optimizer = MAKE[name](net)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    before = train(net, optimizer, range(3))
    schedule.step()
    twin, copied, copied_schedule = copy.deepcopy((net, optimizer, schedule))
    ahead = train(twin, copied, range(3, 6))
    assert same(before, net.parameters())
    assert same(train(net, optimizer, range(3, 6)), ahead)
    copied_schedule.step()
    assert copied.param_groups[0]["lr"] == pytest.approx(0.9 * optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("around", [AGVM, functools.partial(OptEx, parallelism=2, history=4)], ids=["agvm", "optex"])
@pytest.mark.parametrize(
    "kind", [BertAdam, DiffGrad, DoG, Lion, MFAC, OptimisticAMSGrad, Shampoo], ids=lambda kind: kind.__name__
)
def test_ours_within_a_wrapper_resumes(kind, around):
    net, other = network(), network()
    optimizer, resumed = (around(kind(entry.parameters(), lr=0.01)) for entry in (net, other))
    optimizer.observe = lambda: None  # what AGVM compares needs several groups
    resumed.observe = optimizer.observe
    train(net, optimizer, range(4))
    other.load_state_dict(net.state_dict())
    for _ in range(2):
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(train(net, optimizer, range(4, 8)), train(other, resumed, range(4, 8)))


def test_a_copy_of_k_fac_has_taps_of_its_own():
    net = network()
    optimizer = KFAC(net.parameters(), net)
    train(net, optimizer, range(2))
    twin, copied = copy.deepcopy((net, optimizer))
    functional.mse_loss(twin(torch.ones(4, 3).double()), torch.ones(4, 2).double()).backward()
    assert all(place.tap.inputs is None for place in optimizer._listener.places.values())
    assert [place.tap.samples for place in copied._listener.places.values()] == [4, 4]
    assert [place.layer for place in copied._listener.places.values()] == [twin[0], twin[2]]
    copied.remove_hooks()
    silent = copy.deepcopy((twin, copied))
    silent[0](torch.ones(4, 3).double()).sum().backward()
    assert all(place.tap.inputs is None for place in silent[1]._listener.places.values())
