"""Which side of a sum is a branch, and that the network without it lacks nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from netwright.core.graph import branch_names, traced_branches, without_branches


class Parallel(nn.Module):
    """Attention and perceptron beside each other, behind one normalization or behind one each."""

    def __init__(self, shared: bool, skip_last: bool) -> None:
        super().__init__()
        self.n, self.n2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.q, self.p, self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.shared, self.skip_last = shared, skip_last
        self.parts = {"attn", "mlp"}

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x)
        q = self.q(h)
        attn = self.p(torch.softmax(q @ q.transpose(1, 2), -1) @ q) if "attn" in self.parts else 0
        mlp = self.g(torch.relu(self.f(h if self.shared else self.n2(x)))) if "mlp" in self.parts else 0
        result: Tensor = mlp + attn + x if self.skip_last else x + attn + mlp
        return result


def differs(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-3)


@pytest.mark.parametrize(("shared", "names"), [(True, ["q", "f"]), (False, ["n", "n2"])])
def test_parallel_branches_go_alone(shared: bool, names: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Parallel(shared, False), Parallel(shared, False), nn.Linear(6, 3)).eval()
    x = torch.randn(3, 5, 6)
    module, branches = traced_branches(model, x)
    assert [branch.name for branch in branches] == [f"{block}.{name}" for block in (0, 1) for name in names]
    whole = model(x)
    for number, branch in enumerate(branches):
        block, part = model[number // 2], ("attn", "mlp")[number % 2]
        block.parts.discard(part)
        expected = model(x)
        block.parts.add(part)
        assert differs(expected, whole)
        torch.testing.assert_close(without_branches(model, module, [branch.name])(x), expected)
    for block in model[:2]:
        block.parts.clear()
    torch.testing.assert_close(without_branches(model, module, [branch.name for branch in branches])(x), model(x))


def test_two_branches_that_are_added_first_go_together() -> None:
    """``mlp + attn`` has two sides without a skip, of which the longer one goes; behind them both can."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), Parallel(True, True), nn.Linear(6, 3)).eval(), torch.randn(3, 5, 6)
    module, branches = traced_branches(model, x)
    assert [branch.name for branch in branches] == ["1.q", "1.n"]
    model[1].parts = {"mlp"}
    torch.testing.assert_close(without_branches(model, module, ["1.q"])(x), model(x))
    model[1].parts = set()
    torch.testing.assert_close(without_branches(model, module, ["1.n"])(x), model(x))


class Sum(nn.Module):
    def __init__(self, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.compute(self, x))
        return result


SUMS = {
    "a gate on the stream is a branch": (lambda m, x: x + x * m.a(x).sigmoid(), ["a"]),
    "what others read is shared": (lambda m, x: (h := m.a(x)) * (x + m.b(h)), ["b"]),
    "the stream through dropout": (lambda m, x: torch.dropout(x + m.a(x), 0.1, False) + m.b(x), ["a", "b"]),
    "pieces that others read are shared": (
        lambda m, x: (h := m.a(x).chunk(2, -1))[0].mean() * (x + m.b(torch.cat([h[1], h[1]], -1))),
        ["b"],
    ),
    "two streams": (lambda m, x: (x + m.a(x)) + (x + m.b(x)), ["a", "b"]),
    "a projected skip": (lambda m, x: m.a(x) + m.c(torch.relu(m.b(x))), ["b"]),
}


@pytest.mark.parametrize("name", SUMS)
def test_which_side_is_a_branch(name: str) -> None:
    compute, expected = SUMS[name]
    assert branch_names(Sum(compute), torch.randn(3, 6)) == expected
