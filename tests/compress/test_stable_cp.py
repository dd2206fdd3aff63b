"""Stable CP: decompositions of known tensors, optimality of the correction, layers against reconstructed weights."""

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netwright.compress._low_rank_layers import layers_of
from netwright.compress._tensor_decomposition import (
    balanced,
    bounded_least_norm,
    component_norms,
    compose,
    corrected,
    cp_als,
    sensitivity,
    tucker2,
)
from netwright.compress.stable_cp import StableCP, kernel_tensor
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.graph import export_model
from netwright.core.graph.macs import total_macs
from netwright.testing import check_transform, small_tasks
from tests.compress.test_low_rank import task_for
from tests.graph.zoo import build


def draw(*shapes: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def degenerate() -> torch.Tensor:
    """A tensor of rank three that tensors of rank two come as near as one likes, with components that grow."""
    a, b = torch.eye(4, dtype=torch.float64)[:2]
    parts = [(a, a, b), (a, b, a), (b, a, a)]
    return sum(torch.einsum("i,j,k->ijk", *part) for part in parts)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_als_finds_the_components_of_a_known_tensor() -> None:
    factors = draw((5, 3), (6, 3), (7, 3))
    found = cp_als(compose(factors), 3, 2000, generator())
    torch.testing.assert_close(compose(found), compose(factors), atol=2e-3, rtol=1e-3)
    for wanted, got in zip(factors, found, strict=True):  # unique up to order, scale and sign
        cosines = (wanted / wanted.norm(dim=0)).t() @ (got / got.norm(dim=0))
        torch.testing.assert_close(cosines.abs().max(1).values, torch.ones(3, dtype=torch.float64), atol=1e-3, rtol=0)
        assert sorted(cosines.abs().argmax(1).tolist()) == [0, 1, 2]


def test_an_update_of_als_is_least_squares() -> None:
    (tensor,) = draw((3, 24))
    tensor = tensor.reshape(3, 4, 6)
    start = cp_als(tensor, 2, 3, generator())
    after = cp_als(tensor, 2, 200, generator())
    assert (tensor - compose(after)).norm() <= (tensor - compose(start)).norm() + 1e-12
    khatri_rao = torch.einsum("jr,kr->jkr", after[1], after[2]).reshape(24, 2).numpy()
    best = np.linalg.lstsq(khatri_rao, tensor.reshape(3, 24).numpy().T, rcond=None)[0].T
    np.testing.assert_allclose(after[0].numpy(), best, atol=2e-2)


@given(st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_bounded_least_norm_is_that_of_a_solver(seed) -> None:
    target, rows = draw((2, 5), (5, 3), seed=seed)
    least = float((target - target @ rows @ torch.linalg.pinv(rows)).norm())
    bound = 0.5 * (least + float(target.norm()))
    square = float(target.square().sum())
    found = bounded_least_norm(target @ rows, rows.t() @ rows, square, bound)
    assert float((target - found @ rows.t()).norm()) == pytest.approx(bound, rel=1e-6)
    solved = scipy.optimize.minimize(
        lambda a: (a**2).sum(),
        np.zeros(6) + 0.1,
        jac=lambda a: 2 * a,
        constraints={
            "type": "ineq",
            "fun": lambda a: bound**2 - ((target.numpy() - a.reshape(2, 3) @ rows.numpy().T) ** 2).sum(),
        },
    )
    np.testing.assert_allclose(float(found.square().sum()), solved.fun, rtol=1e-3)
    assert bounded_least_norm(target @ rows, rows.t() @ rows, square, 0.9 * least) is None
    assert not bounded_least_norm(target @ rows, rows.t() @ rows, square, 1.1 * square**0.5).any()


def test_sensitivity_is_the_expected_change_under_noise() -> None:
    factors = draw((3, 2), (4, 2), (5, 2))
    noise, size, changes = torch.Generator().manual_seed(1), 1e-3, []
    for _ in range(4000):
        moved = [factor + size * torch.randn(factor.shape, generator=noise, dtype=torch.float64) for factor in factors]
        changes.append(float((compose(moved) - compose(factors)).square().sum()) / size**2)
    spread = np.std(changes) / len(changes) ** 0.5
    assert abs(np.mean(changes) - float(sensitivity(factors))) <= 4 * spread


def test_balancing_keeps_the_tensor_and_is_the_least_sensitive_scaling() -> None:
    factors = draw((3, 2), (4, 2), (5, 2))
    even = balanced(factors)
    torch.testing.assert_close(compose(even), compose(factors))

    def scaled(logs: np.ndarray) -> float:
        one, two = (torch.tensor(part).exp() for part in logs.reshape(2, 2))
        return float(sensitivity([even[0] * one, even[1] * two, even[2] / one / two]))

    solved = scipy.optimize.minimize(scaled, np.full(4, 0.2))
    assert solved.fun == pytest.approx(float(sensitivity(even)), rel=1e-6)


@pytest.mark.parametrize("objective", ["norm", "sensitivity"])
@pytest.mark.parametrize("kind", ["degenerate", "noise", "exact"])
def test_correction_meets_its_bound_and_never_grows(kind, objective) -> None:
    tensor = degenerate() if kind == "degenerate" else draw((6, 35))[0].reshape(6, 5, 7)
    if kind == "exact":
        tensor = compose(draw((6, 2), (5, 2), (7, 2)))
    plain = cp_als(tensor, 2 if kind != "noise" else 12, 300, generator())
    bound = 1.01 * float((tensor - compose(plain)).norm())
    better = corrected(tensor, plain, bound, 300, objective)
    assert (tensor - compose(better)).norm() <= max(bound, 1.01e-6 * float(tensor.norm())) * (1 + 1e-6)
    measure = sensitivity if objective == "sensitivity" else lambda each: component_norms(each).square().sum()
    assert measure(better) <= measure(balanced(plain)) * (1 + 1e-9)
    assert component_norms(better).square().sum() <= component_norms(plain).square().sum() * (1 + 1e-9)
    if kind == "degenerate":
        assert component_norms(better).max() < 0.9 * component_norms(plain).max()


def test_tucker_is_hosvd_at_full_rank_and_exact_where_it_can_be() -> None:
    (flat,) = draw((3, 20))
    tensor = flat.reshape(3, 4, 5)
    core, left, right = tucker2(tensor, (4, 5))
    torch.testing.assert_close(torch.einsum("ipq,jp,kq->ijk", core, left, right), tensor)
    for found, mode in ((left, 1), (right, 2)):
        wanted = torch.linalg.svd(tensor.movedim(mode, 0).flatten(1), full_matrices=False)[0]
        torch.testing.assert_close((wanted.t() @ found).abs(), torch.eye(len(found), dtype=torch.float64))
    inner, first, second = draw((3, 4), (4, 2), (5, 2))
    low = torch.einsum("ipq,jp,kq->ijk", inner.reshape(3, 2, 2), first, second)
    core, left, right = tucker2(low, (2, 2))
    torch.testing.assert_close(torch.einsum("ipq,jp,kq->ijk", core, left, right), low)
    torch.testing.assert_close(left.t() @ left, torch.eye(2, dtype=torch.float64))


@settings(max_examples=10, deadline=None)
@given(
    kind=st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d]),
    decomposition=st.sampled_from(["stable", "als", "tucker", "svd"]),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same"]),
    mode=st.sampled_from(["zeros", "circular"]),
    bias=st.booleans(),
)
def test_layers_equal_their_reconstructed_weight(kind, decomposition, stride, padding, mode, bias) -> None:
    torch.manual_seed(0)
    stride = 1 if padding == "same" else stride
    layer = kind(6, 5, 3, stride, padding, bias=bias, padding_mode=mode).double()
    x = torch.randn(2, 6, *[7] * (layer.weight.ndim - 2), dtype=torch.float64)
    method = StableCP(0.5, decomposition=decomposition, sweeps=3)
    (found,) = layers_of(method, nn.Sequential(layer).eval(), x)
    ranks = method._ranks(found)
    made = method._decomposed(found, ranks, generator())
    assert total_macs(export_model(made, x)) <= 0.5 * found.macs
    dense = kind(6, 5, 3, stride, padding, bias=bias, padding_mode=mode).double()
    dense.load_state_dict({**layer.state_dict(), "weight": rebuilt(made, layer.weight.shape, decomposition)})
    torch.testing.assert_close(made(x), dense(x))


def rebuilt(made: nn.Sequential, shape: torch.Size, decomposition: str) -> torch.Tensor:
    """The dense kernel ``(T, S, ...)`` that a chain of convolutions stands for."""
    weights = [layer.weight.detach().flatten(2) for layer in made]
    if decomposition == "svd":
        return torch.einsum("tr,rsk->tsk", weights[1][..., 0], weights[0]).reshape(shape)
    inward, kernel, outward = weights
    if decomposition == "tucker":
        return torch.einsum("tq,qpk,ps->tsk", outward[..., 0], kernel, inward[..., 0]).reshape(shape)
    return torch.einsum("tr,rk,rs->tsk", outward[..., 0], kernel[:, 0], inward[..., 0]).reshape(shape)


def test_ranks_are_the_largest_that_fit() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 6, 3, stride=2, padding=1)
    x = torch.randn(2, 8, 9, 9)
    for decomposition in ("stable", "tucker", "svd"):
        method = StableCP(0.6, decomposition=decomposition)
        (found,) = layers_of(method, nn.Sequential(layer).eval(), x)
        first, second = method._ranks(found)
        step = (first + 2, second + 2) if decomposition == "tucker" else (first + 1, second + 1)
        assert method._cost(found, (first, second)) <= 0.4 * found.macs < method._cost(found, step)


def test_a_kernel_of_low_rank_is_kept() -> None:
    factors = draw((9, 2), (6, 2), (6, 2))
    layer = nn.Conv2d(6, 6, 3).double()
    layer.weight.data = compose(factors).permute(2, 1, 0).reshape(6, 6, 3, 3).contiguous()
    torch.testing.assert_close(kernel_tensor(layer), compose(factors))
    model = nn.Sequential(layer, nn.ReLU()).eval()
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    smaller = StableCP(0.5, tolerance=1.0)(model, task_for(model, x))
    torch.testing.assert_close(smaller(x), model(x), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("name", ["plain-cnn", "resnet", "unet", "siamese"])
def test_works_on_architectures(name) -> None:
    model, inputs = build(name)
    task = task_for(model, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    smaller = StableCP(0.3, sweeps=5)(model, task)
    assert total_macs(export_model(smaller, task.example())) < total_macs(export_model(model, task.example()))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_conforms() -> None:
    check_transform(lambda: StableCP(0.3, sweeps=9), models=small_tasks()[:1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": 0.0}, r"ratio must lie in \(0, 1\), got 0.0"),
        ({"decomposition": "cp"}, "decomposition must be 'stable' or 'als' or 'tucker' or 'svd', got 'cp'"),
        ({"objective": "error"}, "objective must be 'norm' or 'sensitivity'"),
        ({"tolerance": 0.5}, "tolerance must be a finite number, at least 1, got 0.5"),
        ({"sweeps": 0}, "sweeps must be a positive integer, got 0"),
        ({"exclude": "conv"}, r"exclude must be a sequence of names; write \('conv',\)"),
    ],
)
def test_refuses_settings(given, message) -> None:
    with pytest.raises(TransformError, match=f"StableCP.{message}"):
        StableCP(**given)


def test_refuses_models() -> None:
    images, vectors, _ = small_tasks()
    with pytest.raises(
        TransformError, match=r"ratio=0.999 is out of reach: at rank one at most 0.9\d\d of the operations"
    ):
        StableCP(0.999)(images.model, images)
    with pytest.raises(NothingToPruneError, match="Sequential has no ungrouped convolution with a kernel of more than"):
        StableCP()(vectors.model, vectors)
    with pytest.raises(TransformError, match="exclude names 'stem', which Sequential does not have"):
        StableCP(exclude=["stem"])(images.model, images)
