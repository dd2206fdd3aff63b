"""Hyperspherical coordinates against a naive transcription, and the theorem on turning boundaries."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from netwright.param.geometric_parameterization import (
    GeometricParameterization,
    geometric_parameterization,
)


def naive_weight(radius: Tensor, angles: Tensor) -> Tensor:
    """Entry by entry from the definition, in double precision, differentiable."""
    rows = []
    for r, row in zip(radius.double(), angles.double(), strict=True):
        entries, product = [], torch.ones((), dtype=torch.double)
        for angle in row:
            entries.append(r * product * torch.cos(angle))
            product = product * torch.sin(angle)
        rows.append(torch.stack([*entries, r * product]))
    return torch.stack(rows)


def convert(weight: Tensor) -> tuple[GeometricParameterization, Tensor, Tensor]:
    part = GeometricParameterization(weight.shape)
    return part, *part.right_inverse(weight)


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Accurate also for small angles."""
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


@given(st.integers(1, 6), st.integers(1, 40), st.integers(-30, 30), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_round_trip(outputs, inputs, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, dtype=torch.double, generator=generator) * 2.0**exponent
    weight[torch.rand(outputs, inputs, generator=generator) < 0.3] = 0
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        given_weight = weight.to(dtype)
        part, radius, angles = convert(given_weight)
        error = (part(radius, angles) - given_weight).abs().amax(1)
        assert bool((error <= bound * given_weight.norm(dim=1)).all())
        assert bool(((angles[:, :-1] >= 0) & (angles[:, :-1] <= math.pi + 1e-6)).all())


@pytest.mark.parametrize("inputs", [2, 3, 64, 4608])
def test_round_trip_of_long_rows(inputs):
    weight = torch.randn(8, inputs)
    part, radius, angles = convert(weight)
    torch.testing.assert_close(radius, weight.norm(dim=1), rtol=1e-6, atol=0)
    assert float((part(radius, angles) - weight).abs().max()) <= 1e-6 * float(weight.norm(dim=1).min())


@pytest.mark.parametrize("inputs", [1, 2, 3, 7])
def test_weight_and_gradient_match_the_definition(inputs):
    radius = torch.rand(5, dtype=torch.double, requires_grad=True)
    angles = ((torch.rand(5, inputs - 1, dtype=torch.double) - 0.5) * 12).requires_grad_()
    expected = naive_weight(radius, angles) if inputs > 1 else radius[:, None]
    weight = GeometricParameterization((5, inputs))(radius, angles)
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-14)
    aim = torch.randn(5, inputs, dtype=torch.double)
    found = torch.autograd.grad((weight * aim).sum(), (radius, angles), materialize_grads=True)
    wanted = torch.autograd.grad((expected * aim).sum(), (radius, angles), materialize_grads=True)
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("weight", [[0.0, 0, 0, 0], [1.0, 0, 0, 0], [-1.0, 0, 0, 0], [0.0, 0, 2, 0], [0.0, 0, 0, -1]])
def test_gradient_at_the_poles(weight):
    """Where sines vanish no gradient is lost, infinite or NaN."""
    part, radius, angles = convert(torch.tensor([weight], dtype=torch.double))
    radius.requires_grad_()
    angles.requires_grad_()
    aim = torch.tensor([[0.3, -0.7, 0.2, 0.9]], dtype=torch.double)
    found = torch.autograd.grad((part(radius, angles) * aim).sum(), (radius, angles))
    wanted = torch.autograd.grad((naive_weight(radius, angles) * aim).sum(), (radius, angles))
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-15)


def test_second_derivatives():
    part = GeometricParameterization((2, 4))
    values = torch.rand(2, dtype=torch.double, requires_grad=True), torch.rand(2, 3, dtype=torch.double)
    values[1].requires_grad_()
    assert torch.autograd.gradcheck(part, values)
    assert torch.autograd.gradgradcheck(part, values)


@given(st.integers(2, 30), st.floats(-6, 1), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_directions_turn_no_further_than_angles_move(inputs, exponent, seed):
    """The theorem, for changes of all sizes, at directions that are close to poles too."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(20, inputs, dtype=torch.double, generator=generator)
    weight = weight * torch.logspace(0, -3, inputs, dtype=torch.double)
    part, radius, angles = convert(weight)
    change = torch.randn(angles.shape, dtype=torch.double, generator=generator) * 10**exponent
    turned = angle_between(part(radius, angles), part(radius, angles + change))
    assert bool((turned <= change.norm(dim=1) * (1 + 1e-6) + 1e-12).all())
    lengths = torch.cat([torch.ones(20, 1, dtype=torch.double), angles.sin()[:, :-1].cumprod(1).abs()], 1)
    if exponent < -4:  # to first order the turn is the length of the change in the sphere's metric
        torch.testing.assert_close(turned, (lengths * change).norm(dim=1), rtol=0.05, atol=1e-7)


def test_a_step_of_sgd_turns_short_weights_less_than_in_cartesian_coordinates():
    """A short vector is flung around by a step that moves its angles hardly at all; a radius may change its sign."""
    layer = nn.Linear(6, 20, bias=False)
    with torch.no_grad():
        layer.weight *= 1e-3
    turned = {}
    for kind, change in (
        ("plain", lambda part: part),
        ("weight norm", weight_norm),
        ("gmp", geometric_parameterization),
    ):
        built = change(copy.deepcopy(layer))
        if kind == "weight norm":
            with torch.no_grad():
                built.parametrizations.weight.original0.fill_(1.0)
        before = built.weight.detach().clone()
        optimizer = torch.optim.SGD(built.parameters(), lr=1e-2)
        (built.weight * torch.ones(6)).sum().backward()
        optimizer.step()
        turned[kind] = angle_between(before, built.weight.detach())
        turned[kind] = torch.minimum(turned[kind], math.pi - turned[kind])
        if kind == "gmp":
            moved = 1e-2 * built.parametrizations.weight.original1.grad.norm(dim=1)
            assert bool((turned[kind] <= moved + 1e-6).all())
    assert float(turned["gmp"].max()) < 1e-3
    assert float(turned["plain"].median()) > 0.5
    assert float(turned["weight norm"].median()) > 0.5
