"""Row equilibration against dense linear algebra, and what happens to layers of all kinds."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from netwright.core.errors import SettingError
from netwright.param.fold import fold
from netwright.param.weight_conditioning import WeightConditioning, weight_conditioning


def naive(weight: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Row by row in double precision, from the definition."""
    out = weight.detach().double().clone()
    for row in out:
        length = sum(float(value) ** 2 for value in row.flatten()) ** 0.5
        if length > 0:
            row *= scale / length
    return out


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 7), nn.Conv1d(2, 3, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(1, 2, 2), nn.Linear(1, 4)],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 2.0**0.5])
def test_rows_get_the_length(layer, scale):
    expected = naive(layer.weight, scale)
    layer = weight_conditioning(copy.deepcopy(layer), scale=scale)
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_scales_outputs(groups):
    """Each output channel of the transposed convolution, seen as a linear map, is a row."""
    layer = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=groups, bias=False).double()
    impulses = torch.eye(4, dtype=torch.double).view(4, 4, 1, 1)
    response = layer(impulses).detach()  # (inputs, outputs, 2, 2)
    lengths = response.permute(1, 0, 2, 3).flatten(1).norm(dim=1)
    weight_conditioning(layer)
    torch.testing.assert_close(layer(impulses), response / lengths[:, None, None])


def test_gradient_is_that_of_the_quotient():
    """d(w/|w|) = (I - uu^T)/|w|, written out as a dense Jacobian."""
    layer = weight_conditioning(nn.Linear(4, 3, bias=False).double(), scale=1.5)
    target = torch.randn(3, 4, dtype=torch.double)
    (layer.weight * target).sum().backward()
    original = layer.parametrizations.weight.original
    for row, grad, aim in zip(original.detach(), original.grad, target, strict=True):
        unit = row / row.norm()
        expected = 1.5 * (torch.eye(4, dtype=torch.double) - torch.outer(unit, unit)) @ aim / row.norm()
        torch.testing.assert_close(grad, expected)
    assert torch.autograd.gradcheck(WeightConditioning(), torch.randn(3, 4, dtype=torch.double, requires_grad=True))


@given(st.integers(1, 5), st.integers(1, 6), st.floats(1e-12, 1e12), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_condition_number_within_van_der_sluis(outputs, inputs, size, seed):
    """Equal rows are within sqrt(m) of the best diagonal scaling, here of one that is tried."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, dtype=torch.double, generator=generator)
    weight = weight * size * torch.rand(outputs, 1, dtype=torch.double, generator=generator).exp().pow(4)
    other = weight / weight.abs().sum(1, keepdim=True)
    conditioned = WeightConditioning()(weight)
    torch.testing.assert_close(conditioned.norm(dim=1), torch.ones(outputs, dtype=torch.double))
    bound = outputs**0.5 * float(torch.linalg.cond(other))
    assert outputs > inputs or float(torch.linalg.cond(conditioned)) <= bound * (1 + 1e-6)


def test_zero_and_tiny_rows_stay_and_learn():
    layer = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.weight[1] = 1e-42
    weight_conditioning(layer)
    assert torch.equal(layer.weight[0], torch.zeros(3))
    assert torch.equal(layer.weight[1], torch.full((3,), 1e-42))
    layer(torch.ones(1, 3)).sum().backward()
    grad = layer.parametrizations.weight.original.grad
    assert torch.equal(grad[0], torch.ones(3))
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    layer = nn.Linear(4096, 2, bias=False).to(dtype)
    expected = naive(layer.weight)
    weight_conditioning(layer)
    assert layer.weight.dtype == dtype
    error = (layer.weight.double() - expected).abs().max() / expected.abs().max()
    assert error <= torch.finfo(dtype).eps
    layer.weight.sum().backward()
    assert bool(layer.parametrizations.weight.original.grad.isfinite().all())


def test_scale_of_the_parameter_does_not_matter():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        second.weight *= torch.tensor([[2.0], [4.0], [0.5], [0.25]])
    assert torch.equal(weight_conditioning(first).weight, weight_conditioning(second).weight)


def test_folds_saves_copies_and_exports():
    model = weight_conditioning(mlp())
    x = torch.randn(5, 4)
    before = model(x)
    again = weight_conditioning(mlp())
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    again.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(again(x), before)
    replica = copy.deepcopy(model)
    fold(replica)
    assert type(replica[0]) is nn.Linear
    assert list(replica.state_dict()) == list(mlp().state_dict())
    torch.testing.assert_close(replica(x), before)
    assert torch.equal(model(x), before)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), before)
    weight = model[0].weight.detach().clone()
    parametrize.remove_parametrizations(model[0], "weight")
    assert torch.equal(model[0].weight, weight)


def test_fold_keeps_frozen_parameters_and_works_without_gradients():
    model = mlp().requires_grad_(False)
    weight_conditioning(model)
    with torch.no_grad():
        fold(model)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert not any(value.requires_grad for value in model.parameters())
    frozen = fold(weight_norm(nn.Linear(3, 2).requires_grad_(False)))
    assert isinstance(frozen.weight, nn.Parameter)
    assert list(frozen.buffers()) == []


def test_optimizer_made_before_goes_on():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight_conditioning(model)
    model(torch.randn(5, 4)).square().sum().backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    torch.testing.assert_close(model[0].weight.norm(dim=1), torch.ones(8))


def test_goes_on_top_of_other_parametrizations():
    layer = weight_conditioning(weight_norm(nn.Linear(4, 3)))
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(3))


def test_one_parameter_by_name_and_patterns():
    attention = nn.MultiheadAttention(4, 2)
    weight_conditioning(attention, "in_proj_weight")
    torch.testing.assert_close(attention.in_proj_weight.norm(dim=1), torch.ones(12))
    model = weight_conditioning(nn.ModuleDict({"body": mlp(), "head": nn.Linear(3, 2)}), include=["body.*"])
    conditioned = [name for name, part in model.named_modules() if parametrize.is_parametrized(part)]
    assert conditioned == ["body.0", "body.2"]


def tied() -> nn.Sequential:
    model = mlp()
    model.add_module("tied", nn.Linear(4, 8))
    model.tied.weight = model[0].weight
    return model


def reused() -> nn.Sequential:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.ReLU(), layer)


def test_a_layer_used_twice_is_conditioned_once():
    model = weight_conditioning(reused())
    assert len(model[0].parametrizations.weight) == 1
    torch.testing.assert_close(model[2].weight.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(
    ("model", "given_settings", "message"),
    [
        (lambda: None, {}, "needs an nn.Module, got NoneType"),
        (lambda: nn.Sequential(nn.ReLU()), {}, "Sequential has no linear or convolution layer"),
        (lambda: nn.BatchNorm1d(3), {}, "shape (3,); a weight with rows is needed"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), {}, "layer '0' is lazy"),
        (lambda: nn.Sequential(nn.Linear(0, 3)), {}, "0.weight has shape (3, 0)"),
        (tied, {}, "0.weight is shared by 0.weight, tied.weight"),
        (lambda: weight_conditioning(mlp()), {}, "0.weight is conditioned already"),
        (lambda: weight_conditioning(nn.Linear(2, 2)), {}, "weight is conditioned already"),
        (lambda: torch.nn.utils.weight_norm(nn.Linear(2, 2)), {}, "weight is not a plain parameter of Linear"),
        (mlp, {"name": "kernel"}, "0.kernel is not a plain parameter of Linear"),
        (mlp, {"exclude": "2"}, "exclude must be a sequence"),
        (mlp, {"include": ["3"]}, "include names no layer '3'; the closest is"),
        (mlp, {"exclude": ["*"]}, "leave none of the layers 0, 2"),
        (mlp, {"scale": 0.0}, "scale must be a number greater than 0"),
        (mlp, {"scale": float("nan")}, "scale must be a number greater than 0"),
        (mlp, {"scale": True}, "scale must be a number greater than 0"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_bad_input(model, given_settings, message):
    built = model()
    with pytest.raises(SettingError) as caught:
        weight_conditioning(built, **given_settings)
    assert message in str(caught.value)
    assert built is None or sum(isinstance(part, WeightConditioning) for part in built.modules()) in (0, 1, 2)


def test_nothing_is_changed_when_one_layer_cannot():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    parametrize.register_parametrization(model[1], "weight", WeightConditioning())
    with pytest.raises(SettingError):
        weight_conditioning(model)
    assert not parametrize.is_parametrized(model[0])
