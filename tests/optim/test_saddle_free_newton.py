"""Saddle-free Newton against dense eigendecompositions in float64, and on saddles whose ways out are known."""

import gc
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

from netwright.core.errors import ClosureError, GradientError, SettingError
from netwright.optim._krylov import krylov
from netwright.optim.saddle_free_newton import SaddleFreeNewton
from netwright.testing import check_optimizer


def small_net(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    inputs, targets = torch.randn(12, 3, dtype=dtype), torch.randn(12, 2, dtype=dtype)
    return model, lambda: nn.functional.mse_loss(model(inputs), targets), (inputs, targets)


def dense(model, data):
    """The gradient and the Hessian of all parameters as one vector, by forward-over-reverse differentiation."""
    names, shapes = zip(*[(name, param.shape) for name, param in model.named_parameters()], strict=True)
    vector = flat(model.parameters())

    def loss(theta):
        pieces = theta.split([shape.numel() for shape in shapes])
        named = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        return nn.functional.mse_loss(functional_call(model, named, (data[0],)), data[1])

    return torch.func.grad(loss)(vector), hessian(loss)(vector)


def flat(params):
    return torch.cat([param.detach().flatten() for param in params]).clone()


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_in_the_full_space_a_step_is_the_dense_one(seed, damping):
    model, closure, data = small_net(seed)
    gradient, matrix = dense(model, data)
    values, vectors = torch.linalg.eigh(matrix)
    assert float(values[0]) < -1e-3 < 1e-3 < float(values[-1])  # the point has curvature of both signs
    wanted = -vectors @ torch.diag(1 / (values.abs() + damping)) @ vectors.T @ gradient
    start = flat(model.parameters())
    optimizer = SaddleFreeNewton(model.parameters(), lr=1e-3, subspace=len(start), damping=damping)
    before = closure().item()
    assert float(optimizer.step(closure)) == before
    got = (flat(model.parameters()) - start) / 1e-3
    torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8 * float(wanted.norm()))


def test_in_a_small_subspace_it_is_the_projected_one():
    """The span of g, Hg, H²g and the previous direction, orthonormalized by a QR factorization."""
    model, closure, data = small_net()
    optimizer = SaddleFreeNewton(model.parameters(), lr=0.1, subspace=4, damping=0.1)
    points = [flat(model.parameters())]
    for _ in range(2):
        gradient, matrix = dense(model, data)
        optimizer.step(closure)
        points.append(flat(model.parameters()))
    previous = points[1] - points[0]
    span = torch.stack([gradient, matrix @ gradient, matrix @ matrix @ gradient, previous], 1)
    basis = torch.linalg.qr(span / span.norm(dim=0))[0]
    values, vectors = torch.linalg.eigh(basis.T @ matrix @ basis)
    inside = vectors @ torch.diag(1 / (values.abs() + 0.1)) @ vectors.T @ basis.T @ gradient
    torch.testing.assert_close(points[2] - points[1], -0.1 * basis @ inside, rtol=1e-7, atol=1e-9)


def test_the_basis_is_orthonormal_and_stops_where_the_subspace_is_invariant():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))[0]
    values = torch.tensor([1e3, -30.0, 1.0, -0.1] + [2.0] * 26).double()
    matrix = vectors @ torch.diag(values) @ vectors.T
    gradient = torch.randn(30, generator=generator, dtype=torch.float64)
    basis, inside = krylov(gradient, lambda v: matrix @ v, 30, None)
    assert len(basis) == 5  # as many as there are different eigenvalues
    torch.testing.assert_close(basis @ basis.T, torch.eye(5).double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(inside, basis @ matrix @ basis.T, rtol=1e-9, atol=1e-6)
    torch.testing.assert_close(basis[0], gradient / gradient.norm())
    previous = torch.randn(30, generator=generator, dtype=torch.float64)
    longer, inside = krylov(gradient, lambda v: matrix @ v, 8, previous)
    assert torch.linalg.matrix_rank(torch.cat([longer, previous[None]])) == len(longer)
    torch.testing.assert_close(inside, longer @ matrix @ longer.T, rtol=1e-9, atol=1e-6)


def test_on_a_convex_quadratic_it_is_newton():
    """One step without damping; with damping the error shrinks by the factors that the eigenvalues say."""
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix, goal = root @ root.T + torch.eye(6).double(), torch.randn(6, dtype=torch.float64)

    def run(damping, steps):
        point = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        optimizer = SaddleFreeNewton([point], subspace=6, damping=damping)
        for _ in range(steps):
            optimizer.step(lambda: (point - goal) @ matrix @ (point - goal) / 2)
        return point.detach() - goal

    assert float(run(0.0, 1).abs().max()) < 1e-9
    values, vectors = torch.linalg.eigh(matrix)
    wanted = vectors @ ((0.5 / (values + 0.5)) ** 2 * (vectors.T @ -goal))
    torch.testing.assert_close(run(0.5, 2), wanted, rtol=1e-8, atol=1e-10)


def test_convergence_is_quadratic_near_a_minimum():
    point = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)
    optimizer = SaddleFreeNewton([point], subspace=2, damping=0.0)
    errors = []
    for _ in range(5):
        optimizer.step(lambda: torch.cosh(point[0]) + torch.exp(point[1]) - point[1] + point.prod() ** 2)
        errors.append(float(point.detach().norm()))
    assert errors[-1] < 1e-9  # from here on rounding decides which of two losses is lower
    pairs = [(a, b) for a, b in pairwise(errors) if 1e-7 < a < 0.5]
    assert len(pairs) >= 2
    assert all(after < 2 * before**2 for before, after in pairs)


def test_along_negative_curvature_it_moves_away_and_along_positive_towards():
    point = torch.tensor([0.3, 0.1], dtype=torch.float64, requires_grad=True)
    optimizer = SaddleFreeNewton([point], subspace=2, damping=0.0)
    optimizer.step(lambda: point[0] ** 2 - 5 * point[1] ** 2)
    torch.testing.assert_close(point.detach(), torch.tensor([0.0, 0.2]).double())  # Newton's step ends in (0, 0)


def monkey(point):
    return point[0] ** 3 - 3 * point[0] * point[1] ** 2 + (point**4).sum() / 4


def test_it_leaves_a_monkey_saddle_that_gradient_descent_does_not():
    start = torch.tensor([0.5, 1e-6], dtype=torch.float64)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizer = SaddleFreeNewton([ours], subspace=2)
    descent = torch.optim.SGD([theirs], lr=0.05)
    for _ in range(60):
        optimizer.step(lambda: monkey(ours))
    for _ in range(600):
        descent.zero_grad()
        monkey(theirs).backward()
        descent.step()
    assert monkey(ours).item() < -5
    assert float(theirs.detach().norm()) < 0.1
    assert -1e-2 < monkey(theirs).item() < 1e-2


def test_it_leaves_where_rounding_hides_that_the_loss_falls():
    """At a distance of 1e-5 the gain, 1e-10, is lost beside a loss of one in float32; it doubles in each step."""
    point = torch.tensor([0.1, 1e-5], requires_grad=True)
    optimizer = SaddleFreeNewton([point], subspace=2)
    for _ in range(40):
        optimizer.step(lambda: 1 + point[0] ** 2 / 2 - point[1] ** 2 / 2 + point[1] ** 4 / 4)
    torch.testing.assert_close(point.detach(), torch.tensor([0.0, 1.0]), rtol=0, atol=1e-3)


def test_the_loss_never_rises_and_the_best_damping_of_the_grid_is_taken():
    model, closure, _ = small_net(3)
    grid = (1.0, 0.1, 0.01)
    optimizer = SaddleFreeNewton(model.parameters(), damping=grid, subspace=8)
    losses = []
    for _ in range(6):
        saved, state = flat(model.parameters()), optimizer.state_dict()
        single = []
        for value in grid:
            other, others, _ = small_net(3)
            nn.utils.vector_to_parameters(saved.clone(), other.parameters())
            alone = SaddleFreeNewton(other.parameters(), damping=value, subspace=8)
            alone.load_state_dict(state)
            alone.param_groups[0]["damping"] = (value,)
            alone.step(others)
            single.append(others().item())
        optimizer.step(closure)
        losses.append(closure().item())
        assert losses[-1] == pytest.approx(min(single), rel=1e-12)
    assert all(after < before for before, after in pairwise(losses))


def test_beyond_the_grid_damping_grows_until_the_loss_falls():
    """|x| softened: flat curvature far out makes Newton's steps hundreds of times too long."""
    point = torch.tensor([10.0], dtype=torch.float64, requires_grad=True)
    optimizer = SaddleFreeNewton([point], damping=1e-6)
    calls = []

    def closure():
        calls.append(float(point))
        return torch.sqrt(1 + point**2).sum()

    optimizer.step(closure)
    assert 0 < abs(float(point)) < 10
    assert len(calls) > 3
    gaps = [abs(value - 10.0) for value in calls[1:]]
    assert all(after < before for before, after in pairwise(gaps))


def test_at_a_minimum_it_rests():
    point = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = SaddleFreeNewton([point])
    optimizer.step(lambda: (point**2).sum())
    assert torch.equal(point.detach(), torch.zeros(3).double())
    assert not optimizer.state[point]


def test_a_linear_loss_has_no_curvature_and_a_step_of_gradient_descent():
    point = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    slope = torch.tensor([1.0, -2.0, 0.5]).double()
    SaddleFreeNewton([point], damping=2.0).step(lambda: slope @ point)
    torch.testing.assert_close(point.detach(), -slope / 2)


def test_dropout_repeats_itself_within_a_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 20), nn.Dropout(0.5), nn.Tanh(), nn.Linear(20, 1))
    inputs = torch.randn(8, 3)
    optimizer = SaddleFreeNewton(model.parameters(), subspace=4)
    masks = []
    model[1].register_forward_hook(lambda module, given, out: masks.append(out == 0))
    for step in range(3):
        optimizer.step(lambda: (model(inputs) - 1).square().mean())
        assert all(torch.equal(mask, masks[0]) for mask in masks), step
        latest = masks[0]
        masks.clear()
        model(inputs)
        assert not torch.equal(masks[0], latest)
        masks.clear()


def test_memory_is_one_word_for_each_parameter_and_nothing_leaks_over_1000_steps():
    points = [torch.full((2,), 0.5, requires_grad=True), torch.full((3,), 0.5, requires_grad=True)]
    optimizer = SaddleFreeNewton(points, lr=1e-3, subspace=2, damping=1.0)
    target = torch.zeros(())

    def closure():
        return sum(((point - target).cos() * point).sum() for point in points)

    def blocks():
        gc.collect()
        tensors = sum(item.numel() for item in gc.get_objects() if type(item) is torch.Tensor)
        return tensors, sys.getallocatedblocks()

    for step in range(1000):
        target.fill_(step % 7 / 7)
        optimizer.step(closure)
        if step == 199:
            before = blocks()
    after = blocks()
    assert after[0] <= before[0]
    assert after[1] - before[1] < 200  # a leak of one object in a step would be 800
    words = sum(value.numel() for state in optimizer.state.values() for value in state.values())
    assert words == 5
    assert all(point.grad is None for point in points)


def test_a_closure_that_fails_leaves_the_parameters():
    point = torch.tensor([0.3, 0.1], requires_grad=True)
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return (point**2).sum()

    with pytest.raises(KeyboardInterrupt):
        SaddleFreeNewton([point]).step(closure)
    assert torch.equal(point.detach(), torch.tensor([0.3, 0.1]))


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda p: (p**2).sum().detach(), ClosureError, "has no graph"),
        (lambda p: 1.0, ClosureError, "has no graph"),
        (lambda p: p**2, ClosureError, r"a scalar loss, got a tensor of shape \(2,\)"),
        (lambda p: (p * float("nan")).sum(), GradientError, "the gradient is not finite"),
        (lambda p: p.abs().pow(1.5).sum(), GradientError, "no finite second derivatives"),
    ],
)
def test_bad_losses(loss, error, message):
    point = torch.tensor([0.0, 1.0], requires_grad=True)
    with pytest.raises(error, match=message):
        SaddleFreeNewton([point]).step(lambda: loss(point))
    assert torch.equal(point.detach(), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": -1.0}, "lr must be a number at least 0"),
        ({"subspace": 0}, "subspace must be a positive integer, got 0"),
        ({"subspace": 2.5}, "subspace must be a positive integer, got 2.5"),
        ({"damping": ()}, "damping must be a number or several, got none"),
        ({"damping": (1.0, -1.0)}, "damping must be a number at least 0, got -1.0"),
        ({"damping": float("nan")}, "damping must be .* got nan"),
        ({"damping": "small"}, "got 'small'"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(SettingError, match=message):
        SaddleFreeNewton([torch.zeros(2, requires_grad=True)], **setting)


def test_groups_share_the_subspace_and_the_grid_and_have_their_own_lr():
    params = [torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with pytest.raises(SettingError, match="all groups share one subspace, got 20 and 3"):
        SaddleFreeNewton([{"params": params[:1]}, {"params": params[1:], "subspace": 3}])
    with pytest.raises(SettingError, match="all groups share one damping"):
        SaddleFreeNewton([{"params": params[:1]}, {"params": params[1:], "damping": 3.0}])
    with pytest.raises(SettingError, match="no meaning for complex parameters"):
        SaddleFreeNewton([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    optimizer = SaddleFreeNewton([{"params": params[:1]}, {"params": params[1:], "lr": torch.tensor(0.25)}], damping=0)
    optimizer.step(lambda: sum((param**2).sum() for param in params))
    torch.testing.assert_close(params[0].detach(), torch.zeros(2).double())
    torch.testing.assert_close(params[1].detach(), torch.full((2,), 0.75).double())


def test_conformance():
    """Memory is looked at above: its check here would take a minute, for 17 evaluations of the loss in each step."""
    check_optimizer(partial(SaddleFreeNewton, subspace=4), coupled=True, sparse=False, steps=400)
