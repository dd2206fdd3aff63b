"""DiffGrad against a transcription in plain Python, torch's Adam to the last digit, and its own forms."""

import copy
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netwright.core.errors import GradientError, SettingError, StateDictError
from netwright.optim import _compiled
from netwright.optim.diffgrad import DiffGrad
from netwright.testing import check_optimizer

FORMS = {"fused": {"fused": True}, "foreach": {"foreach": True}, "single": {"foreach": False}, "default": {}}
compiled = pytest.mark.skipif(_compiled.load() is None, reason="needs a C++ compiler")


def forms():
    return [pytest.param(FORMS[name], id=name, marks=[compiled] if name == "fused" else []) for name in FORMS]


def by_hand(start, grads, lr, beta1, beta2, eps, decay):
    """The paper's algorithm, entry by entry on Python floats."""
    theta, size = list(start), len(start)
    m, v, last = [0.0] * size, [0.0] * size, [0.0] * size
    for time, grad in enumerate(grads, start=1):
        for i in range(size):
            g = grad[i] + decay * theta[i]
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            friction = 1 / (1 + math.exp(-abs(last[i] - g)))
            corrected = math.sqrt(v[i] / (1 - beta2**time)) + eps
            theta[i] -= lr * friction * m[i] / (1 - beta1**time) / corrected
            last[i] = g
    return theta


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("form", forms())
def test_follows_the_equations(form, scale):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(23, generator=generator, dtype=torch.float64)
    grads = torch.randn(50, 23, generator=generator, dtype=torch.float64) * scale
    param = start.clone().requires_grad_()
    optimizer = DiffGrad([param], lr=0.03, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2, **form)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    theta = by_hand(start.tolist(), grads.tolist(), 0.03, 0.8, 0.95, 1e-3, 0.2)
    torch.testing.assert_close(param.detach(), torch.tensor(theta, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert optimizer.state[param]["step"] == 50


def alike(kind, settings, form, dtype, decay):
    """Largest difference, relative to the parameters, from Adam over gradients whose jumps make the friction 1."""
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((5,), (100, 33), (7, 3, 2))]
    left, right = ([nn.Parameter(value.clone()) for value in start] for _ in range(2))
    ours = DiffGrad(left, lr=0.01, weight_decay=decay, **form)
    theirs = kind(right, lr=0.01, weight_decay=decay, **settings)
    for time in range(20):
        for a, b in zip(left, right, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=dtype) + (200 if time % 2 else -200)
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["foreach", "single"])
def test_with_friction_one_it_is_adam_to_the_last_digit(form, dtype, decay):
    settings = {"foreach": form == "foreach", "fused": False}
    assert alike(torch.optim.Adam, settings, FORMS[form], dtype, decay) == 0.0


@compiled
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_friction_one_the_kernel_is_fused_adam(dtype, decay):
    # To the last digit where compilers contract alike; torch's own forms of Adam differ by as much.
    assert alike(torch.optim.Adam, {"fused": True}, FORMS["fused"], dtype, decay) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("form", forms())
def test_an_unchanging_gradient_moves_at_half_of_adams_pace(form):
    left, right = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, theirs = DiffGrad([left], lr=0.01, **form), torch.optim.Adam([right], lr=0.01)
    gradient = torch.tensor([1.0, -2.0, 300.0], dtype=torch.float64)
    for param, optimizer in ((left, ours), (right, theirs)):
        param.grad = gradient.clone()
        optimizer.step()
    first = torch.sigmoid(gradient.abs())  # the gradient before the first is 0
    torch.testing.assert_close(left.detach(), right.detach() * first, rtol=1e-12, atol=0)
    before = [param.detach().clone() for param in (left, right)]
    for _ in range(5):
        ours.step()
        theirs.step()
    torch.testing.assert_close(left - before[0], (right - before[1]) / 2, rtol=1e-9, atol=1e-12)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_friction_of_the_kernel_is_exact_to_a_few_units(dtype):
    """With beta1 = 0, beta2 = 0 and eps = 0 the first step is lr * friction * sign: the kernel's friction, bare."""
    size = torch.cat(
        [torch.logspace(-12, 3, 20001, dtype=torch.float64), torch.tensor([0.0, 17.0, 40.0, 87.0, 88.0, 708.0])]
    )
    gradient = torch.cat([size, -size]).to(dtype)
    param = torch.zeros_like(gradient, requires_grad=True)
    param.grad = gradient.clone()
    DiffGrad([param], lr=1.0, betas=(0.0, 0.0), eps=0.0, fused=True).step()
    moved = gradient != 0
    wanted = [1 / (1 + math.exp(-abs(value))) for value in gradient[moved].tolist()]
    wanted = torch.tensor(wanted, dtype=torch.float64) * -gradient[moved].sign()
    gap = (param.detach()[moved].double() / wanted - 1).abs().max().item()
    assert gap <= 2 * torch.finfo(dtype).eps


@compiled
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_the_forms_agree(dtype, decay, shapes, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    copies = {name: [value.clone().requires_grad_() for value in start] for name in FORMS}
    optimizers = {name: DiffGrad(copies[name], lr=0.01, weight_decay=decay, **form) for name, form in FORMS.items()}
    for _ in range(4):
        grads = [torch.randn(shape, generator=generator, dtype=dtype) * scale for shape in shapes]
        for name, optimizer in optimizers.items():
            for param, grad in zip(copies[name], grads, strict=True):
                param.grad = grad.clone()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(copies["foreach"], copies["single"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(copies["fused"], copies["default"], strict=True))
    tolerance = 8 * torch.finfo(dtype).eps
    for a, b in zip(copies["fused"], copies["single"], strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0.01 * tolerance)


def test_conformance():
    check_optimizer(functools.partial(DiffGrad, lr=1e-2), complex=True, sparse=False)


def test_conformance_of_the_list_form():
    # "foreach" sets the forms itself.
    check_optimizer(functools.partial(DiffGrad, lr=1e-2, foreach=True), complex=True, sparse=False, skip=["foreach"])


def test_state_is_three_words_for_a_parameter():
    model = nn.Linear(20, 10)
    optimizer = DiffGrad(model.parameters())
    model(torch.randn(4, 20)).sum().backward()
    optimizer.step()
    tensors = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    assert sum(value.numel() for value in tensors) == 3 * sum(param.numel() for param in model.parameters())
    assert [state["step"] for state in optimizer.state.values()] == [1, 1]


@pytest.mark.parametrize("form", forms())
def test_parameters_that_join_late_have_a_step_number_of_their_own(form):
    early, late, alone = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    optimizer = DiffGrad([early, late], lr=0.1, **form)
    other = DiffGrad([alone], lr=0.1, **form)
    for time in range(4):
        early.grad = torch.full((3,), math.sin(time), dtype=torch.float64)
        late.grad = torch.full((3,), math.cos(time), dtype=torch.float64) if time >= 2 else None
        optimizer.step()
        if time >= 2:
            alone.grad = torch.full((3,), math.cos(time), dtype=torch.float64)
            other.step()
    assert torch.equal(late, alone)


def test_the_gradient_is_copied_not_kept():
    """Loops that clear gradients in place must not change the friction; the authors' first program fell into this."""
    results = []
    for set_to_none in (True, False):
        param = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = DiffGrad([param], lr=0.1)
        for time in range(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            (param * (time + 1.0)).sum().backward()
            optimizer.step()
        results.append(param.detach().clone())
    assert torch.equal(*results)


def test_learning_rate_as_a_tensor():
    def run(lr):
        param = torch.ones(4, requires_grad=True)
        optimizer = DiffGrad([param], lr=lr)
        for _ in range(3):
            param.grad = torch.arange(4.0)
            optimizer.step()
        return param.detach()

    assert torch.equal(run(0.25), run(torch.tensor(0.25)))


def test_resumes_in_another_form():
    def steps(optimizer, param, times):
        for time in times:
            param.grad = torch.sin(torch.arange(6.0) * (time + 1))
            optimizer.step()

    param = torch.linspace(-1, 1, 6).requires_grad_()
    optimizer = DiffGrad([param], lr=0.1)
    steps(optimizer, param, range(3))
    other = param.detach().clone().requires_grad_()
    resumed = DiffGrad([other], lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.param_groups[0].update(fused=False, foreach=True)
    steps(optimizer, param, range(3, 6))
    steps(resumed, other, range(3, 6))
    torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -0.1}, "DiffGrad: lr must be a number at least 0, got -0.1."),
        ({"lr": math.nan}, "lr must be a number"),
        ({"betas": (0.9, 1.0)}, "betas[1] must be a number at least 0 and less than 1, got 1.0."),
        ({"betas": (0.9,)}, "betas must be two numbers, got (0.9,)."),
        ({"eps": -1e-8}, "eps must be a number at least 0, got -1e-08."),
        ({"eps": math.inf}, "eps must be a number"),
        ({"weight_decay": -1}, "weight_decay must be a number at least 0, got -1."),
        ({"foreach": "no"}, "foreach must be None, True or False, got 'no'."),
        ({"fused": 0}, "fused must be None, True or False, got 0."),
        ({"foreach": True, "fused": True}, "foreach=True and fused=True exclude each other."),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(SettingError) as caught:
        DiffGrad([torch.zeros(2, requires_grad=True)], **arguments)
    assert message in str(caught.value)


def test_sparse_gradients_are_refused_before_anything_moves():
    first = torch.ones(2, requires_grad=True)
    first.grad = torch.ones(2)
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(GradientError, match="sparse"):
        DiffGrad([first, table.weight]).step()
    assert first.tolist() == [1.0, 1.0]


def test_a_foreign_state_is_refused():
    param = torch.zeros(2, requires_grad=True)
    param.grad = torch.ones(2)
    adam = torch.optim.Adam([param])
    adam.step()
    with pytest.raises(StateDictError, match="not saved by DiffGrad: it lacks previous_grad"):
        DiffGrad([param]).load_state_dict(adam.state_dict())
    with pytest.raises(StateDictError, match="not saved by DiffGrad"):
        DiffGrad([param]).load_state_dict(torch.optim.SGD([param], lr=0.1).state_dict())
