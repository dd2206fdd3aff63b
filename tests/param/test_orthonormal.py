"""The penalty against its definition and autograd in double precision, the initialization against Gram matrices."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from netwright.core.errors import SettingError
from netwright.param.orthonormal import orthonormal, orthonormal_


def gram_terms(weight: Tensor, groups: int = 1) -> Tensor:
    """``||W^T W - I||_F^2`` with columns as filters, entry by entry, summed over groups; ``(outputs, ...)`` weight."""
    total = torch.zeros((), dtype=torch.double)
    for bank in weight.double().flatten(1).chunk(groups):
        for i, first in enumerate(bank):
            for j, second in enumerate(bank):
                total = total + ((first * second).sum() - float(i == j)) ** 2
    return total


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


LAYERS = {
    "tall": (lambda: nn.Linear(7, 3), 1),
    "square": (lambda: nn.Linear(4, 4), 1),
    "wide": (lambda: nn.Linear(3, 7), 1),
    "conv": (lambda: nn.Conv2d(2, 5, 3), 1),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), 2),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4), 4),
    "pointwise wide": (lambda: nn.Conv2d(2, 8, 1), 1),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_value_and_gradient(kind):
    """Against the definition; with more outputs than inputs the value is shifted by a constant, the gradient is not."""
    build, groups = LAYERS[kind]
    layer = build().double()
    strength = 0.3
    filters, entries = len(layer.weight) // groups, layer.weight[0].numel()
    expected = 0.5 * strength * (gram_terms(layer.weight, groups) - groups * max(0, filters - entries))
    penalty = orthonormal(layer, strength)
    torch.testing.assert_close(penalty(), expected)
    (found,) = torch.autograd.grad(penalty(), layer.weight)
    (wanted,) = torch.autograd.grad(expected, layer.weight)
    torch.testing.assert_close(found, wanted)
    if groups == 1:
        columns = layer.weight.detach().flatten(1).T
        closed = 2 * strength * columns @ (columns.T @ columns - torch.eye(filters, dtype=torch.double))
        torch.testing.assert_close(found.flatten(1), closed.T)


def test_layers_add_up_in_any_mix_of_shapes_and_types():
    model = nn.Sequential(mlp(), nn.Conv1d(1, 3, 2), nn.Linear(4, 4).double(), nn.Linear(4, 4))
    expected = sum(gram_terms(part.weight) for part in model.modules() if hasattr(part, "weight"))
    expected = 0.5 * (expected - 1)  # Conv1d(1, 3, 2) has one filter more than entries
    torch.testing.assert_close(orthonormal(model, 1.0)().double(), expected, rtol=1e-5, atol=1e-5)


def test_transposed_convolution_counts_outputs():
    layer = nn.ConvTranspose1d(4, 6, 3, groups=2, bias=False).double()
    rows = layer.weight.view(2, 2, 3, 3).transpose(1, 2).reshape(6, 6)
    torch.testing.assert_close(orthonormal(layer, 2.0)(), gram_terms(rows, 2))
    orthonormal_(layer)
    torch.testing.assert_close(orthonormal(layer, 2.0)(), torch.zeros((), dtype=torch.double))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("gain", [1.0, 1.5])
def test_initialization(kind, gain):
    build, groups = LAYERS[kind]
    layer = build()
    bias = layer.bias.detach().clone()
    assert orthonormal_(layer, gain) is layer
    for bank in layer.weight.detach().double().flatten(1).chunk(groups):
        short = bank if len(bank) <= bank.shape[1] else bank.T
        torch.testing.assert_close(
            short @ short.T, gain**2 * torch.eye(len(short), dtype=torch.double), atol=1e-5, rtol=0
        )
    assert torch.equal(layer.bias, bias)
    assert layer.weight.requires_grad
    if gain == 1:
        assert float(orthonormal(layer, 1.0)().detach()) < 1e-9


@pytest.mark.parametrize("sizes", [(5, 3), (3, 5), (4, 4)])
def test_complex_filters(sizes):
    layer = nn.Linear(*sizes, bias=False, dtype=torch.complex128)
    penalty = orthonormal(layer, 2.0)
    squares = torch.linalg.svdvals(layer.weight.detach()).square()
    torch.testing.assert_close(penalty().detach(), (squares - 1).square().sum())
    assert torch.autograd.gradcheck(lambda _: penalty(), [layer.weight])
    orthonormal_(layer, generator=torch.Generator().manual_seed(0))
    assert float(penalty().detach()) < 1e-20
    assert float(layer.weight.detach().imag.abs().max()) > 0.1


def test_initialization_is_haar():
    """Over draws the mean of each entry is 0 and of its square 1/n: no axis is preferred."""
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(3, 3, bias=False)
    drawn = torch.stack([orthonormal_(layer, generator=generator).weight.detach().clone() for _ in range(2000)])
    assert float(drawn.mean(0).abs().max()) < 0.06
    assert float((drawn.square().mean(0) - 1 / 3).abs().max()) < 0.04


def test_generator_and_half_precision():
    first, second = (
        orthonormal_(nn.Conv2d(2, 4, 3).to(torch.bfloat16), generator=torch.Generator().manual_seed(7)).weight
        for _ in range(2)
    )
    assert torch.equal(first, second)
    rows = first.detach().double().flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=torch.double), atol=0.02, rtol=0)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_penalty_counts_singular_values(outputs, inputs, seed):
    """It is the sum of ``(s^2 - 1)^2`` over the singular values."""
    layer = nn.Linear(inputs, outputs).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)))
    expected = 0.5 * (torch.linalg.svdvals(layer.weight).square() - 1).square().sum()
    torch.testing.assert_close(orthonormal(layer, 1.0)(), expected)


def test_descent_on_the_penalty_makes_filters_orthonormal():
    model = mlp()
    penalty = orthonormal(model, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    for layer in model[::2]:
        torch.testing.assert_close(torch.linalg.svdvals(layer.weight), torch.ones(4), atol=1e-3, rtol=0)
    assert all(layer.bias.grad is None for layer in model[::2])


def test_weights_are_read_afresh_and_through_parametrizations():
    layer = weight_norm(nn.Linear(5, 3))
    penalty = orthonormal(layer, 1.0)
    first = float(penalty().detach())
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)
    assert float(penalty().detach()) != pytest.approx(first)
    penalty().backward()
    assert layer.parametrizations.weight.original0.grad is not None


def test_names_patterns_and_shared_layers():
    model = mlp()
    penalty = orthonormal(model, exclude=["4"])
    assert penalty.names == ("0", "2")
    assert penalty.strength == 1e-4
    torch.testing.assert_close(penalty() + orthonormal(model, include=["4"])(), orthonormal(model)())
    twice = nn.Sequential(model[2], nn.ReLU(), model[2])
    assert torch.equal(orthonormal(twice)(), orthonormal(model[2])())
    assert float(orthonormal(model, 0)().detach()) == 0


def test_same_as_the_loop_over_layers_after_a_copy():
    model = mlp()
    penalty = orthonormal(model, 1.0)
    replica = copy.deepcopy(penalty)
    before = replica().detach()
    orthonormal_(model)
    assert float(penalty().detach()) < 1e-9
    assert torch.equal(replica(), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: orthonormal(mlp(), -1.0), "orthonormal: strength must be a number at least 0"),
        (lambda: orthonormal(mlp(), float("inf")), "strength must be a number at least 0, got inf"),
        (lambda: orthonormal(nn.ReLU()), "orthonormal: ReLU has no linear or convolution layer"),
        (lambda: orthonormal(mlp(), include=["9"]), "include names no layer '9'"),
        (lambda: orthonormal(nn.LazyLinear(2)), "layer '' is lazy"),
        (lambda: orthonormal_(nn.LazyLinear(2)), "orthonormal_: layer '' is lazy"),
        (lambda: orthonormal_(mlp(), 0.0), "gain must be a number greater than 0"),
        (lambda: orthonormal_(weight_norm(nn.Linear(2, 2))), "weight is not a plain parameter"),
        (lambda: orthonormal_("model"), "needs an nn.Module, got str"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(SettingError) as caught:
        call()
    assert message in str(caught.value)


def test_shared_weights_are_not_drawn_twice():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    with pytest.raises(SettingError, match=r"0.weight is shared by 0.weight, 1.weight"):
        orthonormal_(model)
    assert torch.equal(model[0].weight, before)
