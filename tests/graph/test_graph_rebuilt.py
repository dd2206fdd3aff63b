"""The shrunk model: it is of its own class only where that computes the right thing, and a rebuilt one trains."""

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from netwright.core.graph import trace
from netwright.core.graph.agreement import same_function

L = nn.Linear


class Attention(nn.Module):
    """Attention whose code counts heads, and a last layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.p, self.o, self.h = L(6, 24), L(8, 6), L(6, 3), 4

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (z.view(b, t, self.h, -1).transpose(1, 2) for z in self.q(x).chunk(3, -1))
        y = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v
        result: Tensor = self.o(x + self.p(y.transpose(1, 2).reshape(b, t, -1)))
        return result


class Scaled(nn.Module):
    """A branch that is scaled to next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.u, self.g = Attention(), L(6, 3), nn.Parameter(torch.full((3,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.u(x) + self.g * self.a(x)
        return result


def silent(model: nn.Module) -> nn.Module:
    """The last layer starts at zero."""
    nn.init.zeros_(model.o.weight)
    nn.init.zeros_(model.o.bias)
    return model


@pytest.mark.parametrize("kind", ["zeros", "scaled", "weight norm"])
def test_heads_are_counted_right_where_outputs_do_not_feel_it(kind: str) -> None:
    torch.manual_seed(0)
    model = Scaled() if kind == "scaled" else Attention()
    if kind == "zeros":
        silent(model)
    if kind == "weight norm":
        silent(model)
        model.p = parametrizations.weight_norm(model.p)
    x = torch.randn(3, 5, 6)
    graph = trace(model.eval(), x)
    (name,) = (group.name for group in graph.groups if group.kind == "heads")
    small, zero = graph.shrink(model, {name: [0, 1]}), graph.zero(model, {name: [0, 1]})
    assert not isinstance(small, fx.GraphModule)
    attention = small.a if kind == "scaled" else small
    assert attention.h == 2
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            attention.o.parameters(), zero.get_submodule("a.o" if kind == "scaled" else "o").parameters(), strict=True
        )
    )
    with torch.no_grad():
        for made in (small, zero):
            if kind == "scaled":
                made.g.fill_(1)
            else:
                made.o.weight.copy_(torch.arange(18.0).reshape(3, 6))
    assert zero(x).abs().max() > 0.1
    torch.testing.assert_close(small(x), zero(x))


def test_same_function_leaves_parameters_as_they_are() -> None:
    torch.manual_seed(0)
    one = silent(Attention()).eval()
    two = copy.copy(one)
    two._parameters, two._modules = dict(one._parameters), dict(one._modules)
    x, before = torch.randn(3, 5, 6), copy.deepcopy(one.state_dict())
    assert same_function(one, two, x, 1e-5)
    two.h = 2
    assert torch.equal(one(x), two(x))
    assert not same_function(one, two, x, 1e-5)
    assert all(torch.equal(before[name], value) for name, value in one.state_dict().items())


class Hooked(nn.Module):
    def __init__(self, rebuilt: bool) -> None:
        super().__init__()
        self.e, self.n, self.o, self.rebuilt = L(6, 8), nn.LayerNorm(8), L(8, 3), rebuilt

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(self.e(x))
        result: Tensor = self.o(h.view(x.shape[0], 8) if self.rebuilt else h)
        return result


@pytest.mark.parametrize("rebuilt", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_hooks_run_once(rebuilt: bool, before: bool) -> None:
    torch.manual_seed(0)
    model, x = Hooked(rebuilt).eval(), torch.randn(3, 6)
    if before:
        model.e.register_forward_pre_hook(lambda module, args: (args[0] + args[0] ** 2,))
    else:
        model.e.register_forward_hook(lambda module, args, y: y + y**2)
    small = trace(model, x).shrink(model, {"e": [0]})
    assert isinstance(small, fx.GraphModule) is rebuilt
    e = F.linear(x + x**2 if before else x, model.e.weight[1:], model.e.bias[1:])
    e = F.layer_norm(e if before else e + e**2, (7,), model.n.weight[1:], model.n.bias[1:])
    torch.testing.assert_close(small(x), F.linear(e, model.o.weight[:, 1:], model.o.bias))
    if rebuilt:
        assert type(small.n) is nn.LayerNorm  # a layer without hooks is a module again
        small.train()(x).sum().backward()
        assert small.e.weight.grad is not None


def normalized(norm: nn.Module, rebuilt: bool) -> nn.Sequential:
    reshape = [nn.Flatten(), nn.Unflatten(1, (8, 36))] if rebuilt else [nn.Flatten(2)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), *reshape, nn.Conv1d(8, 2, 1))


@pytest.mark.parametrize("rebuilt", [False, True])
def test_instance_norm_learns_its_statistics(rebuilt: bool) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 8, 8)
    model = normalized(nn.InstanceNorm2d(8, affine=True, track_running_stats=True), rebuilt).eval()
    nn.init.normal_(model[1].running_mean)
    small = trace(model, images).shrink(model, {"0": [0]})
    assert isinstance(small, fx.GraphModule) is rebuilt
    norm = small.get_submodule("1")
    assert norm.num_features == 7
    torch.testing.assert_close(norm.running_mean, model[1].running_mean[1:])
    channels = F.conv2d(images, model[0].weight[1:], model[0].bias[1:]).mean((0, 2, 3))
    small.train()(images)
    torch.testing.assert_close(norm.running_mean, 0.9 * model[1].running_mean[1:] + 0.1 * channels)


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(8), nn.BatchNorm2d(8, affine=False, track_running_stats=False)], ids=str
)
def test_a_norm_without_parameters_knows_its_channels(norm: Any) -> None:
    images = torch.randn(3, 3, 8, 8)
    model = normalized(norm, False)
    small = trace(model, images).shrink(model, {"0": [0, 3, 4]})
    assert small[1].num_features == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's own, where channels are not as many as the module says
        assert small(images).shape == (3, 2, 36)
