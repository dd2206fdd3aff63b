"""Shampoo against scipy's fractional matrix powers, AdaGrad, SGD and Adam, in float64."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import fractional_matrix_power

from netwright.core.errors import GradientError, SettingError, StateDictError
from netwright.core.task import load_task
from netwright.optim import _kronecker
from netwright.optim._kronecker import inverse_roots
from netwright.optim.shampoo import Shampoo, _is_due
from netwright.testing import check_optimizer

DOUBLE = torch.float64
PLAIN = {"momentum": 0.0, "precondition_every": 1}


def leaf(shape, seed=0, dtype=DOUBLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype).requires_grad_()


def drive(optimizer, params, steps, first=0):
    """Steps with fixed pseudo-random gradients; copies of the parameters in the end."""
    for step in range(first, first + steps):
        for place, param in enumerate(params):
            param.grad = leaf(param.shape, 1000 * place + step, param.dtype).detach()
        optimizer.step()
    return [param.detach().clone() for param in params]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def naive_direction(grad, sums, damping, scale=1.0):
    """By Kronecker products and vec, one dimension at a time."""
    order = grad.ndim
    for dim in range(order):
        power = fractional_matrix_power(sums[dim] * scale + damping * np.eye(grad.shape[dim]), -1 / (2 * order)).real
        factors = [power if other == dim else np.eye(grad.shape[other]) for other in range(order)]
        whole = factors[0]
        for factor in factors[1:]:
            whole = np.kron(whole, factor)
        grad = (whole @ grad.ravel()).reshape(grad.shape)
    return grad


def add_moments(sums, grad, decay):
    for dim in range(grad.ndim):
        others = [axis for axis in range(grad.ndim) if axis != dim]
        moment = np.tensordot(grad, grad, (others, others)) if others else np.outer(grad, grad)
        sums[dim] = decay * sums[dim] + (1.0 if decay == 1 else 1 - decay) * moment


@pytest.mark.parametrize("shape", [(4,), (4, 3), (2, 3, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_a_run_is_the_transcription(shape, decay):
    param = leaf(shape)
    wanted = param.detach().numpy().copy()
    optimizer = Shampoo(
        [param], lr=0.3, momentum=0.6, damping=0.02, decay=decay, weight_decay=0.1, precondition_every=1
    )
    sums = [np.zeros((length, length)) for length in shape]
    buffer = np.zeros(shape)
    for step in range(12):
        grad = leaf(shape, step).detach().numpy()
        add_moments(sums, grad, decay)
        scale = 1.0 if decay == 1 else 1 / (1 - decay ** (step + 1))
        buffer = 0.6 * buffer + naive_direction(grad, sums, 0.02, scale)
        wanted = wanted - 0.3 * 0.1 * wanted - 0.3 * buffer
        drive(optimizer, [param], 1, first=step)
        np.testing.assert_allclose(param.detach().numpy(), wanted, rtol=1e-8, atol=1e-10)


def test_the_first_step_of_a_matrix_is_orthogonal():
    param = leaf((3, 5))
    optimizer = Shampoo([param], lr=1.0, damping=0.0, **PLAIN)
    before = param.detach().clone()
    drive(optimizer, [param], 1)
    left, _, right = torch.linalg.svd(param.grad, full_matrices=False)
    torch.testing.assert_close(before - param, left @ right)


def test_in_blocks_of_one_entry_it_is_adagrad():
    ours, theirs = [leaf((3, 4)), leaf((5,))], [leaf((3, 4)), leaf((5,))]
    first = Shampoo(ours, lr=0.2, damping=0.01, block_size=1, **PLAIN)
    second = torch.optim.Adagrad(theirs, lr=0.2, initial_accumulator_value=0.01, eps=0.0)
    for got, wanted in zip(drive(first, ours, 20), drive(second, theirs, 20), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_diagonal_gradients_give_adagrad():
    param = torch.eye(3, dtype=DOUBLE).requires_grad_()
    optimizer = Shampoo([param], lr=0.2, damping=0.0, **PLAIN)
    total, wanted = np.zeros(3), np.ones(3)
    for step in range(10):
        diagonal = leaf((3,), step).detach()
        param.grad = torch.diag(diagonal)
        optimizer.step()
        total += diagonal.numpy() ** 2
        wanted -= 0.2 * diagonal.numpy() / np.sqrt(total)
    np.testing.assert_allclose(param.detach().numpy(), np.diag(wanted), atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 7), max_size=3), st.integers(1, 8), st.integers(0, 2**16))
def test_blocks_are_parameters_of_their_own(shape, size, seed):
    whole = leaf(shape, seed)
    cuts = [[(n * k // -(-n // size), n * (k + 1) // -(-n // size)) for k in range(-(-n // size))] for n in shape]
    places = [tuple(slice(*cut) for cut in block) for block in itertools.product(*cuts)]
    assert all(cut.stop - cut.start <= size for place in places for cut in place)
    dims = [n for n in shape if n > 1]
    parts = [whole.detach()[place].clone().requires_grad_() for place in places]
    start = whole.detach().clone()
    whole.grad = leaf(shape, seed + 1).detach()
    Shampoo([whole], lr=0.5, damping=0.1, block_size=size, **PLAIN).step()
    for place, part in zip(places, parts, strict=True):
        grad = whole.grad[place].numpy().reshape([part.shape[d] for d, n in enumerate(shape) if n > 1] or [1])
        sums = [np.zeros((length, length)) for length in grad.shape]
        add_moments(sums, grad, 1.0)
        assert grad.ndim == max(1, len(dims))
        wanted = start[place].numpy() - 0.5 * naive_direction(grad, sums, 0.1).reshape(part.shape)
        np.testing.assert_allclose(whole.detach()[place].numpy(), wanted, rtol=1e-8, atol=1e-10)


def test_roots_are_found_when_due_and_kept_between():
    assert [age for age in range(-2, 45) if _is_due(age, 10)] == [0, 1, 2, 4, 8, 10, 20, 30, 40]
    assert [age for age in range(5) if _is_due(age, 1)] == [0, 1, 2, 3, 4]
    param = leaf((3, 2))
    optimizer = Shampoo([param], precondition_every=4, start=3)
    seen = []
    for step in range(12):
        before = optimizer.state[param].get("roots")
        drive(optimizer, [param], 1, first=step)
        after = optimizer.state[param].get("roots")
        seen.append(after is not before)
    assert [age - 2 for age, new in enumerate(seen) if new] == [0, 1, 2, 4, 8]


# Grafting


@pytest.mark.parametrize("grafting", ["none", "sgd"])
def test_delayed_for_ever_it_is_torch_sgd(grafting):
    ours, theirs = [leaf((3, 4)), leaf(())], [leaf((3, 4)), leaf(())]
    first = Shampoo(ours, lr=0.2, momentum=0.9, start=10**6, grafting=grafting)
    second = torch.optim.SGD(theirs, lr=0.2, momentum=0.9)
    assert same(drive(first, ours, 20), drive(second, theirs, 20))


def test_delayed_for_ever_it_is_torch_adamw():
    ours, theirs = [leaf((3, 4)), leaf(())], [leaf((3, 4)), leaf(())]
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    first = Shampoo(ours, start=10**6, grafting="adam", **options)
    second = torch.optim.AdamW(theirs, foreach=False, **options)
    assert same(drive(first, ours, 20), drive(second, theirs, 20))


def test_grafted_steps_have_the_direction_of_shampoo_and_the_length_of_the_other():
    for grafting in ("sgd", "adam"):
        param, plain = leaf((3, 4)), leaf((3, 4))
        optimizer = Shampoo([param], lr=0.1, damping=0.01, grafting=grafting, **PLAIN)
        other = (
            torch.optim.SGD([plain], lr=0.1) if grafting == "sgd" else torch.optim.Adam([plain], lr=0.1, foreach=False)
        )
        sums, average = [np.zeros((3, 3)), np.zeros((4, 4))], np.zeros((3, 4))
        for step in range(6):
            starts = param.detach().clone(), plain.detach().clone()
            drive(optimizer, [param], 1, first=step)
            drive(other, [plain], 1, first=step)
            moves = [start - now.detach() for start, now in zip(starts, (param, plain), strict=True)]
            torch.testing.assert_close(moves[0].norm(), moves[1].norm())
            grad = param.grad.numpy()
            add_moments(sums, grad, 1.0)
            average = 0.9 * average + 0.1 * grad
            wanted = naive_direction(average if grafting == "adam" else grad, sums, 0.01)
            np.testing.assert_allclose(moves[0] / moves[0].norm(), wanted / np.linalg.norm(wanted), atol=1e-9)


# Roots


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([2, 4, 6]), st.floats(1e-3, 1.0)), min_size=1, max_size=6))
def test_batched_roots_are_those_of_scipy(cases):
    matrices = []
    for seed, (size, _, _) in enumerate(cases):
        rows = leaf((3, size), seed).detach()
        matrices.append(rows.T @ rows)
    found = inverse_roots(matrices, [order for _, order, _ in cases], [damping for _, _, damping in cases])
    for matrix, root, (size, order, damping) in zip(matrices, found, cases, strict=True):
        wanted = fractional_matrix_power(matrix.numpy() + damping * np.eye(size), -1 / order).real
        np.testing.assert_allclose(root, wanted, rtol=1e-7, atol=1e-9)


def test_roots_that_cannot_be_found_stay_as_they_were(monkeypatch):
    good, bad = torch.eye(2) * 4, torch.full((2, 2), math.nan)
    found = inverse_roots([good, bad], [2, 2], [0.0, 0.0])
    torch.testing.assert_close(found[0], torch.eye(2) / 2)
    assert found[1] is None
    param = leaf((3, 2))
    optimizer = Shampoo([param], **PLAIN)
    drive(optimizer, [param], 2)
    roots = [root.clone() for root in optimizer.state[param]["roots"]]
    fresh = leaf((3, 2))
    begun = Shampoo([fresh], lr=0.1, **PLAIN)

    def fail(*_):
        raise RuntimeError("linalg.eigh: the algorithm failed to converge")

    monkeypatch.setattr(_kronecker.torch.linalg, "eigh", fail)
    drive(optimizer, [param], 1, first=2)
    assert same(optimizer.state[param]["roots"], roots)
    before = fresh.detach().clone()
    drive(begun, [fresh], 1)
    torch.testing.assert_close(fresh.detach(), before - 0.1 * fresh.grad)


def test_without_damping_directions_without_gradient_are_left_out():
    param = leaf((3, 3))
    before = param.detach().clone()
    optimizer = Shampoo([param], lr=1.0, damping=0.0, **PLAIN)
    column = torch.tensor([[3.0, 4.0, 0.0]], dtype=DOUBLE).T
    param.grad = column @ torch.tensor([[1.0, 0.0, 0.0]], dtype=DOUBLE)
    optimizer.step()
    torch.testing.assert_close(before - param.detach(), param.grad / 5)


# State and forms


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grafting", ["none", "sgd", "adam"])
def test_a_run_resumes_to_the_last_bit(kind, grafting):
    def build():
        params = [leaf((5, 4), dtype=kind), leaf((6,), dtype=kind)]
        optimizer = Shampoo(params, precondition_every=3, start=2, block_size=3, grafting=grafting)
        return params, optimizer

    params, optimizer = build()
    middle = drive(optimizer, params, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, resumed = build()
    for param, value in zip(again, middle, strict=True):
        param.data.copy_(value)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state[again[0]]["factors"][0].dtype == (DOUBLE if kind == DOUBLE else torch.float32)
    assert same(drive(optimizer, params, 5, first=5), drive(resumed, again, 5, first=5))


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"momentum": 0.0}, 2 * (6**2 + 4**2)),
        ({"momentum": 0.9}, 2 * (6**2 + 4**2) + 6 * 4),
        ({"grafting": "adam"}, 2 * (6**2 + 4**2) + 2 * 6 * 4),
        ({"momentum": 0.0, "block_size": 2}, 4 * 6 * 4),
    ],
)
def test_state_is_as_large_as_documented(options, numbers):
    param = leaf((6, 4))
    optimizer = Shampoo([param], **options)
    drive(optimizer, [param], 3)
    values = optimizer.state[param].values()
    tensors = [value for entry in values for value in (entry if isinstance(entry, list) else [entry])]
    assert sum(value.numel() for value in tensors if isinstance(value, torch.Tensor)) == numbers


def test_every_group_has_its_own_damping():
    first, second, alone = leaf((3, 4)), leaf((3, 4)), leaf((3, 4))
    drive(Shampoo([{"params": [first], "damping": 0.5}, {"params": [second]}], lr=0.1, **PLAIN), [first, second], 3)
    other = Shampoo([alone], lr=0.1, damping=0.5, **PLAIN)
    drive(other, [alone], 3)
    torch.testing.assert_close(first, alone, rtol=1e-12, atol=1e-12)


def test_the_defaults_train_on_images():
    inputs, targets = load_task("digits").data.train.tensors
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = Shampoo(model.parameters())
    for index in torch.randperm(len(targets))[:960].split(64) * 3:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[index]), targets[index]).backward()
        optimizer.step()
    assert (model(inputs).argmax(1) == targets).float().mean() > 0.9


@pytest.mark.parametrize("grafting", ["none", "sgd", "adam"])
def test_conformance(grafting):
    def make(params):
        return Shampoo(params, lr=0.05, precondition_every=3, start=2, grafting=grafting)

    check_optimizer(make, sparse=False, steps=400)


def test_momentum_is_for_all_but_the_grafted_adam():
    def path(grafting, momentum):
        weight = leaf((3, 2))
        optimizer = Shampoo([weight], lr=0.05, grafting=grafting, momentum=momentum)
        for _ in range(5):
            weight.grad = torch.cos(weight.detach() + 1)
            optimizer.step()
        return weight.detach()

    assert torch.equal(path("adam", 0.0), path("adam", 0.9))
    for grafting in ("none", "sgd"):
        assert not torch.allclose(path(grafting, 0.0), path(grafting, 0.9))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("lr", -0.1, "lr must be a number at least 0"),
        ("lr", math.nan, "lr must be"),
        ("momentum", 1.0, "momentum must be"),
        ("damping", -1e-3, "damping must be a number at least 0"),
        ("damping", (0.1, 0.2), "damping must be"),
        ("decay", 0.0, "decay must be a number greater than 0"),
        ("decay", 1.1, "decay must be"),
        ("weight_decay", math.inf, "weight_decay must be"),
        ("precondition_every", 0, "precondition_every must be a positive integer"),
        ("start", 0, "start must be a positive integer"),
        ("block_size", 2.0, "block_size must be a positive integer"),
        ("grafting", "lion", "grafting must be one of none, sgd, adam"),
        ("betas", (0.9,), "betas must be two numbers"),
        ("betas", (0.9, 1.0), "betas"),
        ("eps", -1.0, "eps must be"),
    ],
)
def test_bad_settings(name, value, words):
    with pytest.raises(SettingError, match=words):
        Shampoo([leaf((2, 2))], **{name: value})


def test_bad_parameters_and_states():
    with pytest.raises(ValueError, match="empty"):
        Shampoo([])
    with pytest.raises(SettingError, match="complex"):
        Shampoo([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises(StateDictError, match="not saved by Shampoo"):
        Shampoo([leaf((2,))]).load_state_dict(torch.optim.Adam([leaf((2,))]).state_dict())
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = Shampoo(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(GradientError, match="sparse"):
        optimizer.step()
