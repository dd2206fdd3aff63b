"""Each family of operations in a small model: the groups it must have, and that zeroed and shrunk models agree."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netwright.core.graph import trace
from netwright.core.graph.agreement import batch_of, outputs


class _Model(nn.Module):
    """Modules by name, and a forward that uses them."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module | Tensor) -> None:
        super().__init__()
        for name, module in modules.items():
            if isinstance(module, Tensor):
                setattr(self, name, nn.Parameter(module))
            else:
                self.add_module(name, module)
        self._compute = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._compute(self, x)


@dataclass(frozen=True)
class _Case:
    """A model, its input, and its groups by name: size, and whether exact."""

    forward: Callable[..., Tensor]
    modules: Callable[[], dict[str, Any]]
    groups: dict[str, tuple[int, bool]]
    inputs: Callable[[], Any] = field(default=lambda: torch.randn(2, 3, 6, 6))
    blocked: dict[str, str] = field(default_factory=dict)


def _vector() -> Tensor:
    return torch.randn(2, 6)


def _tokens() -> Tensor:
    return torch.randn(2, 5, 6)


def _two(hidden: int = 8) -> Callable[[], dict[str, Any]]:
    """A convolution and a classifier over what it computes."""
    return lambda: {"conv": nn.Conv2d(3, hidden, 3), "fc": nn.Linear(hidden, 2)}


def _mlp(hidden: int = 8, seen: int | None = None) -> Callable[[], dict[str, Any]]:
    return lambda: {"a": nn.Linear(6, hidden), "b": nn.Linear(hidden if seen is None else seen, 2)}


def _pooled(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda m, x: m.fc(change(m.conv(x)).mean((2, 3)))


def _hidden(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda m, x: m.b(change(m.a(x)))


def _write_into_part(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :4] += 1
    return x


def _attention(enable_gqa: bool) -> Callable[..., Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, -1, 4).transpose(1, 2) for layer in (m.q, m.k, m.v))
        if not enable_gqa:
            k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5, is_causal=True, enable_gqa=enable_gqa)
        return m.fc(y.transpose(1, 2).flatten(2))

    return forward


def _windows(m: Any, x: Tensor) -> Tensor:
    """Attention in 3x3 windows with a table of relative positions, as in Swin."""
    n, _, h, w = x.shape
    x = m.embed(x).permute(0, 2, 3, 1).view(n, h // 3, 3, w // 3, 3, 8)
    x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 9, 8)
    q, k, v = m.qkv(x).reshape(-1, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
    index = (torch.arange(9)[:, None] - torch.arange(9)[None, :] + 8).flatten()
    bias = m.table[index].view(9, 9, 2).permute(2, 0, 1)
    attention = ((q * 0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
    x = m.proj((attention @ v).transpose(1, 2).reshape(-1, 9, 8))
    return m.fc(x.view(n, -1, 8).mean(1))


def _group_norm_by_hand(m: Any, x: Tensor) -> Tensor:
    x = m.conv(x)
    n, c, h, w = x.shape
    y = x.view(n, 4, c // 4, h, w)
    y = (y - y.mean((2, 3, 4), keepdim=True)) / (y.var((2, 3, 4), keepdim=True) + 1e-5).sqrt()
    return m.fc((y.view(n, c, h, w) * m.scale.view(1, -1, 1, 1)).relu().mean((2, 3)))


def _squeeze_excite(m: Any, x: Tensor) -> Tensor:
    x = m.conv(x)
    n, c, _, _ = x.shape
    gate = torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1).view(n, c)))))
    return m.fc((x * gate.view(n, c, 1, 1).expand_as(x)).amax((2, 3)))


def _weight_standardized(m: Any, x: Tensor) -> Tensor:
    weight = m.second.weight
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
    return m.fc(F.conv2d(m.first(x), weight, m.second.bias).mean((2, 3)))


CASES: dict[str, _Case] = {
    # entry by entry
    "hardswish": _Case(_pooled(F.hardswish), _two(), {"conv": (8, True)}),
    "softplus is not zero at zero, weights are": _Case(_pooled(F.softplus), _two(), {"conv": (8, True)}),
    "softplus, then a sum": _Case(
        lambda m, x: m.fc(F.softplus(m.conv(x)).sum(1).flatten(1)),
        lambda: {"conv": nn.Conv2d(3, 8, 3), "fc": nn.Linear(16, 2)},
        {"conv": (8, False)},
    ),
    "relu, then a sum": _Case(
        lambda m, x: m.fc(F.relu(m.conv(x)).sum(1).flatten(1)),
        lambda: {"conv": nn.Conv2d(3, 8, 3), "fc": nn.Linear(16, 2)},
        {"conv": (8, True)},
    ),
    "reciprocal is not finite at zero": _Case(_hidden(lambda x: 1 / x), _mlp(), {"a": (8, False)}, _vector),
    "gate that is not zero, on one that is": _Case(
        lambda m, x: m.b((m.a(x) * torch.sigmoid(m.g(x))).sum(-1, keepdim=True)),
        lambda: {"a": nn.Linear(6, 8), "g": nn.Linear(6, 8), "b": nn.Linear(1, 2)},
        {"a": (8, True)},
        _vector,
    ),
    "masked": _Case(
        lambda m, x: m.b(torch.where(m.a(x) > 0, m.a(x), -0.1 * m.c(x)).masked_fill(m.c(x) > 1, 0.5)),
        lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(8, 2), "c": nn.Linear(6, 8)},
        {"a": (8, True)},
        _vector,
    ),
    "prelu": _Case(
        lambda m, x: m.fc(m.act(m.conv(x)).mean((2, 3))), lambda: {**_two()(), "act": nn.PReLU(8)}, {"conv": (8, True)}
    ),
    "prelu with one slope": _Case(
        lambda m, x: m.fc(m.act(m.conv(x)).mean((2, 3))), lambda: {**_two()(), "act": nn.PReLU()}, {"conv": (8, True)}
    ),
    "writing into a part": _Case(
        _hidden(_write_into_part), _mlp(), {"a": (4, True)}, _vector, {"a": "aten.add_.Tensor"}
    ),
    "dropout of whole channels, channels last": _Case(
        _pooled(lambda x: F.dropout2d(x, 0.1, False).contiguous(memory_format=torch.channels_last)),
        _two(),
        {"conv": (8, True)},
    ),
    # reductions
    "mean over units": _Case(
        _hidden(lambda x: x - x.mean(-1, keepdim=True)), _mlp(), {"a": (8, False)}, _vector
    ),
    "mean written as a sum and a length": _Case(
        _hidden(lambda x: x - x.sum(-1, keepdim=True) / x.shape[-1]), _mlp(), {"a": (8, True)}, _vector
    ),
    "unit length": _Case(_hidden(lambda x: F.normalize(x, dim=-1)), _mlp(), {"a": (8, True)}, _vector),
    "largest unit": _Case(_hidden(lambda x: x - x.amax(-1, keepdim=True)), _mlp(), {"a": (8, False)}, _vector),
    "softmax over units": _Case(_hidden(lambda x: x.softmax(-1)), _mlp(), {}, _vector, {"a": "aten.softmax.int"}),
    "cumulative sum": _Case(_hidden(lambda x: x.cumsum(-1)), _mlp(), {}, _vector, {"a": "aten.cumsum.default"}),
    "which is largest": _Case(
        lambda m, x: m.b(m.a(x)) + m.a(x).argmax(-1, keepdim=True), _mlp(), {}, _vector, {"a": "aten.argmax.default"}
    ),
    "standard deviation of pixels": _Case(
        lambda m, x: m.fc(torch.cat(torch.std_mean(m.conv(x), (2, 3)), 1)),
        lambda: {"conv": nn.Conv2d(3, 8, 3), "fc": nn.Linear(16, 2)},
        {"conv": (8, True)},
    ),
    "a sum over merged dimensions": _Case(
        lambda m, x: m.fc(F.softplus(m.conv(x)).flatten(1).sum(1, keepdim=True)),
        lambda: {"conv": nn.Conv2d(3, 8, 3), "fc": nn.Linear(1, 2)},
        {"conv": (8, False)},
    ),
    "a sum over rows after a bias": _Case(
        lambda m, x: m.b(m.w @ x).sum(1),
        lambda: {"w": torch.randn(8, 5), "b": nn.Linear(6, 2)},
        {"w": (8, False)},
        _tokens,
    ),
    "a sum over rows without a bias": _Case(
        lambda m, x: m.b(m.w @ x).sum(1),
        lambda: {"w": torch.randn(8, 5), "b": nn.Linear(6, 2, bias=False)},
        {"w": (8, True)},
        _tokens,
    ),
    # normalizations
    "rms norm": _Case(
        lambda m, x: m.b(m.norm(m.a(x))), lambda: {**_mlp()(), "norm": nn.RMSNorm(8)}, {"a": (8, False)}, _vector
    ),
    "layer norm over images": _Case(
        lambda m, x: m.fc(m.norm(m.conv(x)).flatten(1)),
        lambda: {"conv": nn.Conv2d(3, 8, 3), "norm": nn.LayerNorm([8, 4, 4]), "fc": nn.Linear(128, 2)},
        {"conv": (8, False)},
    ),
    "layer norm without parameters": _Case(
        lambda m, x: m.b(m.norm(m.a(x))),
        lambda: {**_mlp()(), "norm": nn.LayerNorm(8, elementwise_affine=False)},
        {"a": (8, False)},
        _vector,
    ),
    "batch norm of vectors": _Case(
        lambda m, x: m.b(m.norm(m.a(x))), lambda: {**_mlp()(), "norm": nn.BatchNorm1d(8)}, {"a": (8, True)}, _vector
    ),
    "batch norm without parameters": _Case(
        lambda m, x: m.fc(F.relu(m.norm(m.conv(x))).mean((2, 3))),
        lambda: {**_two()(), "norm": nn.BatchNorm2d(8, affine=False)},
        {"conv": (8, True)},
    ),
    "group norm without parameters": _Case(
        lambda m, x: m.fc(F.relu(m.norm(m.conv(x))).mean((2, 3))),
        lambda: {**_two()(), "norm": nn.GroupNorm(4, 8, affine=False)},
        {"conv": (4, True)},
    ),
    "group norm of one group": _Case(
        lambda m, x: m.fc(F.relu(m.norm(m.conv(x))).mean((2, 3))),
        lambda: {**_two()(), "norm": nn.GroupNorm(1, 8)},
        {"conv": (8, False)},
    ),
    "group norm by hand": _Case(
        _group_norm_by_hand, lambda: {**_two()(), "scale": torch.rand(8)}, {"conv": (4, True)}
    ),
    "weight norm": _Case(
        lambda m, x: m.fc(m.second(m.first(x).relu()).relu().mean((2, 3))),
        lambda: {
            "first": nn.Conv2d(3, 6, 3), "second": nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 8, 3)),
            "fc": nn.Linear(8, 2),
        },
        {"first": (6, True), "second": (8, True)},
    ),
    "weight standardization": _Case(
        _weight_standardized,
        lambda: {"first": nn.Conv2d(3, 6, 3), "second": nn.Conv2d(6, 8, 3), "fc": nn.Linear(8, 2)},
        {"first": (6, False), "conv2d_1": (8, True)},
    ),
    # products
    "matrix on the right": _Case(
        lambda m, x: m.b(torch.relu(x @ m.w)),
        lambda: {"w": torch.randn(6, 8), "b": nn.Linear(8, 2)},
        {"w": (8, True)},
        _vector,
    ),
    "matrix on the left": _Case(
        lambda m, x: m.b(torch.relu(m.w @ x).transpose(1, 2)).mean(1),
        lambda: {"w": torch.randn(8, 5), "b": nn.Linear(8, 2)},
        {"w": (8, True)},
        _tokens,
    ),
    "product of two that are not zero at zero": _Case(
        lambda m, x: m.b(F.softplus(m.a(x)).unsqueeze(1) @ torch.sigmoid(m.c(x)).unsqueeze(2))[:, 0],
        lambda: {"a": nn.Linear(6, 8), "c": nn.Linear(6, 8), "b": nn.Linear(1, 2)},
        {"a": (8, False)},
        _vector,
    ),
    "product of two, one zero at zero": _Case(
        lambda m, x: m.b(F.softplus(m.a(x)).unsqueeze(1) @ torch.tanh(m.c(x)).unsqueeze(2))[:, 0],
        lambda: {"a": nn.Linear(6, 8), "c": nn.Linear(6, 8), "b": nn.Linear(1, 2)},
        {"a": (8, True)},
        _vector,
    ),
    "einsum": _Case(
        lambda m, x: m.b(torch.einsum("ntd,hde->nthe", x, m.w).flatten(2)),
        lambda: {"w": torch.randn(3, 6, 4), "b": nn.Linear(12, 2)},
        {"w": (3, True)},  # the heads of (3, 4) are whole slices
        _tokens,
    ),
    "tied autoencoder": _Case(
        lambda m, x: F.linear(torch.relu(m.a(x)), m.a.weight.t()),
        lambda: {"a": nn.Linear(6, 8)},
        {"a": (8, True)},
        _vector,
    ),
    "outer product": _Case(
        lambda m, x: m.b((m.a(x).unsqueeze(2) * m.c(x).unsqueeze(1)).flatten(1)),
        lambda: {"a": nn.Linear(6, 4), "c": nn.Linear(6, 3), "b": nn.Linear(12, 2)},
        {"a": (4, True)},
        _vector,
        {"c": "aten.linear.default"},
    ),
    "grouped keys repeated": _Case(
        _attention(False),
        lambda: {"q": nn.Linear(6, 16), "k": nn.Linear(6, 8), "v": nn.Linear(6, 8), "fc": nn.Linear(16, 2)},
        {"q": (2, True)},
        _tokens,
    ),
    "grouped keys by flag": _Case(
        _attention(True),
        lambda: {"q": nn.Linear(6, 16), "k": nn.Linear(6, 8), "v": nn.Linear(6, 8), "fc": nn.Linear(16, 2)},
        {"q": (2, True)},
        _tokens,
    ),
    "windows with a table of positions": _Case(
        _windows,
        lambda: {
            "embed": nn.Conv2d(3, 8, 1), "qkv": nn.Linear(8, 24), "table": torch.randn(17, 2), "proj": nn.Linear(8, 8),
            "fc": nn.Linear(8, 2),
        },
        {"embed": (8, True), "qkv": (2, True), "proj": (8, True)},
    ),
    # convolutions
    "sequence convolution": _Case(
        lambda m, x: m.b(m.a(x.transpose(1, 2)).relu().amax(2)),
        lambda: {"a": nn.Conv1d(6, 8, 3), "b": nn.Linear(8, 2)},
        {"a": (8, True)},
        _tokens,
    ),
    "volume convolution": _Case(
        lambda m, x: m.b(m.a(x).relu().mean((2, 3, 4))),
        lambda: {"a": nn.Conv3d(2, 8, 3), "b": nn.Linear(8, 2)},
        {"a": (8, True)},
        lambda: torch.randn(2, 2, 4, 4, 4),
    ),
    "grouped transposed convolution": _Case(
        lambda m, x: m.fc(m.up(m.conv(x)).relu().mean((2, 3))),
        lambda: {"conv": nn.Conv2d(3, 8, 3), "up": nn.ConvTranspose2d(8, 12, 2, 2, groups=4), "fc": nn.Linear(12, 2)},
        {"conv": (4, True)},
    ),
    "depthwise with a multiplier": _Case(
        lambda m, x: m.fc(m.depth(m.conv(x)).relu().mean((2, 3))),
        lambda: {"conv": nn.Conv2d(3, 4, 3), "depth": nn.Conv2d(4, 12, 3, groups=4), "fc": nn.Linear(12, 2)},
        {"conv": (4, True)},
    ),
    "grouped on the input": _Case(  # the input's channels stay, the outputs of all three groups go together
        lambda m, x: m.fc(m.conv(x).relu().mean((2, 3))),
        lambda: {"conv": nn.Conv2d(3, 12, 3, groups=3), "fc": nn.Linear(12, 2)},
        {"conv": (4, True)},
    ),
    "reflecting padding": _Case(
        lambda m, x: m.fc(m.second(m.conv(x)).mean((2, 3))),
        lambda: {**_two()(), "second": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")},
        {"conv": (8, True), "second": (8, True)},
    ),
    "squeeze and excite with views": _Case(
        _squeeze_excite,
        lambda: {**_two()(), "down": nn.Linear(8, 4), "up": nn.Linear(4, 8)},
        {"conv": (8, True), "down": (4, True)},
    ),
    # views and pieces
    "halves multiplied": _Case(
        _hidden(lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1]), _mlp(8, 4), {"a": (4, True)}, _vector
    ),
    "uneven pieces": _Case(
        lambda m, x: m.b(m.a(x).split([3, 5], -1)[0].relu()) + m.c(m.a(x).split([3, 5], -1)[1]),
        lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(3, 2), "c": nn.Linear(5, 2)},
        {"a": (3, True), "a:2": (5, True)},
        _vector,
    ),
    "a slice": _Case(
        lambda m, x: m.b(m.a(x)[:, 2:6].relu()) + m.c(m.a(x)[:, -2:]),
        lambda: {"a": nn.Linear(6, 8), "b": nn.Linear(4, 2), "c": nn.Linear(2, 2)},
        {"a": (2, True), "a:2": (4, True), "a:3": (2, True)},
        _vector,
    ),
    "every second": _Case(_hidden(lambda x: x[:, ::2]), _mlp(8, 4), {}, _vector, {"a": "aten.slice.Tensor"}),
    "by number": _Case(
        _hidden(lambda x: x[:, torch.tensor([0, 3, 5])]), _mlp(8, 3), {}, _vector, {"a": "aten.index.Tensor"}
    ),
    "rolled": _Case(_hidden(lambda x: x.roll(1, -1)), _mlp(), {}, _vector, {"a": "aten.roll.default"}),
    "reversed": _Case(_hidden(lambda x: x.flip(-1)), _mlp(), {"a": (8, True)}, _vector),
    "stacked and taken apart": _Case(
        lambda m, x: m.b(torch.stack([m.a(x), m.c(x).relu()], 1).sum(1)),
        lambda: {"a": nn.Linear(6, 8), "c": nn.Linear(6, 8), "b": nn.Linear(8, 2)},
        {"a": (8, True)},
        _vector,
    ),
    "joined along tokens": _Case(
        lambda m, x: m.b(torch.cat([m.cls.expand(x.shape[0], -1, -1), m.a(x)], 1)[:, 0] + m.a(x).sum(1)),
        lambda: {"cls": torch.randn(1, 1, 8), **_mlp()()},
        {"a": (8, True)},
        _tokens,
    ),
    "joined with zeros made here": _Case(
        lambda m, x: m.fc((torch.cat([m.conv(x), x.new_zeros(x.shape[0], 4, 4, 4)], 1) + m.second(x)).mean((2, 3))),
        lambda: {"conv": nn.Conv2d(3, 8, 3), "second": nn.Conv2d(3, 12, 3), "fc": nn.Linear(12, 2)},
        {"conv": (8, True), "second": (4, True)},
    ),
    "shuffle as an operation": _Case(
        lambda m, x: m.fc(m.depth(F.channel_shuffle(m.conv(x), 2)).mean((2, 3))),
        lambda: {**_two()(), "depth": nn.Conv2d(8, 8, 3, groups=8)},
        {"conv": (4, True)},
    ),
    "space to depth": _Case(
        lambda m, x: m.fc(F.pixel_unshuffle(m.conv(x), 2).mean((2, 3))),
        lambda: {"conv": nn.Conv2d(3, 4, 3), "fc": nn.Linear(16, 2)},
        {"conv": (4, True)},
    ),
    "unflattened to heads and back": _Case(
        _hidden(lambda x: x.unflatten(-1, (4, 2)).relu().flatten(1)), _mlp(), {"a": (4, True)}, _vector
    ),
    "repeated to a length in the code": _Case(
        lambda m, x: m.b(m.a(x) + m.c(x).expand(-1, 8)),
        lambda: {"a": nn.Linear(6, 8), "c": nn.Linear(6, 1), "b": nn.Linear(8, 2)},
        {"a": (8, True)},
        _vector,
    ),
    "flattened onto the input": _Case(
        lambda m, x: m.fc(m.conv(x).flatten(1) + x.flatten(1)),
        lambda: {"conv": nn.Conv2d(3, 3, 3, padding=1), "fc": nn.Linear(108, 2)},
        {},
        blocked={"conv": "input"},
    ),
    "an empty piece": _Case(
        _hidden(lambda x: torch.cat([x[:, :8].relu(), x[:, 8:]], -1)), _mlp(), {"a": (8, True)}, _vector
    ),
    "all dimensions of one squeezed": _Case(
        lambda m, x: m.b(m.a(x)[:, None].squeeze()), _mlp(3), {"a": (3, True)}, _vector
    ),
    "resized and pooled": _Case(
        _pooled(lambda x: F.max_pool2d(F.interpolate(x, scale_factor=2, mode="bilinear"), 2)),
        _two(),
        {"conv": (8, True)},
    ),
    "a batch of sums": _Case(
        lambda m, x: m.b(m.a(x.reshape(-1, 6)).relu().view(x.shape[0], 5, -1).mean(1)),
        _mlp(),
        {"a": (8, True)},
        _tokens,
    ),
    "lookup": _Case(
        lambda m, i: m.b(m.table(i).mean(1)),
        lambda: {"table": nn.Embedding(10, 8), "b": nn.Linear(8, 2)},
        {"table": (8, True)},
        lambda: torch.randint(0, 10, (2, 5)),
    ),
    "residual on the input": _Case(
        lambda m, x: m.b(x + m.a(x)), lambda: {"a": nn.Linear(6, 6), "b": nn.Linear(6, 2)}, {}, _vector, {"a": "input"}
    ),
}  # fmt: skip


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max() / x.abs().max().clamp(min=1)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    case = CASES[name]
    model, inputs = _Model(case.forward, **case.modules()).eval(), case.inputs()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.5, 0.5)
    graph = trace(model, inputs)
    assert {group.name: (group.size, group.exact) for group in graph.groups} == case.groups
    stopped = {item.name: item.operation for item in graph.blocked}
    assert case.blocked.items() <= stopped.items()
    draw = random.Random(0)
    for only_exact in (True, False):
        groups = [group for group in graph.groups if group.exact or not only_exact]
        units = {group.name: draw.sample(range(group.size), draw.randrange(1, group.size)) for group in groups}
        small = graph.shrink(model, units)
        for batch in (1, 3):
            few = batch_of(inputs, batch)
            found = outputs(small, few)
            if only_exact and units:
                zero = outputs(graph.zero(model, units), few)
                assert _distance(zero, found) < 1e-4
                assert _distance(zero, outputs(model, few)) > 1e-3
