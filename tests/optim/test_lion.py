"""Lion against a transcription in plain Python, known special cases, and its own forms."""

import copy
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from netwright.core.errors import GradientError, SettingError, StateDictError
from netwright.optim import _compiled
from netwright.optim.lion import Lion
from netwright.testing import check_optimizer

FORMS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "single": {"foreach": False}, "default": {}}
compiled = pytest.mark.skipif(_compiled.load() is None, reason="needs a C++ compiler")


def forms():
    return [pytest.param(FORMS[name], id=name, marks=[compiled] if name == "fused" else []) for name in FORMS]


def by_hand(start, grads, lr, beta1, beta2, decay):
    """The paper's algorithm, entry by entry on Python floats."""
    theta, m = list(start), [0.0] * len(start)
    for grad in grads:
        for i, g in enumerate(grad):
            c = beta1 * m[i] + (1 - beta1) * g
            direction = math.copysign(1.0, c) if c else 0.0
            theta[i] = theta[i] - lr * (direction + decay * theta[i])
            m[i] = beta2 * m[i] + (1 - beta2) * g
    return theta, m


@pytest.mark.parametrize("form", forms())
def test_follows_the_equations(form):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(23, generator=generator, dtype=torch.float64)
    grads = torch.randn(50, 23, generator=generator, dtype=torch.float64)
    param = start.clone().requires_grad_()
    optimizer = Lion([param], lr=0.03, betas=(0.8, 0.95), weight_decay=0.2, **form)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    theta, m = by_hand(start.tolist(), grads.tolist(), 0.03, 0.8, 0.95, 0.2)
    torch.testing.assert_close(param.detach(), torch.tensor(theta, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    exp_avg = optimizer.state[param]["exp_avg"]
    torch.testing.assert_close(exp_avg, torch.tensor(m, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", forms())
def test_without_momentum_it_is_sign_descent(form):
    param = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
    wanted = param.detach().clone()
    optimizer = Lion([param], lr=0.25, betas=(0.0, 0.0), **form)
    for time in range(5):
        param.grad = torch.sin(torch.arange(7, dtype=torch.float64) + time)
        wanted -= 0.25 * param.grad.sign()
        optimizer.step()
    assert torch.equal(param.detach(), wanted)


@pytest.mark.parametrize("form", forms())
def test_the_first_step_reads_the_sign_of_the_gradient_alone(form):
    param = torch.zeros(4, requires_grad=True)
    param.grad = torch.tensor([1e-30, -1e30, 0.0, -0.0])
    Lion([param], lr=0.5, **form).step()
    assert param.tolist() == [-0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("form", forms())
def test_beta1_and_beta2_have_their_places(form):
    """After gradient 1 the momentum is 1 - beta2; gradient -x flips the sign once (1 - beta1) x > beta1 (1 - beta2)."""
    flip = 0.5 * (1 - 0.75) / (1 - 0.5)
    for x, moved in ((flip * 0.99, -2.0), (flip * 1.01, 0.0)):
        param = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = Lion([param], lr=1.0, betas=(0.5, 0.75), **form)
        for grad in (1.0, -x):
            param.grad = torch.tensor([grad], dtype=torch.float64)
            optimizer.step()
        assert param.item() == moved


@compiled
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(shapes=st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_the_forms_agree_to_the_last_bit(dtype, decay, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    copies = {name: [value.clone().requires_grad_() for value in start] for name in FORMS}
    optimizers = {name: Lion(copies[name], lr=0.01, weight_decay=decay, **form) for name, form in FORMS.items()}
    for _ in range(4):
        grads = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
        for name, optimizer in optimizers.items():
            for param, grad in zip(copies[name], grads, strict=True):
                param.grad = grad.clone()
            optimizer.step()
    for name in FORMS:
        assert all(torch.equal(a, b) for a, b in zip(copies[name], copies["single"], strict=True)), name
        states = zip(copies[name], copies["single"], strict=True)
        assert all(
            torch.equal(optimizers[name].state[a]["exp_avg"], optimizers["single"].state[b]["exp_avg"])
            for a, b in states
        )


def test_conformance():
    check_optimizer(functools.partial(Lion, lr=1e-2), complex=True, sparse=False)


def test_conformance_of_the_list_form():
    # "foreach" sets the forms itself.
    check_optimizer(functools.partial(Lion, lr=1e-2, foreach=True), complex=True, sparse=False, skip=["foreach"])


def test_state_is_one_word_for_a_parameter():
    model = nn.Linear(20, 10)
    optimizer = Lion(model.parameters())
    model(torch.randn(4, 20)).sum().backward()
    optimizer.step()
    kept = sum(value.numel() for state in optimizer.state.values() for value in state.values())
    assert kept == sum(param.numel() for param in model.parameters())
    adamw = torch.optim.AdamW(model.parameters())
    adamw.step()
    words = sum(v.numel() for s in adamw.state.values() for v in s.values() if v.ndim)
    assert kept * 2 == words


@pytest.mark.parametrize("form", forms())
def test_learning_rate_as_tensor_and_by_schedule(form):
    def run(lr, schedule):
        param = torch.ones(5, requires_grad=True)
        optimizer = Lion([param], lr=lr, **form)
        scheduler = LambdaLR(optimizer, lambda time: 0.5**time) if schedule else None
        for time in range(4):
            if not schedule:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.25 * 0.5**time)
            param.grad = torch.cos(torch.arange(5.0) + time)
            optimizer.step()
            if scheduler:
                scheduler.step()
        return param.detach()

    assert torch.equal(run(0.25, True), run(torch.tensor(0.25), False))


def test_weight_decay_is_decoupled_and_scaled_by_lr():
    param = torch.tensor([8.0], requires_grad=True)
    param.grad = torch.zeros(1)
    Lion([param], lr=0.5, weight_decay=0.25).step()
    assert param.item() == 7.0  # the sign of nothing is nothing


def test_complex_gradients_move_both_parts():
    param = torch.tensor([1 + 1j], requires_grad=True)
    param.grad = torch.tensor([2 - 3j])
    Lion([param], lr=0.5).step()
    assert param.item() == 0.5 + 1.5j


def test_resumes_in_another_form():
    def steps(optimizer, param, times):
        for time in times:
            param.grad = torch.sin(torch.arange(6.0) * (time + 1))
            optimizer.step()

    param = torch.linspace(-1, 1, 6).requires_grad_()
    optimizer = Lion([param], lr=0.1)
    steps(optimizer, param, range(3))
    other = param.detach().clone().requires_grad_()
    resumed = Lion([other], lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.param_groups[0].update(fused=False, foreach=True)
    steps(optimizer, param, range(3, 6))
    steps(resumed, other, range(3, 6))
    assert torch.equal(param, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -0.1}, "Lion: lr must be a number at least 0, got -0.1."),
        ({"lr": math.inf}, "lr must be a number"),
        ({"lr": "fast"}, "lr must be a number at least 0, got 'fast'."),
        ({"lr": torch.ones(2)}, "lr must be a number"),
        ({"betas": (0.9, 1.0)}, "betas[1] must be a number at least 0 and less than 1, got 1.0."),
        ({"betas": (-0.1, 0.9)}, "betas[0] must be a number"),
        ({"betas": 0.9}, "betas must be two numbers, got 0.9."),
        ({"weight_decay": -1}, "weight_decay must be a number at least 0, got -1."),
        ({"weight_decay": math.nan}, "weight_decay must be a number"),
        ({"foreach": 1}, "foreach must be None, True or False, got 1."),
        ({"fused": "yes"}, "fused must be None, True or False, got 'yes'."),
        ({"foreach": True, "fused": True}, "foreach=True and fused=True exclude each other."),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(SettingError) as caught:
        Lion([torch.zeros(2, requires_grad=True)], **arguments)
    assert message in str(caught.value)


def test_sparse_gradients_are_refused_before_anything_moves():
    first = torch.ones(2, requires_grad=True)
    first.grad = torch.ones(2)
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(GradientError, match="sparse"):
        Lion([first, table.weight]).step()
    assert first.tolist() == [1.0, 1.0]


def test_a_foreign_state_is_refused():
    params = [torch.zeros(2, requires_grad=True)]
    with pytest.raises(StateDictError, match="not saved by Lion"):
        Lion(params).load_state_dict(torch.optim.SGD(params, lr=0.1).state_dict())
