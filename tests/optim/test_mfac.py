"""M-FAC against its definition: dense matrices in float64, built anew from a list of gradients at every step."""

import gc
import io
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from netwright.core.errors import GradientError, SettingError, StateDictError
from netwright.optim.mfac import MFAC
from netwright.testing import check_optimizer


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense_path(start, gradients, *, lr, window, damping, momentum=0.0, weight_decay=0.0):
    """Parameters after each gradient: an explicit Fisher matrix, an explicit inverse, a Python list as window."""
    theta, velocity, kept, path = start.double().clone(), torch.zeros(len(start)).double(), [], []
    for gradient in gradients.double():
        kept = [*kept, gradient + weight_decay * theta][-window:]
        fisher = sum(torch.outer(g, g) for g in kept) / window + damping * torch.eye(len(theta)).double()
        natural = torch.linalg.inv(fisher) @ kept[-1]
        velocity = momentum * velocity + (1 - momentum) * natural
        theta = theta - lr * (velocity if momentum else natural)
        path.append(theta.clone())
    return path


def follow(params, optimizer, gradients):
    """The parameters as one vector after each step with the given gradients."""
    path = []
    for gradient in gradients:
        pieces = gradient.split([param.numel() for param in params])
        for param, piece in zip(params, pieces, strict=True):
            param.grad = piece.view(param.shape).clone()
        optimizer.step()
        path.append(torch.cat([param.detach().flatten() for param in params]))
    return path


def split(vector, shapes=((2, 3), (), (4,))):
    sizes = [int(torch.tensor(shape).prod()) for shape in shapes]
    return [
        piece.clone().view(shape).requires_grad_() for piece, shape in zip(vector.split(sizes), shapes, strict=True)
    ]


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


@settings(max_examples=40, deadline=None)
@given(
    window=st.integers(1, 14),
    damping=st.sampled_from([1e-4, 0.1, 3.0, 1e6]),
    momentum=st.sampled_from([0.0, 0.9, 0.3]),
    weight_decay=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 50),
)
def test_every_step_equals_the_dense_natural_gradient(window, damping, momentum, weight_decay, seed):
    """Windows not yet full, full, turned over several times, and larger than the number of parameters."""
    start, gradients = drawn(11, seed=seed), drawn(16, 11, seed=seed + 100)
    setting = {"lr": 0.03, "window": window, "damping": damping, "momentum": momentum, "weight_decay": weight_decay}
    params = split(start)
    got = follow(params, MFAC(params, **setting), gradients)
    for ours, wanted in zip(got, dense_path(start, gradients, **setting), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-8, atol=1e-9)


def test_the_oldest_gradient_leaves():
    """After m more gradients an outlier is forgotten entirely: later steps equal those that never saw it."""
    gradients = drawn(9, 11, seed=1)
    outlier = 1e3 * drawn(1, 11, seed=2)
    steps = []
    for history in (gradients, torch.cat([outlier, gradients])):
        params = split(torch.zeros(11).double())
        path = follow(params, MFAC(params, lr=1.0, window=4), history)
        steps.append([after - before for before, after in pairwise(path)])
    for ours, theirs in zip(steps[0][3:], steps[1][4:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert float((steps[0][2] - steps[1][3]).abs().max()) < 1e-6  # the fifth gradient is the first without it
    assert float((steps[0][1] - steps[1][2]).abs().max()) > 1e-2


def test_with_huge_damping_it_is_sgd():
    start, gradients = drawn(11), drawn(6, 11, seed=1)
    ours, theirs = split(start), split(start)
    sgd = torch.optim.SGD(theirs, lr=0.1, weight_decay=0.3)
    mine = MFAC(ours, lr=0.1 * 1e12, window=3, damping=1e12, weight_decay=0.3)
    for left, right in zip(follow(ours, mine, gradients), follow(theirs, sgd, gradients), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_a_single_gradient_is_scaled_by_its_own_length():
    gradient = drawn(1, 11)
    params = split(torch.zeros(11).double())
    got = follow(params, MFAC(params, lr=1.0, window=5, damping=0.01), gradient)[0]
    torch.testing.assert_close(got, -gradient[0] / (0.01 + gradient[0].square().sum() / 5))


@pytest.mark.parametrize("damping", [1e-9, 1e-6, 1e-3])
def test_nearly_parallel_gradients_in_float32(damping):
    """Gradients of length 200 that differ by 1e-4 of it; the inverse is that of the float32 gradients themselves."""
    gradients = (10 * drawn(1, 400) + 1e-3 * drawn(12, 400, seed=1)).float()
    params = split(torch.zeros(400), shapes=((20, 10), (200,)))
    got = follow(params, MFAC(params, lr=1.0, window=8, damping=damping), gradients)
    zero = torch.zeros(400)
    wanted = dense_path(zero, gradients, lr=1.0, window=8, damping=damping)
    for step in range(1, 12):
        mine, exact = (path[step].double() - path[step - 1].double() for path in (got, wanted))
        assert float((mine - exact).norm() / exact.norm()) < 1e-3
    # A small matrix summed in float32 would be off by more: the test has teeth.
    rows = gradients[4:]
    gram = rows @ rows.T + 8 * damping * torch.eye(8)
    careless = 8 * rows.T @ torch.linalg.solve(gram, torch.eye(8)[:, -1])
    exact = wanted[10] - wanted[11]
    if damping < 1e-3:
        assert float((careless.double() - exact).norm() / exact.norm()) > 1e-2


def test_repeated_gradients_and_damping_below_rounding():
    params = split(torch.zeros(11))
    gradient = 1e3 * drawn(1, 11, dtype=torch.float32)
    path = follow(params, MFAC(params, lr=1.0, window=4, damping=1e-20), gradient.repeat(9, 1))
    step = path[-2] - path[-1]
    torch.testing.assert_close(step, gradient[0] / gradient.square().sum(), rtol=1e-3, atol=0)  # all four are it


def test_groups_keep_their_settings_and_share_the_window():
    start, gradients = drawn(11), drawn(7, 11, seed=1)
    whole = dense_path(start, gradients, lr=0.1, window=3, damping=0.1)
    params = split(start)
    optimizer = MFAC([{"params": params[:1]}, {"params": params[1:], "lr": 0.0}], lr=0.1, window=3, damping=0.1)
    path = follow(params, optimizer, gradients)
    torch.testing.assert_close(path[-1][:6], whole[-1][:6], rtol=1e-9, atol=1e-9)
    assert torch.equal(path[-1][6:], start[6:])


def test_a_missing_gradient_counts_as_zero_and_its_parameter_rests():
    start, gradients = drawn(11), drawn(6, 11, seed=1)
    gradients[2, 6:] = 0
    wanted = dense_path(start, gradients, lr=0.1, window=4, damping=0.1)
    params = split(start)
    optimizer = MFAC(params, lr=0.1, window=4, damping=0.1, momentum=0.0)
    path = follow(params, optimizer, gradients[:2])
    params[0].grad = gradients[2, :6].view(2, 3).clone()
    params[1].grad = params[2].grad = None
    optimizer.step()
    torch.testing.assert_close(params[0].detach().flatten(), wanted[2][:6], rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.cat([p.detach().flatten() for p in params[1:]]), path[-1][6:])
    after = follow(params, optimizer, gradients[3:])
    torch.testing.assert_close(after[-1][:6], wanted[-1][:6], rtol=1e-9, atol=1e-9)


def words(optimizer):
    return sum(
        value.numel() for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_memory_is_a_window_of_words_for_each_parameter(momentum):
    frozen = torch.zeros(50, requires_grad=True)
    params = [*split(torch.zeros(11)), frozen]
    optimizer = MFAC(params, window=6, momentum=momentum)
    follow(params[:3], optimizer, drawn(9, 11, dtype=torch.float32))
    assert words(optimizer) == 11 * (6 + (momentum > 0)) + 36


def test_nothing_grows_over_1000_steps():
    """Blocks that Python holds: the conformance suite's tracemalloc count drifts by some KB without any being kept."""
    params = split(torch.zeros(11))
    optimizer = MFAC(params, window=16, momentum=0.9)
    gradients = drawn(50, 11, dtype=torch.float32)

    def blocks():
        gc.collect()
        return words(optimizer), sys.getallocatedblocks()

    for _ in range(4):
        follow(params, optimizer, gradients)
    before = blocks()
    for _ in range(16):
        follow(params, optimizer, gradients)
    after = blocks()
    assert after[0] == before[0]
    assert after[1] - before[1] < 200  # one object in each step would be 800


def test_the_cost_of_a_step_is_linear_in_the_parameters_and_constant_in_time():
    def work(size, steps):
        param = torch.zeros(size, requires_grad=True)
        optimizer = MFAC([param], window=8, momentum=0.9)
        param.grad = torch.ones(size)
        for _ in range(steps):
            optimizer.step()
        with Work() as counted:
            optimizer.step()
        return counted.elements

    small, middle, large = (work(size, 2) for size in (100_000, 200_000, 300_000))
    assert large - middle == pytest.approx(middle - small, rel=1e-2)
    assert middle < 2.05 * small
    assert small < 8 * 8 * 100_000  # a handful of passes over the window
    assert work(100_000, 20) == small


def test_resuming_keeps_the_float64_products_and_wide_windows():
    """torch casts loaded state to the dtype of its parameter: float32, and here even bfloat16."""
    params = [*split(drawn(11).float()), torch.zeros(3, dtype=torch.float64, requires_grad=True)]
    params[0] = params[0].detach().bfloat16().requires_grad_()
    gradients = drawn(12, 14, seed=1)

    def drive(tensors, optimizer, part):
        for gradient in part:
            for param, piece in zip(tensors, gradient.split([p.numel() for p in tensors]), strict=True):
                param.grad = piece.view(param.shape).to(param.dtype)
            optimizer.step()

    optimizer = MFAC(params, window=5, momentum=0.5)
    drive(params, optimizer, gradients[:7])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [param.detach().clone().requires_grad_() for param in params]
    again = MFAC(copies, window=2)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.state[copies[0]]["gram"].dtype == torch.float64
    assert again.state[copies[0]]["gradients"].dtype == torch.float64
    assert again.state[copies[0]]["gradients"] is not optimizer.state[params[0]]["gradients"]
    drive(params, optimizer, gradients[7:])
    drive(copies, again, gradients[7:])
    assert all(torch.equal(left, right) for left, right in zip(params, copies, strict=True))


def test_a_gradient_that_is_not_finite_is_refused_before_anything_moves():
    params = split(drawn(11))
    optimizer = MFAC(params, window=3)
    follow(params, optimizer, drawn(4, 11))
    before = [param.detach().clone() for param in params]
    state = {name: value.clone() for name, value in optimizer.state[params[0]].items() if torch.is_tensor(value)}
    params[2].grad[1] = float("inf")
    with pytest.raises(GradientError, match=r"gradient of shape \(4,\) is not finite"):
        optimizer.step()
    assert all(torch.equal(left, right) for left, right in zip(params, before, strict=True))
    assert all(torch.equal(optimizer.state[params[0]][name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": -1.0}, "lr must be a number at least 0, got -1.0"),
        ({"lr": "fast"}, "lr must be a number"),
        ({"window": 0}, "window must be a positive integer, got 0"),
        ({"window": 2.0}, "window must be a positive integer, got 2.0"),
        ({"window": True}, "got True"),
        ({"damping": 0.0}, "damping must be a number greater than 0, got 0.0"),
        ({"damping": float("nan")}, "damping .* got nan"),
        ({"momentum": 1.0}, "momentum must be a number at least 0 and less than 1, got 1.0"),
        ({"weight_decay": float("inf")}, "weight_decay .* got inf"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(SettingError, match=message):
        MFAC(split(drawn(11)), **setting)


@pytest.mark.parametrize("name", ["window", "damping"])
def test_groups_cannot_disagree_on_what_they_share(name):
    params = split(drawn(11))
    with pytest.raises(SettingError, match=f"all groups share one {name}"):
        MFAC([{"params": params[:1]}, {"params": params[1:], name: 7}])


def test_a_foreign_state_is_refused():
    params = split(drawn(11))
    with pytest.raises(StateDictError, match="not saved by MFAC"):
        MFAC(params).load_state_dict(torch.optim.SGD(params, lr=0.1).state_dict())


@pytest.mark.parametrize("setting", [{}, {"momentum": 0.9, "weight_decay": 0.01, "window": 5, "lr": 0.01}])
def test_conformance(setting):
    check_optimizer(partial(MFAC, **{"window": 16, **setting}), coupled=True, sparse=False, complex=True)
