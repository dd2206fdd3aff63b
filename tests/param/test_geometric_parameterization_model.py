"""Converted layers and models: the same function, saved, copied, trained, folded; and what cannot be converted."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from netwright.core.errors import SettingError
from netwright.param.fold import fold
from netwright.param.geometric_parameterization import InputMeanNorm, geometric_parameterization


def naive_direction(angles: Tensor) -> Tensor:
    """Entry by entry from the definition, differentiable."""
    rows = []
    for row in angles:
        entries, product = [], torch.ones((), dtype=torch.double)
        for angle in row:
            entries.append(product * torch.cos(angle))
            product = product * torch.sin(angle)
        rows.append(torch.stack([*entries, product]))
    return torch.stack(rows)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("scale_bias", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 7),
        nn.Linear(1, 4),
        nn.Linear(4, 1, bias=False),
        nn.Conv1d(2, 3, 3, padding=1),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        nn.Conv3d(1, 2, 2, bias=False),
    ],
    ids=str,
)
def test_function_is_kept_and_comes_back(layer, scale_bias):
    layer = copy.deepcopy(layer)
    features = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    size = () if isinstance(layer, nn.Linear) else (5,) * len(layer.kernel_size)
    x = torch.randn(3, features, *size)
    before, keys = layer(x), list(layer.state_dict())
    geometric_parameterization(layer, scale_bias=scale_bias)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-6)
    fold(layer)
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-6)
    assert list(layer.state_dict()) == keys
    assert all(isinstance(value, nn.Parameter) and value.requires_grad for value in layer.parameters())


def test_transposed_radius_is_that_of_outputs():
    """The response of one output channel to all impulses is its row."""
    layer = nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False).double()
    response = layer(torch.eye(4, dtype=torch.double).view(4, 4, 1, 1)).detach().transpose(0, 1).flatten(1)
    geometric_parameterization(layer)
    torch.testing.assert_close(layer.parametrizations.weight.original0.detach(), response.norm(dim=1))


def test_boundary_does_not_depend_on_the_radius():
    layer = geometric_parameterization(nn.Linear(3, 5).double())
    point = -(layer.bias / layer.weight.square().sum(1))[:, None] * layer.weight
    with torch.no_grad():
        layer.parametrizations.weight.original0 *= 7
    torch.testing.assert_close((layer.weight * point).sum(1) + layer.bias, torch.zeros(5, dtype=torch.double))


def test_parameters_are_one_per_weight():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    count = sum(value.numel() for value in model.parameters())
    geometric_parameterization(model)
    assert sum(value.numel() for value in model.parameters()) == count
    assert len(list(model.parameters())) == 6


def test_saves_copies_trains_and_exports():
    model = geometric_parameterization(mlp(), exclude=["2"])
    assert not parametrize.is_parametrized(model[2])
    x = torch.randn(6, 4)
    before = model(x).detach()
    again = geometric_parameterization(mlp(), exclude=["2"])
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    again.load_state_dict(torch.load(stream, weights_only=True), assign=True)
    assert torch.equal(again(x), before)
    replica = copy.deepcopy(model)
    with torch.no_grad():
        replica[0].parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(replica[0].bias, 2 * model[0].bias)
    assert torch.equal(model(x), before)
    fold(replica)
    assert torch.equal(model(x), before)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), before)
    outputs = torch.func.functional_call(model, {"0.parametrizations.weight.original0": torch.zeros(8)}, (x,))
    torch.testing.assert_close(outputs, model[2].bias.expand(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < float((before - 1).square().mean())
    assert all(value.grad is not None for value in model.parameters())


def test_gradients_in_model_are_the_chain_rule():
    """Radius, angles and offset against autograd through the naive transcription, with w = r u and b = r l."""
    layer = nn.Linear(4, 3).double()
    geometric_parameterization(layer)
    values = dict(layer.named_parameters())
    radius, angles, offset = (
        values[f"parametrizations.{key}"].detach().clone().requires_grad_()
        for key in ("weight.original0", "weight.original1", "bias.original")
    )
    x = torch.randn(5, 4, dtype=torch.double)
    torch.relu(layer(x)).square().sum().backward()
    torch.relu(radius * (x @ naive_direction(angles).T + offset)).square().sum().backward()
    held = layer.parametrizations
    for left, right in ((held.weight.original0, radius), (held.weight.original1, angles), (held.bias.original, offset)):
        torch.testing.assert_close(left.grad, right.grad)


def test_assigned_weights_are_taken():
    layer = geometric_parameterization(nn.Linear(3, 2))
    weight, bias = torch.randn(2, 3), torch.randn(2)
    layer.weight = weight
    layer.bias = bias
    torch.testing.assert_close(layer.weight, weight)
    torch.testing.assert_close(layer.bias, bias)


def test_units_without_weights():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.bias[0] = 0
    geometric_parameterization(layer)
    assert torch.equal(layer.weight[0], torch.zeros(3))
    layer(torch.ones(1, 3)).sum().backward()
    assert all(bool(value.grad.isfinite().all()) for value in layer.parameters())


def test_autocast():
    model = geometric_parameterization(mlp())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 4)).dtype == torch.bfloat16


def broken(change):
    def build():
        model = mlp()
        with torch.no_grad():
            change(model)
        return model

    return build


@pytest.mark.parametrize(
    ("model", "given_settings", "message"),
    [
        (lambda: nn.ReLU(), {}, "ReLU has no linear or convolution layer"),
        (lambda: nn.Sequential(nn.LazyConv2d(3, 3)), {}, "layer '0' is lazy"),
        (lambda: mlp().to(torch.bfloat16), {}, "0.weight is of torch.bfloat16, and angles need float32"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), {}, "weight is of torch.complex64"),
        (lambda: nn.Linear(2, 2, device="meta"), {}, "weight is on the meta device and has no values"),
        (lambda: weight_norm(nn.Linear(2, 2)), {}, "weight is not a plain parameter of ParametrizedLinear"),
        (lambda: geometric_parameterization(mlp()), {}, "0.weight is not a plain parameter"),
        (lambda: weight_norm(nn.Conv1d(2, 2, 1), "weight"), {"include": ["x"]}, "include names no layer 'x'"),
        (broken(lambda model: model[2].weight[1].zero_()), {}, "units 1 are zero while their biases are not"),
    ],
)
def test_bad_input(model, given_settings, message):
    built = model()
    before = sum(parametrize.is_parametrized(part) for part in built.modules())
    with pytest.raises(SettingError) as caught:
        geometric_parameterization(built, **given_settings)
    assert message in str(caught.value)
    assert sum(parametrize.is_parametrized(part) for part in built.modules()) == before


def test_parametrized_bias_is_named():
    layer = parametrize.register_parametrization(nn.Linear(2, 2), "bias", nn.Identity())
    with pytest.raises(SettingError, match="the bias of layer '' is no plain parameter"):
        geometric_parameterization(layer)
    geometric_parameterization(layer, scale_bias=False)


def test_units_without_weights_but_with_bias_convert_with_plain_biases():
    model = broken(lambda model: model[2].weight[1].zero_())()
    x = torch.randn(3, 4)
    before = model(x)
    torch.testing.assert_close(geometric_parameterization(model, scale_bias=False)(x), before)


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 4)])
def test_input_mean_norm_is_batch_norm_without_scale(shape):
    x = torch.randn(shape).double() * 3 + 2
    norm = InputMeanNorm(3, momentum=0.1).double()
    reference = (nn.BatchNorm1d if len(shape) < 4 else nn.BatchNorm2d)(
        3, affine=False, momentum=0.1, eps=1e-30
    ).double()
    axes = [axis for axis in range(len(shape)) if axis != 1]
    deviation = x.std(axes, unbiased=False).view(-1, *[1] * (len(shape) - 2))
    torch.testing.assert_close(norm(x), reference(x) * deviation)
    torch.testing.assert_close(norm.running_mean, reference.running_mean)
    norm.eval()
    torch.testing.assert_close(norm(x), x - norm.running_mean.view(-1, *[1] * (len(shape) - 2)))


@pytest.mark.parametrize(
    ("channels", "momentum", "message"),
    [(0, 0.1, "channels"), (2.0, 0.1, "channels"), (2, 0.0, "greater than 0"), (2, 1.5, "at most 1")],
)
def test_input_mean_norm_refuses(channels, momentum, message):
    with pytest.raises(SettingError, match=message):
        InputMeanNorm(channels, momentum)
