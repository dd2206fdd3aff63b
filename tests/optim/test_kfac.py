"""K-FAC against dense Fisher matrices and loops over samples and positions, all in float64."""

import copy
import gc
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from netwright.core.errors import GradientError, SettingError, StateDictError
from netwright.core.task import load_task
from netwright.optim import _kronecker
from netwright.optim._kronecker import damped_inverse, layer_gradients, layer_inputs, leading_inverse, split_damping
from netwright.optim.kfac import KFAC
from netwright.testing import check_optimizer

DOUBLE = torch.float64
FREE = {"momentum": 0.0, "invert_every": 1, "split": "plain", "kl_clip": None}


def mlp(seed=0, sizes=(4, 5, 3), activation=nn.Tanh, bias=True):
    torch.manual_seed(seed)
    layers = []
    for into, out in itertools.pairwise(sizes):
        layers += [nn.Linear(into, out, bias=bias, dtype=DOUBLE), activation()]
    return nn.Sequential(*layers[:-1])


def data(seed=0, count=7, features=4, classes=3):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, features, generator=generator, dtype=DOUBLE)
    return inputs, torch.randint(classes, (count,), generator=generator)


def train(model, optimizer, steps, first=0, loss=functional.cross_entropy):
    for step in range(first, first + steps):
        inputs, targets = data(100 + step)
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def joint(layer):
    return torch.cat([layer.weight, layer.bias[:, None]], 1).detach().clone().numpy()


# Exactness


def test_one_sample_of_one_layer_is_the_dense_natural_gradient():
    layer = mlp(sizes=(4, 3))[0]
    inputs, targets = data(count=1)
    before = joint(layer)
    optimizer = KFAC(layer.parameters(), layer, lr=0.7, damping=(0.3, 0.2), **FREE)
    functional.cross_entropy(layer(inputs), targets).backward()
    grad = np.concatenate([layer.weight.grad.numpy(), layer.bias.grad.numpy()[:, None]], 1)
    optimizer.step()
    a = np.append(inputs.numpy()[0], 1.0)
    g = grad[:, -1]  # the bias's gradient is that of the output
    np.testing.assert_allclose(np.kron(np.outer(g, g), np.outer(a, a)), np.outer(grad.ravel(), grad.ravel()))
    state = optimizer.state[layer.weight]
    np.testing.assert_allclose(torch.kron(state["b"], state["a"]), np.outer(grad.ravel(), grad.ravel()), atol=1e-14)
    damped = np.kron(np.outer(g, g) + 0.2 * np.eye(3), np.outer(a, a) + 0.3 * np.eye(5))
    wanted = before - 0.7 * np.linalg.solve(damped, grad.ravel()).reshape(3, 5)
    np.testing.assert_allclose(joint(layer), wanted, rtol=1e-10)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_every_block_of_a_deep_linear_network_is_exact_where_inputs_and_residuals_are_independent(sharing):
    model = mlp(sizes=(3, 4, 4, 2), activation=nn.Identity)
    points, errors = torch.randn(3, 3, dtype=DOUBLE), torch.randn(4, 2, dtype=DOUBLE)
    inputs = points.repeat_interleave(4, 0)
    residuals = errors.repeat(3, 1)
    targets = (model(inputs) - residuals).detach()
    optimizer = KFAC(model.parameters(), model, sharing=sharing, **FREE)
    ((model(inputs) - targets) ** 2).sum(1).div(2).mean().backward()
    optimizer.step()
    model = mlp(sizes=(3, 4, 4, 2), activation=nn.Identity)
    for layer, param in zip(model[::2], optimizer.param_groups[0]["params"][::2], strict=True):
        rows = []
        for one, target in zip(inputs, targets, strict=True):
            value = ((model(one) - target) ** 2).sum() / 2
            weight, bias = torch.autograd.grad(value, [layer.weight, layer.bias])
            rows.append(torch.cat([weight, bias[:, None]], 1).flatten())
        fisher = sum(torch.outer(row, row) for row in rows) / len(rows)
        state = optimizer.state[param]
        torch.testing.assert_close(torch.kron(state["b"], state["a"]), fisher, rtol=1e-9, atol=1e-12)


def naive_factors(model, layers, inputs, targets):
    """Loops over samples, with autograd at each layer's output."""
    sums = [[0.0, 0.0] for _ in layers]
    for one, target in zip(inputs, targets, strict=True):
        hidden, seen, outputs = one, [], []
        for module in model:
            if module in layers:
                seen.append(torch.cat([hidden, torch.ones(1, dtype=DOUBLE)]).detach())
            hidden = module(hidden)
            if module in layers:
                outputs.append(hidden)
        grads = torch.autograd.grad(functional.cross_entropy(hidden, target), outputs)
        for total, a, g in zip(sums, seen, grads, strict=True):
            total[0] = total[0] + torch.outer(a, a).numpy() / len(inputs)
            total[1] = total[1] + torch.outer(g, g).numpy() / len(inputs)
    return sums


@pytest.mark.parametrize("split", ["pi", "plain", "trace"])
def test_a_run_is_the_transcription(split):
    settings_ = {"lr": 0.05, "damping": 0.04, "decay": 0.8, "update_every": 2, "invert_every": 3, "momentum": 0.7}
    model, twin = mlp(), mlp()
    optimizer = KFAC(model.parameters(), model, split=split, weight_decay=0.1, kl_clip=None, **settings_)
    layers = [twin[0], twin[2]]
    factors, inverses, buffers, updates = [None, None], [None, None], [0.0, 0.0], 0
    for step in range(12):
        inputs, targets = data(100 + step)
        if step % 2 == 0:
            updates += 1
            keep = min(1 - 1 / updates, 0.8)
            for place, new in enumerate(naive_factors(twin, layers, inputs, targets)):
                old = factors[place]
                factors[place] = (
                    new if old is None else [keep * o + (1 - keep) * n for o, n in zip(old, new, strict=True)]
                )
        value = functional.cross_entropy(twin(inputs), targets)
        grads = torch.autograd.grad(value, list(twin.parameters()))
        for place, layer in enumerate(layers):
            a, b = factors[place]
            if step % 3 == 0:
                pi = math.sqrt(np.trace(a) / len(a) / (np.trace(b) / len(b)))
                shifts = {
                    "pi": (0.2 * pi, 0.2 / pi),
                    "plain": (0.2, 0.2),
                    "trace": (0.2 * np.trace(a), 0.2 * np.trace(b)),
                }
                first, second = shifts[split]
                inverses[place] = np.linalg.inv(a + first * np.eye(len(a))), np.linalg.inv(b + second * np.eye(len(b)))
            grad = np.concatenate([grads[2 * place].numpy(), grads[2 * place + 1].numpy()[:, None]], 1)
            buffers[place] = 0.7 * buffers[place] + inverses[place][1] @ grad @ inverses[place][0]
            moved = torch.from_numpy(joint(layer) * (1 - 0.05 * 0.1) - 0.05 * buffers[place])
            layer.weight.data, layer.bias.data = moved[:, :-1].clone(), moved[:, -1].clone()
        train(model, optimizer, 1, first=step)
        for got, wanted in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


def test_a_layer_without_bias_has_no_column_for_it():
    model = mlp(bias=False)
    optimizer = KFAC(model.parameters(), model)
    train(model, optimizer, 1)
    assert optimizer.state[model[0].weight]["a"].shape == (4, 4)
    model = mlp()
    optimizer = KFAC([model[0].weight, model[2].bias], model, momentum=0.0)
    train(model, optimizer, 1)
    assert optimizer.state[model[0].weight]["a"].shape == (4, 4)


def test_shared_weights_before_a_mean_are_exact_with_reduce():
    layer = mlp(sizes=(3, 2))[0]
    optimizer = KFAC(layer.parameters(), layer, sharing="reduce", **FREE)
    inputs = torch.randn(1, 6, 3, dtype=DOUBLE)
    layer(inputs).mean(1).pow(3).sum().backward()
    grad = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).flatten()
    optimizer.step()
    state = optimizer.state[layer.weight]
    torch.testing.assert_close(torch.kron(state["b"], state["a"]), torch.outer(grad, grad))


# Convolutions

CONVOLUTIONS = st.fixed_dictionaries(
    {
        "kernel_size": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "stride": st.tuples(st.integers(1, 2), st.integers(1, 2)),
        "padding": st.sampled_from([0, (1, 2), "valid"]),
        "dilation": st.integers(1, 2),
        "padding_mode": st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
        "bias": st.booleans(),
    }
)


def check_convolution(options, images):
    layer = nn.Conv2d(2, 3, dtype=DOUBLE, **options)
    output = layer(images)
    grads = torch.randn_like(output)
    output.backward(grads)
    rows = layer_inputs(layer, images, bias=layer.bias is not None, sharing="expand")
    right = layer_gradients(layer, grads, sharing="expand")
    assert rows.shape[:2] == right.shape[:2] == (len(images), output[0, 0].numel())
    wanted = layer.weight.grad.flatten(1)
    if layer.bias is not None:
        wanted = torch.cat([wanted, layer.bias.grad[:, None]], 1)
    torch.testing.assert_close(torch.einsum("nro,nri->oi", right, rows), wanted)
    reduced = layer_inputs(layer, images, bias=layer.bias is not None, sharing="reduce")
    torch.testing.assert_close(reduced, rows.mean(1, keepdim=True))
    torch.testing.assert_close(layer_gradients(layer, grads, sharing="reduce"), right.sum(1, keepdim=True))


@settings(max_examples=40, deadline=None)
@given(CONVOLUTIONS, st.integers(0, 2**16))
def test_patches_and_gradients_make_the_convolutions_gradient(options, seed):
    torch.manual_seed(seed)
    check_convolution(options, torch.randn(2, 2, 6, 7, dtype=DOUBLE))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5)])
def test_same_padding(kernel):
    check_convolution(
        {"kernel_size": kernel, "padding": "same", "dilation": (2, 1)}, torch.randn(2, 2, 8, 9, dtype=DOUBLE)
    )


def test_factors_of_a_convolution_are_the_loop_over_positions():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, (2, 3), stride=2, padding=1, dtype=DOUBLE)
    images = torch.randn(4, 2, 5, 6, dtype=DOUBLE)
    optimizer = KFAC(layer.parameters(), layer)
    layer(images).tanh().flatten(1).square().sum(1).mean().backward()
    optimizer.step()
    layer = copy.deepcopy(layer)
    torch.manual_seed(0)
    layer.load_state_dict(nn.Conv2d(2, 3, (2, 3), stride=2, padding=1, dtype=DOUBLE).state_dict())
    padded = functional.pad(images, (1, 1, 1, 1))
    a, b = np.zeros((13, 13)), np.zeros((3, 3))
    for image, one in zip(padded, images, strict=True):
        output = layer(one)
        (grads,) = torch.autograd.grad(output.tanh().square().sum(), output)
        height, width = output.shape[1:]
        for i, j in itertools.product(range(height), range(width)):
            patch = np.append(image[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 3].numpy().ravel(), 1.0)
            a += np.outer(patch, patch) / (4 * height * width)
            b += np.outer(grads[:, i, j], grads[:, i, j]) / 4
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    np.testing.assert_allclose(state["a"], a, atol=1e-12)
    np.testing.assert_allclose(state["b"], b, atol=1e-12)


def test_a_sequence_through_a_linear_layer():
    layer = mlp(sizes=(3, 2))[0]
    optimizer = KFAC(layer.parameters(), layer)
    inputs = torch.randn(4, 2, 5, 3, dtype=DOUBLE)
    output = layer(inputs)
    output.retain_grad()
    output.pow(3).sum().div(4).backward()
    optimizer.step()
    grads = 4 * output.grad.reshape(40, 2)
    rows = functional.pad(inputs.reshape(40, 3), (0, 1), value=1.0)
    torch.testing.assert_close(optimizer.state[layer.weight]["a"], rows.T @ rows / 40)
    torch.testing.assert_close(optimizer.state[layer.weight]["b"], grads.T @ grads / 4)


# Where it is SGD


class Mixed(nn.Module):
    """Everything that K-FAC leaves to SGD."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4, dtype=DOUBLE)
        self.norm = nn.BatchNorm1d(4, dtype=DOUBLE)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2, dtype=DOUBLE)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=DOUBLE)
        self.tied = nn.Linear(4, 6, bias=False, dtype=DOUBLE)
        self.tied.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones((), dtype=DOUBLE))

    def forward(self, tokens):
        hidden = self.embed(tokens).transpose(1, 2)
        hidden = self.grouped(self.norm(hidden)[..., None])[..., 0].transpose(1, 2)
        return self.tied(self.attention(hidden, hidden, hidden)[0] * self.scale)


def test_other_parameters_take_the_step_of_torch_sgd():
    torch.manual_seed(0)
    model = Mixed()
    twin = copy.deepcopy(model)
    settings_ = {"lr": 0.1, "momentum": 0.9}
    first, second = KFAC(model.parameters(), model, **settings_), torch.optim.SGD(twin.parameters(), **settings_)
    for _ in range(5):
        tokens = torch.randint(6, (3, 5))
        for network, optimizer in ((model, first), (twin, second)):
            optimizer.zero_grad()
            network(tokens).pow(2).mean().backward()
            optimizer.step()
    for (name, got), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(got, wanted), name


def test_with_identities_as_inverses_it_is_torch_sgd():
    model = mlp()
    optimizer = KFAC(model.parameters(), model, lr=0.0, momentum=0.0, invert_every=10**6, kl_clip=None)
    train(model, optimizer, 1)
    for layer in model[::2]:
        for name in ("inverse_a", "inverse_b"):
            state = optimizer.state[layer.weight]
            state[name] = torch.eye(len(state[name]), dtype=DOUBLE)
    for group in optimizer.param_groups:
        group.update(lr=0.1, momentum=0.9)
    twin = mlp()
    wanted = train(twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), 5)
    assert same(train(model, optimizer, 5), wanted)


# Groups and frozen parameters


def parted(model):
    """Weights and biases."""
    weights = [param for param in model.parameters() if param.dim() > 1]
    return weights, [param for param in model.parameters() if param.dim() == 1]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_bias_in_another_group_belongs_to_its_weight(order):
    whole, apart = mlp(), mlp()
    wanted = train(whole, KFAC(whole.parameters(), whole, kl_clip=None), 6)
    groups = [{"params": parted(apart)[place]} for place in order]
    assert same(train(apart, KFAC(groups, apart, kl_clip=None), 6), wanted)


@pytest.mark.parametrize("every", [1, 5])
def test_a_bias_that_is_added_later_joins_its_weight(every):
    model = mlp()
    weights, biases = parted(model)
    optimizer = KFAC(weights, model, update_every=every, **FREE)
    train(model, optimizer, 3)
    twin = copy.deepcopy(model)
    optimizer.add_param_group({"params": biases})
    assert hooks(model) == 2
    wanted = train(twin, KFAC(twin.parameters(), twin, **FREE), 1, first=3)
    assert same(train(model, optimizer, 1, first=3), wanted)
    assert optimizer.state[model[0].weight]["a"].shape == (5, 5)


def test_a_group_that_brings_no_bias_leaves_the_factors():
    model = mlp()
    optimizer = KFAC(model[0].parameters(), model)
    train(model, optimizer, 3)
    before = optimizer.state[model[0].weight]["a"].clone()
    optimizer.add_param_group({"params": model[2].parameters()})
    assert torch.equal(optimizer.state[model[0].weight]["a"], before)


def test_factors_that_were_saved_without_the_bias_begin_anew():
    model = mlp()
    optimizer = KFAC(model.parameters(), model, **FREE)
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["a"] = saved["state"][0]["a"][:-1, :-1]
    optimizer.load_state_dict(saved)
    assert "a" not in optimizer.state[model[0].weight]
    assert "a" in optimizer.state[model[2].weight]
    train(model, optimizer, 1, first=2)
    assert optimizer.state[model[0].weight]["a"].shape == (5, 5)


def test_a_layer_that_is_unfrozen_later_gets_its_natural_gradient():
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = KFAC(model.parameters(), model, **FREE)
    start = joint(model[0])
    functional.cross_entropy(model(data()[0]), data()[1]).backward()
    assert optimizer._listener.places[id(model[0].weight)].tap.inputs is None
    train(model, optimizer, 2)
    np.testing.assert_array_equal(joint(model[0]), start)
    model[0].requires_grad_(True)
    twin = copy.deepcopy(model)
    train(model, optimizer, 1, first=2)
    train(twin, KFAC(twin.parameters(), twin, **FREE), 1, first=2)
    np.testing.assert_array_equal(joint(model[0]), joint(twin[0]))


def test_a_frozen_bias_leaves_its_column_out():
    model, twin = mlp(), mlp()
    for net in (model, twin):
        for layer in net[::2]:
            layer.bias.requires_grad_(False)
    options = {**FREE, "damping": (0.3, 0.2)}
    wanted = train(twin, KFAC(parted(twin)[0], twin, **options), 4)
    for got, value in zip(train(model, KFAC(model.parameters(), model, **options), 4), wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(0, 2**16))
def test_leading_inverse(size, seed):
    rows = torch.randn(size + 1, size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    matrix = rows.T @ rows + 0.1 * torch.eye(size, dtype=DOUBLE)
    wanted = torch.linalg.inv(matrix[:-1, :-1])
    torch.testing.assert_close(leading_inverse(torch.linalg.inv(matrix)), wanted, rtol=1e-7, atol=1e-9)


# Damping and inverses


def test_damping_of_a_group_is_its_own():
    model, whole = mlp(), mlp()
    groups = [
        {"params": model[0].parameters(), "damping": (0.5, 0.25)},
        {"params": model[2].parameters(), "damping": 0.01},
    ]
    optimizer = KFAC(groups, model, **FREE)
    train(model, optimizer, 1)
    wanted = KFAC(whole.parameters(), whole, damping=0.01, **FREE)
    train(whole, wanted, 1)
    assert torch.equal(model[2].weight, whole[2].weight)
    state = optimizer.state[model[0].weight]
    torch.testing.assert_close(state["inverse_a"], torch.linalg.inv(state["a"] + 0.5 * torch.eye(5)))
    torch.testing.assert_close(state["inverse_b"], torch.linalg.inv(state["b"] + 0.25 * torch.eye(5)))


def test_splits_of_damping():
    a, b = torch.diag(torch.tensor([4.0, 8.0, 6.0])), torch.diag(torch.tensor([1.0, 2.0]))
    assert split_damping(a, b, 0.09, "plain") == pytest.approx((0.3, 0.3))
    assert split_damping(a, b, 0.09, "pi") == pytest.approx((0.3 * 2, 0.3 / 2))
    assert split_damping(a, b, 0.09, "trace") == pytest.approx((0.3 * 18, 0.3 * 3))
    assert split_damping(a, b, [0.5, 0.7], "pi") == (0.5, 0.7)
    assert split_damping(a, torch.zeros(2, 2), 0.09, "pi") == pytest.approx((0.3, 0.3))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 12), st.floats(1e-4, 10.0), st.integers(0, 2**16))
def test_damped_inverse(size, rank, damping, seed):
    rows = torch.randn(rank, size, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    matrix = rows.T @ rows
    product = damped_inverse(matrix, damping) @ (matrix + damping * torch.eye(size, dtype=DOUBLE))
    torch.testing.assert_close(product, torch.eye(size, dtype=DOUBLE), rtol=0, atol=1e-8)


def test_damped_inverse_survives_what_cholesky_does_not(monkeypatch):
    singular = torch.diag(torch.tensor([4.0, 0.0]))
    torch.testing.assert_close(damped_inverse(singular, 0.0), torch.diag(torch.tensor([0.25, 0.0])))
    indefinite = torch.diag(torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(damped_inverse(indefinite, 0.5), torch.diag(torch.tensor([0.4, 2.0])))
    steep = torch.tensor([[1e6, 1e6], [1e6, 1e6]])  # float32 loses 1e-3 beside 1e6
    wanted = torch.linalg.inv(steep.double() + 1e-3 * torch.eye(2)).float()
    torch.testing.assert_close(damped_inverse(steep, 1e-3), wanted)

    def fail(*_):
        raise RuntimeError("linalg.eigh: the algorithm failed to converge")

    monkeypatch.setattr(_kronecker.torch.linalg, "eigh", fail)
    torch.testing.assert_close(damped_inverse(indefinite, 0.5), torch.diag(torch.tensor([0.4, 2.0])))
    assert damped_inverse(torch.full((2, 2), math.nan), 0.1).isfinite().all()


def test_one_batch_that_is_not_finite_does_not_spoil_the_factors():
    model = mlp()
    optimizer = KFAC(model.parameters(), model, momentum=0.0)
    train(model, optimizer, 2)
    before = optimizer.state[model[0].weight]["a"].clone()
    inputs, targets = data()
    optimizer.zero_grad()
    functional.cross_entropy(model(inputs * math.inf), targets).backward()
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(optimizer.state[model[0].weight]["a"], before)
    assert all(value.isfinite().all() for value in train(model, optimizer, 3))


def test_clipping_bounds_the_length_in_the_metric():
    free, bound = mlp(), mlp()
    optimizers = [
        KFAC(net.parameters(), net, lr=0.5, **{**FREE, "kl_clip": clip}) for net, clip in ((free, None), (bound, 1e-3))
    ]
    start = [param.detach().clone() for param in free.parameters()]
    moves, grads = [], []
    for net, optimizer in zip((free, bound), optimizers, strict=True):
        train(net, optimizer, 1)
        moves.append([old - param for old, param in zip(start, net.parameters(), strict=True)])
        grads = [param.grad for param in net.parameters()]
    length = 0.5 * sum((move * grad).sum() for move, grad in zip(moves[0], grads, strict=True))
    assert length > 1e-3
    for long, short in zip(*moves, strict=True):
        torch.testing.assert_close(short, long * (1e-3 / length).sqrt())


# Hooks


def test_accumulated_micro_batches_equal_one_batch():
    whole, parts = mlp(), mlp()
    optimizers = [KFAC(net.parameters(), net) for net in (whole, parts)]
    inputs, targets = data(count=8)
    functional.cross_entropy(whole(inputs), targets).backward()
    for place in (0, 4):
        (functional.cross_entropy(parts(inputs[place : place + 4]), targets[place : place + 4]) / 2).backward()
    for optimizer in optimizers:
        optimizer.step()
    for got, wanted in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_what_was_heard_before_zero_grad_is_forgotten():
    first, second = mlp(), mlp()
    optimizers = [KFAC(net.parameters(), net) for net in (first, second)]
    functional.cross_entropy(first(data(5)[0]), data(5)[1]).backward()
    assert same(train(first, optimizers[0], 1), train(second, optimizers[1], 1))


def test_forward_passes_alone_leave_nothing_behind():
    model = mlp()
    optimizer = KFAC(model.parameters(), model)
    with torch.no_grad():
        model(data()[0])
    model(data()[0])
    taps = [place.tap for place in optimizer._listener.places.values()]
    assert all(tap.inputs is None and tap.samples == 0 for tap in taps)
    train(model, optimizer, 1)
    assert all(tap.inputs is None for tap in taps)


def test_copies_of_the_model_are_free_of_the_optimizer():
    model, lone = mlp(), mlp()
    optimizer = KFAC(model.parameters(), model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    for twin in copies:
        functional.cross_entropy(twin(data()[0]), data()[1]).backward()
    assert all(place.tap.inputs is None for place in optimizer._listener.places.values())
    wanted = train(lone, KFAC(lone.parameters(), lone), 3)
    assert same(train(model, optimizer, 3), wanted)
    assert same(train(copies[0], KFAC(copies[0].parameters(), copies[0]), 3), wanted)


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_go_with_the_optimizer():
    model = mlp()
    for _ in range(3):
        optimizer = KFAC(model.parameters(), model)
        train(model, optimizer, 1)
        assert hooks(model) == 2
        del optimizer
        gc.collect()
        assert hooks(model) == 0
    optimizer = KFAC(model.parameters(), model)
    train(model, optimizer, 1)
    optimizer.remove_hooks()
    assert hooks(model) == 0
    before = optimizer.state[model[0].weight]["a"].clone()
    train(model, optimizer, 1)
    assert torch.equal(optimizer.state[model[0].weight]["a"], before)


def test_factors_are_gathered_only_when_they_are_due():
    model = mlp()
    optimizer = KFAC(model.parameters(), model, update_every=3)
    seen = []
    for step in range(7):
        seen.append(next(iter(optimizer._listener.places.values())).tap.armed)
        train(model, optimizer, 1, first=step)
    assert seen == [True, False, False, True, False, False, True]
    assert optimizer.state[model[0].weight]["updates"] == 3


# State


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_run_resumes_to_the_last_bit(kind, stop):
    def build():
        model = mlp().to(kind)
        optimizer = KFAC(model.parameters(), model, update_every=2, invert_every=3)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def go(model, optimizer, schedule, steps):
        for step in steps:
            inputs, targets = data(100 + step)
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs.to(kind)), targets).backward()
            optimizer.step()
            schedule.step()

    model, optimizer, schedule = build()
    go(model, optimizer, schedule, range(stop))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, schedule)], file)
    file.seek(0)
    again = build()
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert again[1].state[again[0][0].weight]["a"].dtype == (DOUBLE if kind == DOUBLE else torch.float32)
    go(model, optimizer, schedule, range(stop, 10))
    go(*again, range(stop, 10))
    assert same(model.parameters(), again[0].parameters())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_is_as_large_as_documented(momentum):
    model = mlp(sizes=(6, 5))
    optimizer = KFAC(model.parameters(), model, momentum=momentum)
    train_inputs = torch.randn(8, 6, dtype=DOUBLE)
    for _ in range(3):
        optimizer.zero_grad()
        model(train_inputs).pow(2).mean().backward()
        optimizer.step()
    kept = sum(v.numel() for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
    assert kept == 2 * (5**2 + 7**2) + (5 * 7 if momentum else 0)


def test_the_state_of_another_optimizer_is_refused():
    model = mlp()
    with pytest.raises(StateDictError, match="not saved by KFAC"):
        KFAC(model.parameters(), model).load_state_dict(torch.optim.Adam(model.parameters()).state_dict())


# Conformance


class Fed(KFAC):
    """K-FAC whose layers see data before each step, as the suite's own loss uses no layers."""

    def __init__(self, params, **settings_):
        groups = [dict(entry) if isinstance(entry, dict) else entry for entry in params]
        model = nn.Module()
        super().__init__(groups, self.wrap(model, groups), **settings_)

    @staticmethod
    def wrap(model, groups):
        params = [p for g in groups for p in (list(g["params"]) if isinstance(g, dict) else [g])]
        for number, param in enumerate(params):
            if param.dim() == 2 and param.shape[0] == 4:
                layer = nn.Linear(param.shape[1], param.shape[0], bias=False)
                layer._parameters["weight"] = param
                model.add_module(f"layer{number}", layer)
            else:
                model._parameters[f"other{number}"] = param
        return model

    def step(self, closure=None):
        loss = self.evaluate(closure)
        for place in self._listener.places.values():
            weight = place.layer.weight
            inputs = torch.linspace(-1, 1, 5 * weight.shape[1], dtype=DOUBLE).view(5, -1).sin().to(weight)
            with torch.enable_grad():
                torch.autograd.grad(place.layer(inputs).pow(2).sum(1).mean(), weight)
        super().step()
        return loss


def test_conformance():
    # Parameters are the suite's own; layers hear data of their own, so that K-FAC's state is at work.
    check_optimizer(lambda params: Fed(params, lr=0.05, update_every=2, invert_every=3), sparse=False, steps=400)


def test_the_defaults_train_on_images():
    inputs, targets = load_task("digits").data.train.tensors
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = KFAC(model.parameters(), model)
    for index in torch.randperm(len(targets))[:960].split(64) * 3:
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs[index]), targets[index]).backward()
        optimizer.step()
    assert (model(inputs).argmax(1) == targets).float().mean() > 0.9


# What it refuses


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lr", -0.1, "lr must be a number at least 0"),
        ("lr", math.nan, "lr must be"),
        ("lr", "fast", "lr must be"),
        ("damping", -1.0, "damping must be a number at least 0"),
        ("damping", (0.1, -0.1), "damping must be"),
        ("damping", (0.1, 0.1, 0.1), "one number or those of both factors"),
        ("damping", math.inf, "damping must be"),
        ("split", "half", "split must be one of pi, plain, trace"),
        ("sharing", "copy", "sharing must be 'expand' or 'reduce'"),
        ("decay", 1.0, "decay must be"),
        ("momentum", -0.5, "momentum must be"),
        ("weight_decay", math.inf, "weight_decay must be"),
        ("kl_clip", 0.0, "kl_clip must be a number greater than 0"),
        ("update_every", 0, "update_every must be a positive integer"),
        ("invert_every", 2.5, "invert_every must be a positive integer"),
        ("invert_every", True, "invert_every must be a positive integer"),
    ],
)
def test_bad_settings(name, value, words):
    model = mlp()
    with pytest.raises(SettingError, match=words):
        KFAC(model.parameters(), model, **{name: value})
    assert hooks(model) == 0


def test_bad_models():
    model = mlp()
    with pytest.raises(SettingError, match=r"model must be the nn\.Module that is trained, got generator"):
        KFAC(model.parameters(), model.parameters())
    with pytest.raises(SettingError, match="none of the parameters belongs to the model"):
        KFAC(mlp(1).parameters(), model)
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="empty"):
        KFAC([], model)
    with pytest.raises(SettingError, match="complex"):
        KFAC([torch.zeros(2, dtype=torch.complex64, requires_grad=True), *model.parameters()], model)
    with pytest.raises(SettingError, match="momentum"):
        KFAC([{"params": model[0].parameters()}, {"params": model[2].parameters(), "momentum": 2.0}], model)
    assert hooks(model) == 0


def test_a_refused_group_leaves_no_hooks():
    model = mlp()
    optimizer = KFAC(model[0].parameters(), model)
    with pytest.raises(SettingError, match="momentum"):
        optimizer.add_param_group({"params": model[2].parameters(), "momentum": 2.0})
    assert hooks(model) == 1
    optimizer.add_param_group({"params": model[2].parameters()})
    assert hooks(model) == 2


def test_sparse_gradients_are_refused_before_anything_moves():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    optimizer = KFAC(model.parameters(), model)
    model(torch.tensor([1, 2])).sum().backward()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(GradientError, match="sparse"):
        optimizer.step()
    assert same(before, model.parameters())
