"""Random networks, composed of everything that couples channels: zeroed and shrunk models must agree on each."""

import random
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from netwright.core.graph import trace
from netwright.core.graph.agreement import batch_of, outputs

_STEPS = (
    *(
        "conv",
        "conv",
        "pointwise",
        "grouped",
        "depthwise",
        "transposed",
        "norm",
        "group norm",
        "act",
        "add",
        "mul",
        "cat",
    ),
    *("chunk", "shuffle", "gate", "heads", "pad", "slice"),
)


class _Random(nn.Module):
    """A list of feature maps of one size; every step takes some of them and adds one.

    Args:
        steps: what each step does, and two numbers to choose operands and widths by.
    """

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.plan: list[tuple[str, int, int, int]] = []
        widths = [3]
        for number, (step, a, b) in enumerate(steps):
            source, other = a % len(widths), b % len(widths)
            if number == 0 or widths[source] < 4:
                step = "conv"
            if step in ("add", "mul") and widths[source] != widths[other]:
                step = "cat"
            width = self._layer(str(number), step, widths[source], b)
            if step == "cat":
                width = widths[source] + widths[other]
            self.plan.append((step, source, other, b))
            widths.append(width)
        self.widths = widths
        self.head = nn.Linear(widths[-1] * 4, 3)

    def _layer(self, name: str, step: str, width: int, b: int) -> int:
        """Make the layer that a step needs; returns how many channels the step gives."""
        out = 4 * (1 + b % 3)
        groups = [g for g in (2, 4, 8) if width % g == 0 and out % g == 0]
        if step == "grouped" and groups:
            self.layers[name] = nn.Conv2d(width, out, 3, padding=1, groups=groups[b % len(groups)])
        elif step in ("conv", "pointwise", "grouped"):
            kernel = 1 if step == "pointwise" else 3
            self.layers[name] = nn.Conv2d(width, out, kernel, padding=kernel // 2, bias=bool(b % 2))
        elif step == "transposed":
            self.layers[name] = nn.ConvTranspose2d(width, out, 3, padding=1)
        elif step == "depthwise":
            out = width * (1 + b % 2)
            self.layers[name] = nn.Conv2d(width, out, 3, padding=1, groups=width)
        elif step == "norm":
            self.layers[name], out = nn.BatchNorm2d(width, affine=bool(b % 4)), width
        elif step == "group norm":
            sizes = [g for g in (1, 2, 4) if width % g == 0]
            self.layers[name], out = nn.GroupNorm(sizes[b % len(sizes)], width), width
        elif step == "gate":
            self.layers[name], out = nn.Conv2d(width, width, 1), width
        elif step == "chunk":
            out = width // 2
        elif step == "pad":
            out = width + 2 + b % 3
        elif step == "slice":
            out = width - 1 - b % 3
        else:
            out = width
        return out

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for number, (step, source, other, b) in enumerate(self.plan):
            maps.append(self._apply_step(str(number), step, maps[source], maps[other], b))
        return self.head(nn.functional.adaptive_avg_pool2d(maps[-1], 2).flatten(1))

    def _apply_step(self, name: str, step: str, x: Tensor, y: Tensor, b: int) -> Tensor:
        n, c, h, w = x.shape
        if name in self.layers and step != "gate":
            return self.layers[name](x)
        if step == "gate":
            return x * torch.sigmoid(self.layers[name](x.mean((2, 3), keepdim=True)))
        if step == "act":
            return (torch.relu, torch.tanh, nn.functional.silu, nn.functional.softplus)[b % 4](x)
        if step == "add":
            return x + y
        if step == "mul":
            return x * y
        if step == "cat":
            return torch.cat([x, y], 1)
        if step == "chunk":
            halves = x[:, : c // 2 * 2].chunk(2, 1)
            return halves[0] * torch.sigmoid(halves[1]) if b % 2 else halves[1]
        if step == "shuffle" and c % 2 == 0:
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if step == "heads" and c % 2 == 0:
            q = x.flatten(2).view(n, 2, c // 2, h * w).transpose(2, 3)
            y = nn.functional.scaled_dot_product_attention(q, q, q, scale=0.3)
            return y.transpose(2, 3).reshape(n, c, h, w)
        if step == "pad":
            return nn.functional.pad(x, (0, 0, 0, 0, 1, 1 + b % 3))
        if step == "slice":
            return x[:, 1 : c - b % 3]
        return x


def _steps() -> Any:
    number = st.integers(0, 11)
    return st.lists(st.tuples(st.sampled_from(_STEPS), number, number), min_size=3, max_size=9)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(steps=_steps(), seed=st.integers(0, 3))
def test_random_networks(steps: list[tuple[str, int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    model, x = _Random(steps).eval(), torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.5, 0.5)
    graph = trace(model, x)
    draw = random.Random(seed)
    chosen = [group for group in graph.groups if group.exact]
    units = {group.name: draw.sample(range(group.size), draw.randrange(1, group.size)) for group in chosen}
    zero, small = graph.zero(model, units), graph.shrink(model, units)
    for batch in (1, 3):
        few = batch_of(x, batch)
        expected, found = outputs(zero, few)[0], outputs(small, few)[0]
        assert torch.isfinite(expected).all()
        assert float((expected - found).abs().max()) <= 1e-4 * float(expected.abs().max().clamp(min=1))
    graph.shrink(model, {group.name: [0] for group in graph.groups})  # inexact ones too: must run
