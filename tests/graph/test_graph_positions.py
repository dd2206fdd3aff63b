"""Dimensions whose entries are known by their number, or that have a length of one: what may not be removed of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netwright.core.graph import Graph, trace
from netwright.core.graph.agreement import outputs

L = nn.Linear


class Named(nn.Module):
    """Modules and parameters by name, and a forward that uses them."""

    def __init__(self, compute: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.compute = compute

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def traced(compute: Callable[..., Any], x: Tensor, **parts: nn.Module | Tensor) -> tuple[nn.Module, Graph]:
    model = Named(compute, **parts).eval()
    return model, trace(model, x)


def sizes(graph: Graph) -> dict[str, tuple[int, bool]]:
    return {group.name: (group.size, group.exact) for group in graph.groups}


def agree(model: nn.Module, graph: Graph, x: Tensor, units: dict[str, list[int]]) -> bool:
    zero, small = outputs(graph.zero(model, units), x), outputs(graph.shrink(model, units), x)
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(zero, small, strict=True))


@pytest.mark.parametrize("name", ["max", "min", "median"])
def test_positions_of_extremes_keep_their_numbers(name: str) -> None:
    x = torch.randn(3, 6)

    def extreme(m: Any, x: Tensor) -> Any:
        return getattr(m.a(x), name)(-1)

    for compute in (lambda m, x: tuple(extreme(m, x)), lambda m, x: extreme(m, x)[1]):
        _, graph = traced(compute, x, a=L(6, 8))
        assert graph.groups == ()
        assert {(item.name, item.reason) for item in graph.blocked} == {
            ("a", "the position of its largest or smallest entry is asked for")
        }
    _, graph = traced(lambda m, x: extreme(m, x)[0], x, a=L(6, 8))
    assert sizes(graph) == {"a": (8, False)}


def test_positions_along_another_dimension_are_no_zeros() -> None:
    """Which of the steps is largest is asked for, not which of the units."""
    x = torch.randn(3, 5, 6)
    _, graph = traced(lambda m, x: m.b(m.a(x).max(1)[0]), x, a=L(6, 8), b=L(8, 2))
    assert sizes(graph) == {"a": (8, True)}
    _, graph = traced(lambda m, x: m.a(x).max(1)[1].float().sum(1), x, a=L(6, 8))
    assert sizes(graph) == {"a": (8, False)}


def test_outputs_of_one_entry_stay() -> None:
    x = torch.randn(3, 6)
    model, graph = traced(lambda m, x: m.head(torch.relu(m.body(x))).chunk(2, -1), x, body=L(6, 16), head=L(16, 2))
    assert sizes(graph) == {"body": (16, True)}
    assert agree(model, graph, x, {"body": [0, 5]})


def test_a_gate_of_one_entry_stays() -> None:
    x = torch.randn(3, 6)

    def gated(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        result: Tensor = m.b(h * h[:, :1].sigmoid())
        return result

    model, graph = traced(gated, x, a=L(6, 8), b=L(8, 3))
    assert sizes(graph) == {"a": (7, True)}
    index = next(place.index for place in graph.group("a").places if place.parameter == "a.weight")
    assert index.tolist() == [[unit] for unit in range(1, 8)]
    assert agree(model, graph, x, {"a": [0, 6]})

    def split(m: Any, x: Tensor) -> Tensor:
        gate, rest = m.a(x).split([1, 7], -1)
        result: Tensor = m.b(gate.sigmoid() * rest)
        return result

    model, graph = traced(split, x, a=L(6, 8), b=L(7, 3))
    assert sizes(graph) == {"a": (7, True)}
    assert agree(model, graph, x, {"a": [0, 6]})


def test_tensors_of_one_entry_stay_where_they_are_joined() -> None:
    x = torch.randn(3, 6)
    parts = {"a": L(6, 1), "d": L(6, 1), "b": L(6, 6), "c": L(6, 8), "o": L(8, 3)}
    model, graph = traced(lambda m, x: m.o(torch.cat([m.a(x), m.d(x), m.b(x)], 1) + m.c(x)), x, **parts)
    assert sizes(graph) == {"b": (6, True)}
    index = {place.parameter: place.index[:, 0].tolist() for place in graph.group("b").places}
    assert index["b.weight"] == list(range(6))
    assert index["c.weight"] == list(range(2, 8))
    assert agree(model, graph, x, {"b": [0, 3]})


def test_one_padded_channel_still_goes() -> None:
    x = torch.randn(3, 6)
    model, graph = traced(lambda m, x: m.o(F.pad(m.a(x), (0, 1)) + m.b(x)), x, a=L(6, 7), b=L(6, 8), o=L(8, 3))
    assert sizes(graph) == {"a": (7, True)}
    assert agree(model, graph, x, {"a": [0, 6]})


@pytest.mark.parametrize("pad", [(0, 0, 1, -1), (0, 0, -1, 1)])
def test_a_shift_in_time_is_left_as_it_is(pad: tuple[int, ...]) -> None:
    x = torch.randn(3, 5, 6)

    def shifted(m: Any, x: Tensor) -> Tensor:
        h = m.n(m.e(x))
        result: Tensor = m.o(h + F.pad(h, pad))
        return result

    model, graph = traced(shifted, x, e=L(6, 8), n=nn.LayerNorm(8), o=L(8, 3))
    small = graph.shrink(model, {"e": [0]})
    h = F.linear(x, model.e.weight[1:], model.e.bias[1:])
    h = F.layer_norm(h, (7,), model.n.weight[1:], model.n.bias[1:])
    expected = F.linear(h + F.pad(h, pad), model.o.weight[:, 1:], model.o.bias)
    assert torch.allclose(small(x), expected, atol=1e-5)
    assert torch.allclose(small(x[:2]), expected[:2], atol=1e-5)


def test_where_a_grid_reads_stays() -> None:
    images = torch.randn(3, 3, 8, 8)

    def warped(m: Any, x: Tensor) -> Tensor:
        grid = torch.tanh(m.g(torch.relu(m.c(x)))).permute(0, 2, 3, 1)
        return F.grid_sample(m.v(x), grid, align_corners=False)

    parts = {"c": nn.Conv2d(3, 8, 3, padding=1), "g": nn.Conv2d(8, 2, 1), "v": nn.Conv2d(3, 6, 1)}
    model, graph = traced(lambda m, x: m.o(warped(m, x)), images, **parts, o=nn.Conv2d(6, 2, 1))
    assert sizes(graph) == {"c": (8, True), "v": (6, True)}
    assert [item.reason for item in graph.blocked if item.name == "g"] == ["it says where values are read"]
    assert agree(model, graph, images, {"c": [0, 3], "v": [1]})


def test_heads_of_shared_values_are_not_zero() -> None:
    """Attention of four heads to the same values: a head whose query is zero still attends, to all alike."""
    x = torch.randn(3, 5, 6)

    def shared(m: Any, x: Tensor) -> Tensor:
        q, k = (layer(x).view(x.shape[0], 5, 4, 2).transpose(1, 2) for layer in (m.q, m.k))
        result: Tensor = m.o(F.scaled_dot_product_attention(q, k, m.v).sum(1))
        return result

    _, graph = traced(shared, x, q=L(6, 8), k=L(6, 8), v=torch.randn(1, 1, 5, 2), o=L(2, 3))
    assert sizes(graph) == {"q": (4, False)}
