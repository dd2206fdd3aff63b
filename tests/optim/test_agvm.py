"""AGVM: against a float64 transcription, inside any loop, and switched off."""

import copy
import io
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from netwright.core.errors import GradientError, SettingError, StateDictError
from netwright.optim.agvm import AGVM, _dissimilarity, _ratio, module_groups
from netwright.testing import check_optimizer


def weights(seed=0, shapes=((3, 2), (2,), (4,), (2, 3)), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def modules(params):
    """Three modules: the reference has two parameters."""
    return [{"params": params[:2]}, {"params": params[2:3]}, {"params": params[3:]}]


NOISE = (0.3, 0.3, 0.05, 3.0)  # of the gradients, by parameter: the second module is quieter, the third noisier


def halves(params, time):
    """Gradients of two halves: those of ``|p|^2 / 2``, with noise."""
    found = []
    for half in range(2):
        generator = torch.Generator().manual_seed(1000 * time + half)
        noise = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
        pairs = zip(params, noise, NOISE, strict=True)
        found.append([p.detach().clone() + scale * drawn for p, drawn, scale in pairs])
    return found


def add(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone() if param.grad is None else param.grad + grad


def drive(optimizer, params, times, twice=False, spoil=None):
    for time in times:
        optimizer.zero_grad()
        first, second = halves(params, time)
        add(params, first)
        optimizer.observe()
        add(params, second)
        if twice:
            optimizer.observe()
        if spoil is not None:
            spoil()
        optimizer.step()


def naive(steps, *, interval, start, momentum, low, high, reference, lr=0.05, inertia=0.9):
    """The same in NumPy, module by module, with SGD with momentum."""
    params = [p.detach().numpy().copy() for p in weights()]
    buffers = [np.zeros_like(p) for p in params]
    layout, scales = [[0, 1], [2], [3]], [1.0, 1.0, 1.0]
    for time in range(steps):
        first, second = ([g.numpy() for g in part] for part in halves([torch.from_numpy(p) for p in params], time))
        if time >= start and (time - start) % interval == 0:
            phi = []
            for module in layout:
                a = np.concatenate([first[i].ravel() for i in module])
                b = np.concatenate([second[i].ravel() for i in module])
                phi.append(1.0 - (a @ b) / (np.linalg.norm(a) * np.linalg.norm(b)))
            for i in range(3):
                quotient = (phi[reference] + 1e-6) / (phi[i] + 1e-6)
                scales[i] = momentum * scales[i] + (1 - momentum) * np.clip(quotient, low, high) ** 0.5
        for i, module in enumerate(layout):
            for j in module:
                buffers[j] = inertia * buffers[j] + first[j] + second[j] if time else first[j] + second[j]
                params[j] = params[j] - lr * scales[i] * buffers[j]
    return params, scales


@pytest.mark.parametrize(
    "settings",
    [
        {"interval": 1, "start": 0, "momentum": 0.9, "bounds": (0.5, 10.0), "reference": 0},
        {"interval": 3, "start": 4, "momentum": 0.5, "bounds": (0.2, 3.0), "reference": 1},
        {"interval": 2, "start": 1, "momentum": 0.0, "bounds": (1e-3, 1e3), "reference": 2},
    ],
)
def test_equals_a_transcription_in_numpy(settings):
    params = weights()
    optimizer = AGVM(torch.optim.SGD(modules(params), lr=0.05, momentum=0.9), **settings)
    drive(optimizer, params, range(25))
    bounds = dict(zip(("low", "high"), settings["bounds"], strict=True))
    expected, scales = naive(25, **{k: v for k, v in settings.items() if k != "bounds"}, **bounds)
    assert optimizer.scales == pytest.approx(scales, rel=1e-9)
    for param, value in zip(params, expected, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), value, rtol=1e-10, atol=1e-12)


def test_quiet_modules_speed_up_and_noisy_ones_slow_down():
    params = weights()
    optimizer = AGVM(torch.optim.SGD(modules(params), lr=1e-3), interval=1)
    drive(optimizer, params, range(60))
    reference, quiet, noisy = optimizer.scales
    assert reference == pytest.approx(1.0)
    assert quiet > 1.2
    assert noisy < 0.9


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adaptive_optimizers_compare_their_scaled_gradients(kind):
    params = weights()
    optimizer = AGVM(kind(modules(params), lr=0.01, betas=(0.9, 0.95), eps=1e-3), interval=1, momentum=0.0)
    drive(optimizer, params, range(4))
    seconds = [optimizer.state[p]["exp_avg_sq"].clone() for p in params]
    before = [p.detach().clone() for p in params]
    phi = []
    for module in ([0, 1], [2], [3]):
        sides = []
        for grads in halves(before, 4):
            scaled = [grads[i] / ((0.95 * seconds[i] + 0.05 * grads[i] ** 2) ** 0.5 + 1e-3) for i in module]
            sides.append(torch.cat([entry.flatten() for entry in scaled]))
        phi.append(1 - float(torch.nn.functional.cosine_similarity(*sides, dim=0)))
    drive(optimizer, params, range(4, 5))
    expected = [math.sqrt(min(max((phi[0] + 1e-6) / (own + 1e-6), 0.5), 10.0)) for own in phi]
    assert optimizer.scales == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [partial(torch.optim.SGD, momentum=0.9), torch.optim.AdamW])
def test_without_observation_it_is_the_inner_optimizer_to_the_last_digit(kind):
    plain, wrapped = weights(), weights()
    alone, optimizer = kind(modules(plain), lr=0.1), AGVM(kind(modules(wrapped), lr=0.1))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(entry, 20) for entry in (alone, optimizer)]
    for time in range(20):
        for entry, params, schedule in zip((alone, optimizer), (plain, wrapped), schedules, strict=True):
            entry.zero_grad()
            for part in halves(params, time):
                add(params, part)
            entry.step()
            schedule.step()
    assert all(torch.equal(a, b) for a, b in zip(plain, wrapped, strict=True))


def test_steps_are_the_inner_ones_with_the_factor_on_the_rate():
    params = weights()
    optimizer = AGVM(torch.optim.SGD(modules(params), lr=0.05), interval=1, momentum=0.5)
    drive(optimizer, params, range(3))
    before = [p.detach().clone() for p in params]
    drive(optimizer, params, range(3, 4))
    first, second = halves(before, 3)
    for i, module in enumerate(([0, 1], [2], [3])):
        for j in module:
            expected = before[j] - 0.05 * optimizer.scales[i] * (first[j] + second[j])
            torch.testing.assert_close(params[j].detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("inner", [False, True])
def test_schedules_set_the_rate_and_nothing_compounds(rate, inner):
    params = weights()
    groups = [{**group, "lr": copy.deepcopy(rate)} for group in modules(params)]  # torch moves a tensor in place
    optimizer = AGVM(torch.optim.SGD(groups, lr=rate, foreach=False), interval=1, momentum=0.5)
    held = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer.optimizer if inner else optimizer, 1, gamma=0.5)
    for time in range(5):
        drive(optimizer, params, range(time, time + 1))
        schedule.step()
        for group in optimizer.param_groups:
            assert float(group["lr"]) == pytest.approx(0.1 * 0.5 ** (time + 1), rel=1e-6)
    assert (optimizer.param_groups[0]["lr"] is held) == isinstance(rate, torch.Tensor)
    assert optimizer.scales[1] > 1.1


def test_rates_are_put_back_where_the_inner_step_fails():
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("broken")

    params = weights()
    optimizer = AGVM(Failing(modules(params), lr=0.05), interval=1, momentum=0.0)
    with pytest.raises(RuntimeError, match="broken"):
        drive(optimizer, params, range(1))
    assert [group["lr"] for group in optimizer.param_groups] == [0.05] * 3


def test_clipping_between_needs_the_second_observation():
    plain, clipped = weights(), weights()
    optimizers = [AGVM(torch.optim.SGD(modules(p), lr=0.0), interval=1, momentum=0.0) for p in (plain, clipped)]
    drive(optimizers[0], plain, range(3))
    drive(optimizers[1], clipped, range(3), twice=True, spoil=lambda: nn.utils.clip_grad_norm_(clipped, 1e-3))
    assert optimizers[0].scales == pytest.approx(optimizers[1].scales, rel=1e-6)


@pytest.mark.parametrize("twice", [False, True])
def test_a_step_that_is_left_out_is_forgotten_by_zero_grad(twice):
    """As ``GradScaler`` leaves steps out where gradients overflow."""
    params, others = weights(), weights()
    skipping, plain = (AGVM(torch.optim.SGD(modules(p), lr=0.05), interval=2) for p in (params, others))
    for time in range(6):
        skipping.zero_grad()
        add(params, [torch.full_like(p, math.inf) for p in params])
        skipping.observe()
        if twice:
            add(params, [torch.ones_like(p) for p in params])
            skipping.observe()
        for optimizer, own in ((skipping, params), (plain, others)):
            drive(optimizer, own, [time], twice=twice)
    assert skipping.scales == plain.scales
    assert plain.scales[1] > 1.01
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_accumulation_and_closure():
    """Four micro-batches, observed after two, are two halves; so is a closure that observes between two passes."""
    params = [weights() for _ in range(3)]
    plain, accumulated, closed = (AGVM(torch.optim.SGD(modules(p), lr=0.01), interval=1) for p in params)
    for time in range(3):
        drive(plain, params[0], range(time, time + 1))
        accumulated.zero_grad()
        for part in halves(params[1], time):
            for share in (0.25, 0.75):
                add(params[1], [share * grad for grad in part])
            accumulated.observe()
        accumulated.step()

        def closure(time=time):
            closed.zero_grad()
            first, second = halves(params[2], time)
            add(params[2], first)
            closed.observe()
            add(params[2], second)
            return torch.tensor(7.0)

        assert closed.step(closure) == 7.0
    assert plain.scales == pytest.approx(accumulated.scales, rel=1e-5)
    assert plain.scales == closed.scales
    assert all(torch.equal(a, b) for a, b in zip(params[0], params[2], strict=True))


def test_modules_without_gradient_keep_their_factor():
    params = weights()
    optimizer = AGVM(torch.optim.SGD(modules(params), lr=0.01), interval=1, momentum=0.0)
    params[0].grad, params[3].grad = torch.ones_like(params[0]), torch.ones_like(params[3])
    optimizer.observe()
    params[0].grad = params[0].grad + torch.rand(3, 2)  # the third module has no gradient in the second half
    optimizer.step()
    assert optimizer.scales == pytest.approx((1.0, 1.0, 1.0))


def test_resumes_to_the_last_bit_in_the_middle():
    params = weights()
    make = lambda p: AGVM(torch.optim.AdamW(modules(p), lr=0.01), interval=2, start=1)  # noqa: E731
    optimizer = make(params)
    drive(optimizer, params, range(6))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    again = [p.detach().clone().requires_grad_() for p in params]
    drive(optimizer, params, range(6, 12))
    file.seek(0)
    resumed = make(again)
    schedule_sees = resumed.param_groups
    resumed.load_state_dict(torch.load(file, weights_only=True))
    drive(resumed, again, range(6, 12))
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))
    assert resumed.scales == optimizer.scales
    assert resumed.param_groups is resumed.optimizer.param_groups
    assert len(schedule_sees) == 3


def test_memory_is_one_number_per_group_and_a_copy_in_between():
    params = weights()
    optimizer = AGVM(torch.optim.SGD(modules(params), lr=0.01), interval=2)
    drive(optimizer, params, range(2))
    assert optimizer.own_state() == {"steps": 2, "scales": list(optimizer.scales)}
    assert optimizer._half is None
    add(params, halves(params, 2)[0])
    optimizer.observe()
    assert sum(grad.numel() for group in optimizer._half for grad in group) == sum(p.numel() for p in params)
    optimizer.step()
    optimizer.observe()  # not due: nothing is copied
    assert optimizer._half is None


def test_a_copy_is_independent():
    params = weights()
    optimizer = AGVM(torch.optim.SGD(modules(params), lr=0.01), interval=1)
    drive(optimizer, params, range(2))
    twin = copy.deepcopy(optimizer)
    drive(optimizer, params, range(2, 4))
    assert twin.scales != optimizer.scales
    assert twin.param_groups[0]["params"][0] is not params[0]
    assert "AGVM(SGD" in repr(twin)


class Observed(AGVM):
    """Sees in every step a half that is drawn from the gradient itself."""

    def __init__(self, params):
        entries = list(params)
        if entries and isinstance(entries[0], torch.Tensor):
            entries = [{"params": entries}]
        if len(entries) == 1:  # with one group there is nothing to compare
            whole = list(entries[0]["params"])
            entries = [{**entries[0], "params": whole[:1]}, {**entries[0], "params": whole[1:]}]
        super().__init__(torch.optim.SGD(entries, lr=0.1, momentum=0.9), interval=1, momentum=0.5)

    def step(self, closure=None):
        returned = self.evaluate(closure)
        whole = [(param, param.grad) for group in self.param_groups for param in group["params"]]
        if len(self.param_groups) > 1 and any(grad is not None for _, grad in whole):
            for param, grad in whole:
                if grad is not None and grad.layout == torch.strided:
                    param.grad = grad * (0.5 + grad.abs().clamp(max=1.0))
            self.observe()
            for param, grad in whole:
                param.grad = grad
        super().step()
        return returned


def test_conforms_while_observing():
    # add_group: factors depend on which parameters make a group, and Observed splits the first group in two
    check_optimizer(Observed, coupled=True, complex=True, steps=1000, skip=["add_group"])


def test_conforms_without_observing():
    check_optimizer(
        lambda params: AGVM(torch.optim.SGD(params, lr=0.1, momentum=0.9)), complex=True, sparse=True, steps=1000
    )


@given(st.floats(0, 2), st.floats(0, 2), st.floats(1e-3, 1.0), st.floats(1.0, 100.0))
def test_ratio_stays_within_the_root_of_its_bounds(reference, own, low, high):
    ratio = _ratio(reference, own, low, high)
    assert math.sqrt(low) * 0.999 <= ratio <= math.sqrt(high) * 1.001
    assert (ratio >= 1) == (reference >= own) or math.isclose(ratio, 1, rel_tol=1e-6)


def test_dissimilarity_of_known_vectors():
    pair = lambda a, b: _dissimilarity([torch.tensor(a)], [torch.tensor(b)])  # noqa: E731
    assert pair([1.0, 0.0], [0.0, 3.0]) == pytest.approx(1.0)
    assert pair([1.0, 2.0], [2.0, 4.0]) == pytest.approx(0.0, abs=1e-6)
    assert pair([1.0, 2.0], [-1.0, -2.0]) == pytest.approx(2.0)
    assert math.isnan(pair([0.0, 0.0], [1.0, 0.0]))
    assert math.isnan(_dissimilarity([], []))
    two = _dissimilarity([torch.tensor([1.0]), torch.tensor([[2.0]])], [torch.tensor([2.0]), torch.tensor([[-1.0]])])
    assert two == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": 0}, "interval must be an integer of at least 1, got 0"),
        ({"interval": 2.0}, "interval must be an integer"),
        ({"start": -1}, "start must be an integer of at least 0"),
        ({"reference": 3}, "reference is 3, but there are 3 groups"),
        ({"reference": True}, "reference must be an integer"),
        ({"momentum": 1.0}, "momentum must be a number at least 0 and less than 1"),
        ({"momentum": math.nan}, "momentum must be"),
        ({"bounds": (0.0, 1.0)}, r"bounds\[0\] must be a number greater than 0"),
        ({"bounds": (2.0, 1.0)}, r"bounds\[1\] must be a number at least 2"),
        ({"bounds": (1.0,)}, "bounds must be two numbers"),
        ({"bounds": 3}, "bounds must be two numbers"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        AGVM(torch.optim.SGD(modules(weights()), lr=0.1), **settings)


def test_bad_inner_optimizers_are_refused():
    with pytest.raises(SettingError, match=r"AGVM wraps a torch.optim.Optimizer, got list"):
        AGVM(weights())
    with pytest.raises(SettingError, match="LBFGS evaluates a closure in its step"):
        AGVM(torch.optim.LBFGS(weights()))


def test_misuse_of_observe_is_refused():
    params = weights()
    optimizer = AGVM(torch.optim.SGD(modules(params), lr=0.1))
    with pytest.raises(GradientError, match="observe found no gradients"):
        optimizer.observe()
    add(params, halves(params, 0)[0])
    optimizer.observe()
    optimizer.observe()
    with pytest.raises(GradientError, match=r"three times before step.*zero_grad"):
        optimizer.observe()
    single = AGVM(torch.optim.SGD(params, lr=0.1))
    with pytest.raises(SettingError, match=r"one parameter group\. Give one group per module"):
        single.observe()
    sparse = AGVM(torch.optim.SGD(modules(weights()), lr=0.1))
    table = sparse.param_groups[0]["params"][0]
    table.grad = torch.zeros(3, 2, dtype=torch.float64).to_sparse()
    with pytest.raises(GradientError, match="sparse"):
        sparse.observe()


def test_foreign_states_are_refused():
    optimizer = AGVM(torch.optim.SGD(modules(weights()), lr=0.1))
    with pytest.raises(StateDictError, match="has no entry 'AGVM'"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
    saved = optimizer.state_dict()
    saved["AGVM"] = {"steps": 0, "scales": [1.0]}
    with pytest.raises(StateDictError, match="1 factors, but there are 3 groups"):
        optimizer.load_state_dict(saved)


def test_groups_of_modules():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 2)
            self.activation = nn.ReLU()
            self.backbone = nn.Linear(2, 2)
            self.tied = nn.Linear(2, 2)
            self.tied.weight = self.backbone.weight
            self.scale = nn.Parameter(torch.ones(1))

    net = Net()
    groups = module_groups(net, "backbone")
    assert [group["name"] for group in groups] == ["backbone", "head", "tied", ""]
    assert [len(group["params"]) for group in groups] == [2, 2, 1, 1]
    assert {p for group in groups for p in group["params"]} == set(net.parameters())
    with pytest.raises(SettingError, match="no child neck; there are head"):
        module_groups(net, "neck")
