"""What an optimizer keeps between steps, against the words of its documentation."""

import torch
from torch import nn
from torch.nn import functional
from torch.optim import Optimizer

from netwright.core.optimization import kept_bytes
from netwright.optim import AGVM, OptEx, Shampoo, available, create, module_groups

WORD = 4
INPUTS, HIDDEN = 6, 10


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN, bias=False), nn.Tanh(), nn.Linear(HIDDEN, 2, bias=False))


SIZE = sum(param.numel() for param in network().parameters())


def stepped(optimizer: Optimizer, model: nn.Module, count: int) -> Optimizer:
    inputs, targets = torch.randn(20, INPUTS), torch.randn(20, 2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = functional.mse_loss(model(inputs), targets)
        loss.backward()
        return loss.detach()

    for _ in range(count):
        optimizer.step(closure)
    return optimizer


def test_two_words_of_adam_and_none_of_sgd() -> None:
    model = network()
    assert kept_bytes(stepped(create("adam", model), model, 2)) == 2 * SIZE * WORD
    assert available()["adam"].state == "2"
    assert kept_bytes(stepped(create("sgd", model, lr=0.1), model, 2)) == 0


def test_shampoos_factors_and_roots() -> None:
    factors = 2 * (HIDDEN**2 + INPUTS**2) + 2 * (2**2 + HIDDEN**2)  # 2(m^2 + n^2) for each matrix
    for grafting, beside in (("none", SIZE), ("adam", 2 * SIZE)):  # mn with momentum, 2mn with "adam"
        model = network()
        optimizer = Shampoo(model.parameters(), lr=0.01, grafting=grafting)
        assert kept_bytes(stepped(optimizer, model, 3)) == (factors + beside) * WORD


def test_the_history_of_optex_and_what_is_within() -> None:
    model = network()
    history = 8
    optimizer = OptEx(torch.optim.Adam(model.parameters(), lr=1e-3), parallelism=4, history=history)
    stepped(optimizer, model, 4)  # 1 + 3 * 4 points, of which 8 are kept
    tables = 2 * history**2
    assert kept_bytes(optimizer) - 2 * SIZE * WORD >= 2 * history * SIZE * WORD  # T (d + m) words
    assert kept_bytes(optimizer) <= (2 * SIZE + 2 * history * SIZE + 2 * tables) * WORD  # tables may be float64


def test_agvm_keeps_what_its_optimizer_keeps() -> None:
    model = network()
    optimizer = AGVM(torch.optim.Adam(module_groups(model), lr=1e-3))
    assert kept_bytes(stepped(optimizer, model, 2)) == 2 * SIZE * WORD
