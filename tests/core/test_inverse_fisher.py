"""The inverse Fisher matrix against dense inverses in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from netwright.core import inverse_fisher
from netwright.core.errors import SettingError
from netwright.core.inverse_fisher import InverseFisher, inverse_root, row_products, solve_gram


def drawn(count, size, *, dtype=torch.float64, seed=0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(gradients, damping, block=None):
    """The inverse from the definition: a mean of outer products, entry by entry of the blocks, inverted."""
    wide = gradients.double()
    fisher = torch.zeros(wide.shape[1], wide.shape[1], dtype=torch.float64)
    for row in wide:
        fisher += torch.outer(row, row) / len(wide)
    if block is not None:
        number = torch.arange(len(fisher)) // block
        fisher *= number[:, None] == number
    fisher += damping * torch.eye(len(fisher), dtype=torch.float64)
    return torch.linalg.inv(fisher)


class Work(TorchDispatchMode):
    """Counts the elements that every operation reads and writes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.is_view:
            return out
        self.elements += sum(x.numel() for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
        return out


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 7),
    size=st.integers(1, 23),
    block=st.none() | st.integers(1, 30),
    damping=st.sampled_from([1e-3, 0.1, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_everything_equals_the_dense_inverse(count, size, block, damping, seed):
    gradients = drawn(count, size, seed=seed)
    wanted = dense(gradients, damping, block)
    inverse = InverseFisher(gradients, damping, block_size=block)
    scale = 1e-10 / damping
    vectors = drawn(3, size, seed=seed + 1)
    torch.testing.assert_close(inverse.dot(vectors), vectors @ wanted, rtol=1e-8, atol=scale)
    torch.testing.assert_close(inverse.dot(vectors[0]), wanted @ vectors[0], rtol=1e-8, atol=scale)
    torch.testing.assert_close(inverse.diagonal(), wanted.diagonal(), rtol=1e-8, atol=scale)
    for row, column in [(0, size - 1), (size - 1, 0), (size // 2, size // 2), (size // 2, size // 3)]:
        assert inverse.entry(row, column) == pytest.approx(float(wanted[row, column]), rel=1e-8, abs=scale)
    assert inverse.entry(-1, 0) == inverse.entry(size - 1, 0)


@pytest.mark.parametrize("block", [None, 9, 3])
def test_chunks_and_batches_of_blocks_change_nothing(monkeypatch, block):
    gradients = drawn(5, 103)
    whole = InverseFisher(gradients, 0.1, block_size=block)
    monkeypatch.setattr(inverse_fisher, "_CPU_CHUNK", 60)
    parts = InverseFisher(gradients, 0.1, block_size=block)
    x = drawn(1, 103, seed=1)[0]
    torch.testing.assert_close(parts.dot(x), whole.dot(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts.diagonal(), whole.diagonal(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(row_products(gradients, x), gradients @ x, rtol=1e-12, atol=1e-12)


def test_without_gradients_worth_the_name_it_divides_by_the_damping():
    x = drawn(1, 6)[0]
    torch.testing.assert_close(InverseFisher(torch.zeros(3, 6).double(), 0.25).dot(x), 4 * x)
    heavy = InverseFisher(drawn(3, 6), 1e12)
    torch.testing.assert_close(heavy.dot(x), x / 1e12, rtol=1e-9, atol=0)
    torch.testing.assert_close(heavy.diagonal(), torch.full((6,), 1e-12, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("damping", [1e-12, 1e-8, 1e-4])
def test_tiny_damping_keeps_the_part_within_the_gradients(damping):
    gradients = drawn(4, 50)
    inside = gradients.T @ torch.tensor([1.0, -2.0, 0.5, 1.0]).double()
    # The pseudoinverse of the undamped matrix is the limit on the span of the gradients; exact inverses lose digits.
    limit = torch.linalg.pinv(gradients.T @ gradients / 4, hermitian=True, rtol=1e-10) @ inside
    got = InverseFisher(gradients, damping).dot(inside)
    gap = float((got - limit).norm() / limit.norm())
    assert gap < 3 * damping + 1e-14 / damping
    diagonal = InverseFisher(gradients, damping).diagonal()
    wanted = dense(gradients, max(damping, 1e-8)).diagonal() * max(damping, 1e-8) / damping
    torch.testing.assert_close(diagonal, wanted, rtol=1e-6, atol=0)


def test_nearly_parallel_gradients_in_float32():
    """Entries of the small matrix differ by less than float32 resolves; the answer keeps the accuracy of its input."""
    common, noise = drawn(1, 400, seed=2), drawn(8, 400, seed=3)
    gradients = (10 * common + 1e-3 * noise).float()
    damping = 1e-6
    wanted = dense(gradients, damping)
    inverse = InverseFisher(gradients, damping)
    x = drawn(1, 400, seed=4, dtype=torch.float32)[0]
    exact = wanted @ x.double()
    assert float((inverse.dot(x).double() - exact).norm() / exact.norm()) < 1e-5
    torch.testing.assert_close(inverse.diagonal().double(), wanted.diagonal(), rtol=1e-6, atol=0)
    # What a float32 Gram matrix would give is off by orders of magnitude: the test has teeth.
    gram = gradients @ gradients.T + 8 * damping * torch.eye(8)
    careless = (x - gradients.T @ torch.linalg.solve(gram, gradients @ x)) / damping
    assert float((careless.double() - exact).norm() / exact.norm()) > 1e-3


def test_repeated_gradients_with_damping_below_rounding():
    gradients = drawn(1, 30).repeat(6, 1) * 1e3
    inverse = InverseFisher(gradients, 1e-12)
    diagonal = inverse.diagonal()
    assert bool(diagonal.isfinite().all())
    assert bool((diagonal >= 1 / (1e-12 + gradients[0].square()) * (1 - 1e-12)).all())
    assert bool((diagonal <= 1e12).all())
    unit = drawn(1, 30, seed=5)[0]
    unit -= gradients[0] * (unit @ gradients[0]) / gradients[0].square().sum()
    torch.testing.assert_close(inverse.dot(unit), unit * 1e12, rtol=1e-3, atol=1e-3 * 1e12)


def test_the_eigendecomposition_takes_over_where_cholesky_fails():
    root = drawn(5, 2)
    gram = root @ root.T - 1e-9 * torch.eye(5).double()  # rounding of that size: no longer positive semidefinite
    got = inverse_root(gram[None], 1e-12)[0]
    assert torch.linalg.cholesky_ex(gram + 1e-12 * torch.eye(5).double())[1] != 0
    values, vectors = torch.linalg.eigh(gram)
    wanted = vectors @ torch.diag(1 / (values.clamp(min=0) + 1e-12)) @ vectors.T
    torch.testing.assert_close(got.T @ got, wanted, rtol=1e-8, atol=1e3)


def test_the_small_system():
    rows, right = drawn(5, 9), drawn(1, 5, seed=1)[0]
    wanted = torch.linalg.solve(rows @ rows.T + 0.3 * torch.eye(5).double(), right)
    torch.testing.assert_close(solve_gram(rows @ rows.T, 0.3, right, 1e-7), wanted)
    # A difference of 1e-3 between rows is solved for, one of 1e-9 is left out: the rest is as with the mean row.
    for difference in (1e-3, 1e-9):
        rows[1] = rows[0] + difference * drawn(1, 9, seed=2)[0]
        got = rows.T @ solve_gram(rows @ rows.T, 1e-20, right, 1e-7)
        if difference == 1e-3:
            exact = rows.T @ torch.linalg.solve(rows @ rows.T, right)
        else:
            exact = torch.linalg.pinv(rows, rtol=1e-7) @ right
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)


def test_it_prunes_a_quadratic_loss_exactly():
    """With the loss's own Hessian, setting a weight to zero costs w² / 2 / diagonal: the answer of least squares."""
    inputs, weights = drawn(40, 6), drawn(1, 6, seed=1)[0]
    damping = 0.05
    hessian = inputs.T @ inputs / 40 + damping * torch.eye(6).double()
    inverse = InverseFisher(inputs, damping)
    for index in range(6):
        others = [place for place in range(6) if place != index]
        shift = torch.zeros(6).double()
        shift[index] = -weights[index]
        shift[others] = torch.linalg.solve(hessian[others][:, others], hessian[others, index] * weights[index])
        rise = float(shift @ hessian @ shift) / 2
        unit = torch.eye(6).double()[index]
        assert float(weights[index] ** 2 / 2 / inverse.diagonal()[index]) == pytest.approx(rise, rel=1e-9)
        best = -weights[index] * inverse.dot(unit) / inverse.diagonal()[index]
        torch.testing.assert_close(best, shift, rtol=1e-9, atol=1e-12)


def work_of(call):
    with Work() as work:
        call()
    return work.elements


def test_cost_is_linear_in_the_parameters_and_memory_is_as_documented():
    count = 8
    sizes = [100_000, 200_000, 300_000]
    built = [work_of(lambda size=size: InverseFisher(drawn(count, size), 0.1)) for size in sizes]
    assert built[2] - built[1] == pytest.approx(built[1] - built[0], rel=0.01)
    assert built[1] < 2.05 * built[0]
    inverses = [InverseFisher(drawn(count, size), 0.1) for size in sizes]
    products = [
        work_of(lambda inverse=inverse, size=size: inverse.dot(torch.ones(size).double()))
        for inverse, size in zip(inverses, sizes, strict=True)
    ]
    assert products[2] - products[1] == products[1] - products[0]
    assert products[0] < 5 * count * sizes[0]
    held = sum(piece.factor.numel() for piece in inverses[0]._pieces) + inverses[0].diagonal().numel()
    assert held == (count + 1) * sizes[0]
    blocks = InverseFisher(drawn(count, 1000), 0.1, block_size=4)
    assert sum(piece.factor.numel() for piece in blocks._pieces) == 4 * 1000


def test_dtypes():
    gradients = drawn(4, 20, dtype=torch.bfloat16)
    before = gradients.clone()
    inverse = InverseFisher(gradients, 0.1)
    out = inverse.dot(torch.ones(20, dtype=torch.bfloat16))
    assert out.dtype == inverse.diagonal().dtype == torch.float32
    torch.testing.assert_close(out.double(), dense(gradients, 0.1).sum(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(gradients, before)
    kept = inverse.diagonal()
    kept.zero_()
    assert float(inverse.diagonal().min()) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3), 0.1), r"a real matrix of gradients, \(m, d\), got torch.float32 of shape \(3,\)"),
        ((torch.ones(0, 3), 0.1), r"shape \(0, 3\)"),
        ((torch.ones(2, 3).long(), 0.1), "torch.int64"),
        ((torch.ones(2, 3, dtype=torch.complex64), 0.1), "torch.complex64"),
        ((torch.tensor([[1.0, float("nan")]]), 0.1), "not finite"),
        ((torch.ones(2, 3), 0.0), "damping must be a finite number greater than 0 .* got 0.0"),
        ((torch.ones(2, 3), -1.0), "got -1.0"),
        ((torch.ones(2, 3), float("nan")), "got nan"),
        ((torch.ones(2, 3), float("inf")), "got inf"),
        ((torch.ones(2, 3), True), "got True"),
        ((torch.ones(2, 3), 1e-40), "whose inverse is finite in torch.float32"),
        ((torch.ones(2, 3), 0.1, 0), "block_size must be a positive integer or None, got 0"),
        ((torch.ones(2, 3), 0.1, 2.0), "got 2.0"),
    ],
)
def test_bad_input(arguments, message):
    gradients, damping, *block = arguments
    with pytest.raises(SettingError, match=message):
        InverseFisher(gradients, damping, block_size=block[0] if block else None)


def test_bad_queries():
    inverse = InverseFisher(torch.ones(2, 3), 0.1)
    with pytest.raises(SettingError, match=r"vectors of 3 entries, got shape \(4,\)"):
        inverse.dot(torch.ones(4))
    with pytest.raises(SettingError, match=r"got shape \(\)"):
        inverse.dot(torch.ones(()))
    with pytest.raises(SettingError, match="no row or column 3 among 3"):
        inverse.entry(0, 3)
