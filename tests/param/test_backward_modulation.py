"""Backward modulation against back-propagation written out by hand."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from netwright.core.errors import SettingError
from netwright.param.backward_modulation import BackwardModulation
from netwright.param.fold import fold


def rms(value: Tensor) -> float:
    return math.sqrt(float(value.double().square().mean()))


def chain(depth: int = 5, width: int = 6, grow: float = 2.0) -> nn.Sequential:
    """A linear chain whose errors grow on the way back."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(width, 2)).double()
    with torch.no_grad():
        for part in model[::2]:
            part.weight *= grow
    return model


def plain_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for channels in (1, 4, 4, 4):
        layers += [nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def by_hand(model: nn.Sequential, x: Tensor, tolerance: float) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients and factors of a chain of linear layers and tanh under the squared loss, layer by layer."""
    inputs, hidden = [], x
    linear = [part for part in model if isinstance(part, nn.Linear)]
    for number, layer in enumerate(linear):
        inputs.append(hidden)
        hidden = hidden @ layer.weight.T + layer.bias
        if number + 1 < len(linear):
            hidden = torch.tanh(hidden)
    error = 2 * hidden  # of the sum of squares
    grads: dict[str, Tensor] = {}
    factors: dict[str, float] = {}
    above = rms(error)
    for number in reversed(range(len(linear))):
        name = str(2 * number)
        if number + 1 < len(linear):
            error = (error @ linear[number + 1].weight) * (1 - inputs[number + 1] ** 2)
            ratio = above / rms(error)
            factors[name] = ratio if ratio > tolerance or ratio < 1 / tolerance else 1.0
            error = error * factors[name]
            above = rms(error)
        grads[f"{name}.weight"] = error.T @ inputs[number]
        grads[f"{name}.bias"] = error.sum(0)
    return grads, factors


@pytest.mark.parametrize("tolerance", [1.0, 1.6, 1e6])
@pytest.mark.parametrize("grow", [0.3, 1.0, 4.0])
def test_gradients_are_those_by_hand(tolerance, grow):
    model = chain(grow=grow)
    x = torch.randn(7, 6, dtype=torch.double)
    modulation = BackwardModulation(model, tolerance=tolerance)
    model(x).square().sum().backward()
    with torch.no_grad():
        grads, factors = by_hand(model, x, tolerance)
    assert modulation.factors == pytest.approx(factors, rel=1e-9)
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, grads[name], rtol=1e-9, atol=0)
    assert tolerance < 1e6 or set(factors.values()) == {1.0}


def test_direction_stays_and_sizes_become_equal():
    model = plain_net()
    x = torch.randn(8, 1, 8, 8)
    errors: dict[str, dict[str, Tensor]] = {}
    for kind in ("plain", "modulated"):
        replica = copy.deepcopy(model)
        seen: dict[str, Tensor] = {}
        if kind == "modulated":
            BackwardModulation(replica)
        for name, part in replica.named_modules():
            if isinstance(part, nn.Conv2d | nn.Linear):  # registered later, so it sees what the modulation leaves
                part.register_forward_hook(
                    lambda part, args, out, name=name, seen=seen: (
                        out.register_hook(lambda error: seen.__setitem__(name, error)) and None
                    )
                )
        nn.functional.cross_entropy(replica(x), torch.arange(8) % 3).backward()
        errors[kind] = seen
    top = rms(errors["modulated"]["14"])
    assert torch.equal(errors["modulated"]["14"], errors["plain"]["14"])
    for name, error in errors["modulated"].items():
        assert rms(error) == pytest.approx(top, rel=1e-5)
        torch.testing.assert_close(error / error.norm(), errors["plain"][name] / errors["plain"][name].norm())


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [value.grad.clone() for value in model.parameters()]


@pytest.mark.parametrize("off", ["disabled", "removed", "with", "wide", "folded", "evaluation"])
def test_off_is_plain_backward_to_the_last_bit(off):
    model = plain_net()
    if off == "evaluation":
        model.eval()
    x = torch.randn(8, 1, 8, 8)
    plain = gradients(copy.deepcopy(model), x)
    modulation = BackwardModulation(model, tolerance=1e9 if off == "wide" else 1.0)
    if off == "disabled":
        modulation.enabled = False
    elif off == "removed":
        modulation.remove()
        modulation.remove()
    elif off == "with":
        with modulation:
            pass
    elif off == "folded":
        fold(model)
    for left, right in zip(gradients(model, x), plain, strict=True):
        assert torch.equal(left, right)
    if off in ("removed", "with", "folded"):
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_forward_is_untouched():
    model = plain_net()
    x = torch.randn(8, 1, 8, 8)
    expected = copy.deepcopy(model)(x)
    BackwardModulation(model)
    assert torch.equal(model(x), expected)


def test_first_steps_only():
    model = chain()
    x = torch.randn(3, 6, dtype=torch.double)
    plain = gradients(copy.deepcopy(model), x)
    BackwardModulation(model, steps=2)
    with torch.no_grad():
        model(x)  # without a graph: not counted
    model.eval()(x)
    model.train()
    for number in range(4):
        same = all(torch.equal(left, right) for left, right in zip(gradients(model, x), plain, strict=True))
        assert same == (number >= 2)


def test_passes_do_not_mix():
    """Two forward passes, then two backward passes, the first of them twice: each as if it were alone."""
    model = chain()
    first, second = torch.randn(2, 4, 6, dtype=torch.double)
    BackwardModulation(model)
    alone = [gradients(model, x) for x in (first, 100 * second)]
    losses = [model(x).square().sum() for x in (first, 100 * second)]
    for loss, expected, keep in (
        (losses[0], alone[0], True),
        (losses[1], alone[1], False),
        (losses[0], alone[0], False),
    ):
        model.zero_grad()
        loss.backward(retain_graph=keep)
        for value, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(value.grad, grad, rtol=1e-12, atol=0)


def test_a_copy_has_its_own():
    model = chain()
    modulation = BackwardModulation(model)
    replica = copy.deepcopy(model)
    x = torch.randn(4, 6, dtype=torch.double)
    modulated = gradients(model, x)
    modulation.remove()
    plain = gradients(model, x)
    for left, right in zip(gradients(replica, x), modulated, strict=True):
        assert torch.equal(left, right)
    fold(replica)
    for left, right in zip(gradients(replica, x), plain, strict=True):
        assert torch.equal(left, right)


def test_checkpointing_changes_nothing():
    class Checkpointed(nn.Module):
        def __init__(self, body: nn.Sequential) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return self.body[4:](checkpoint(self.body[:4], x, use_reentrant=False))

    body = chain()
    x = torch.randn(4, 6, dtype=torch.double)
    replica = copy.deepcopy(body)
    BackwardModulation(replica)
    expected = gradients(replica, x)
    model = Checkpointed(body)
    BackwardModulation(model)
    for left, right in zip(gradients(model, x), expected, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_too_small_to_square(dtype):
    """1e-30 squared is zero in float32."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)).to(dtype)
    with torch.no_grad():
        for part in model[1:]:
            part.weight *= 1e-14
    modulation = BackwardModulation(model)
    model(torch.ones(2, 4, dtype=dtype)).sum().backward()
    assert modulation.factors["1"] > 1e13
    assert modulation.factors["0"] > 1e13
    assert rms(model[0].bias.grad) == pytest.approx(2.0, rel=0.02)


def test_zero_and_infinite_errors_pass_through():
    model = chain(2)
    BackwardModulation(model)
    (model(torch.ones(1, 6, dtype=torch.double)).sum() * 0).backward()
    assert all(torch.equal(value.grad, torch.zeros_like(value)) for value in model.parameters())
    model.zero_grad()
    (model(torch.ones(1, 6, dtype=torch.double)).sum() * math.inf).backward()
    assert not any(bool(value.grad.isfinite().all()) for value in model[0].parameters())


def test_second_derivatives_take_factors_as_constants():
    model = chain(2)
    x = torch.randn(3, 6, dtype=torch.double)
    modulation = BackwardModulation(model)
    loss = model(x).square().sum()
    (grad,) = torch.autograd.grad(loss, model[0].bias, create_graph=True)
    grad.square().sum().backward()
    assert modulation.factors["0"] != 1
    assert all(bool(value.grad.isfinite().all()) for value in model.parameters())


def test_unused_heads_and_layers_outside_of_a_pass():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.body(x)
            return self.first(hidden), self.second(hidden)

    model = Heads()
    modulation = BackwardModulation(model)
    model(torch.ones(2, 3))[0].sum().backward()  # the second head gets no error
    assert set(modulation.factors) == {"body"}
    expected = copy.deepcopy(model.body)
    model.zero_grad()
    expected.zero_grad()
    model.body(torch.ones(2, 3)).sum().backward()
    expected(torch.ones(2, 3)).sum().backward()
    assert torch.equal(model.body.weight.grad, expected.weight.grad)


def test_patterns_choose_layers():
    model = chain(3)
    modulation = BackwardModulation(model, exclude=["2"])
    model(torch.randn(3, 6, dtype=torch.double)).sum().backward()
    assert set(modulation.factors) == {"0", "4"}


def test_exports_clean():
    model = plain_net()
    x = torch.randn(4, 1, 8, 8)
    BackwardModulation(model)
    plain = torch.export.export(copy.deepcopy(plain_net()).eval(), (x,))
    program = torch.export.export(model.eval(), (x,))
    assert [node.target for node in program.graph.nodes] == [node.target for node in plain.graph.nodes]
    training = torch.export.export(model.train(), (x,))
    assert training.module()(x).shape == (4, 3)


def test_an_error_in_the_forward_pass_leaves_it_sound():
    model = chain()
    BackwardModulation(model)
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 5, dtype=torch.double))
    x = torch.randn(2, 6, dtype=torch.double)
    part = copy.deepcopy(model[0])
    model.zero_grad()
    model[0](x).sum().backward()
    part(x).sum().backward()
    assert torch.equal(model[0].weight.grad, part.weight.grad)


@pytest.mark.parametrize(
    ("model", "given_settings", "message"),
    [
        (chain, {"tolerance": 0.9}, "tolerance must be a number at least 1, got 0.9"),
        (chain, {"tolerance": float("nan")}, "tolerance must be a number at least 1"),
        (chain, {"steps": 0}, "steps must be a positive integer or None, got 0"),
        (chain, {"steps": 1.5}, "steps must be a positive integer"),
        (chain, {"include": ["7"]}, "include names no layer '7'"),
        (nn.ReLU, {}, "ReLU has no linear or convolution layer"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), {}, "layer '0' is lazy"),
        (lambda: 3, {}, "needs an nn.Module, got int"),
    ],
)
def test_bad_input(model, given_settings, message):
    built = model()
    with pytest.raises(SettingError) as caught:
        BackwardModulation(built, **given_settings)
    assert message in str(caught.value)
    assert not getattr(built, "_forward_pre_hooks", None)
