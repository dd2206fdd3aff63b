"""Optimal input gains against least squares, finite differences and whitened data, in float64."""

import copy
import io
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

from netwright.core.errors import ClosureError, SettingError, StateDictError
from netwright.optim.optimal_input_gain import BypassPerceptron, OptimalInputGain
from netwright.optim.sania import SANIA


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INPUTS = randn(40, 4) @ (torch.eye(4) + torch.ones(4, 4)).double() + 0.5
TARGETS = torch.stack((INPUTS[:, 0].sin() * INPUTS[:, 1], INPUTS[:, 2].tanh() + INPUTS[:, 3]), 1)


def perceptron(seed=0, hidden=6, bypass=False, outputs=2):
    torch.manual_seed(seed)
    if bypass:
        return BypassPerceptron(4, hidden, outputs, nn.Tanh()).double()
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, outputs)).double()


def parts(model):
    return (model.hidden, model.output) if isinstance(model, BypassPerceptron) else (model[0], model[2])


def closure_of(model, inputs=INPUTS, targets=TARGETS, loss=functional.mse_loss):
    def closure():
        outputs = model(inputs)
        return loss(outputs, targets), outputs

    return closure


def error(model, inputs=INPUTS, targets=TARGETS):
    with torch.no_grad():
        return float(functional.mse_loss(model(inputs), targets))


def solved(features, targets, ridge=0.0):
    """Output weights by least squares on features with rows for the ridge below them."""
    root = (ridge * features.square().mean(0).mean() * len(features)) ** 0.5
    width = features.shape[1]
    above = torch.cat((features, root * torch.eye(width).double()))
    return torch.linalg.lstsq(above, torch.cat((targets, torch.zeros(width, targets.shape[1]).double()))).solution


@pytest.mark.parametrize("ridge", [0.0, 1e-8, 0.1])
@pytest.mark.parametrize("bypass", [False, True])
def test_output_weights_are_least_squares(bypass, ridge):
    model = perceptron(bypass=bypass)
    OptimalInputGain(model.parameters(), model, ridge=ridge).step(closure_of(model))
    hidden, output = parts(model)
    ones = torch.ones(40, 1).double()
    features = torch.cat((torch.tanh(hidden(INPUTS)).detach(), ones, *([INPUTS] if bypass else [])), 1)
    wanted = solved(features, TARGETS, ridge)
    assert torch.allclose(output.weight.T, wanted[:6], atol=1e-8)
    assert torch.allclose(output.bias, wanted[6], atol=1e-8)
    if bypass:
        assert torch.allclose(model.bypass.weight.T, wanted[7:], atol=1e-8)


@torch.no_grad()
def hidden_step(model, **options):
    """The hidden weights, and what the first stage adds to them."""
    hidden, _ = parts(model)
    optimizer = OptimalInputGain(model.parameters(), model, ridge=0.0, **options)
    joined = torch.cat((hidden.weight, hidden.bias[:, None]), 1).detach().clone()
    errors = (TARGETS - model(INPUTS)).detach()
    return joined, optimizer._hidden_move(INPUTS, joined, errors).detach()


def forward(model, joined, inputs):
    """The outputs with hidden weights and biases in one matrix."""
    _, output = parts(model)
    straight = model.bypass(inputs) if isinstance(model, BypassPerceptron) else 0.0
    with torch.no_grad():
        return output(torch.tanh(torch.cat((inputs, torch.ones(len(inputs), 1).double()), 1) @ joined.T)) + straight


def gradient_of(model):
    loss = functional.mse_loss(model(INPUTS), TARGETS, reduction="sum") / len(INPUTS) / 2
    hidden, _ = parts(model)
    weight, bias = torch.autograd.grad(loss, (hidden.weight, hidden.bias))
    return -torch.cat((weight, bias[:, None]), 1)


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("kind", ["bp", "hwo"])
def test_gains_minimize_the_quadratic_model_along_them(kind, bypass):
    model = perceptron(bypass=bypass)
    joined, move = hidden_step(model, hidden=kind)
    inputs = torch.cat((INPUTS, torch.ones(40, 1).double()), 1)
    values, vectors = torch.linalg.eigh(inputs.T @ inputs / 40)
    turn = torch.eye(5).double() if kind == "bp" else (vectors / values.sqrt()).T
    slope = gradient_of(model) @ turn.T
    small = 1e-5
    rows = []
    for m in range(5):  # central differences of the outputs by each gain
        ahead = slope[:, m : m + 1] * turn[m] * small
        rows.append(
            (forward(model, joined + ahead, INPUTS) - forward(model, joined - ahead, INPUTS)).flatten() / (2 * small)
        )
    errors = (TARGETS - forward(model, joined, INPUTS)).flatten()
    gains = torch.linalg.lstsq(torch.stack(rows, 1), errors[:, None]).solution[:, 0]
    assert torch.allclose(move, (slope * gains) @ turn, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["bp", "hwo"])
def test_without_gains_the_step_is_the_gradient_with_the_optimal_learning_factor(kind):
    model = perceptron()
    joined, move = hidden_step(model, hidden=kind, gains=False)
    slope, inputs = gradient_of(model), torch.cat((INPUTS, torch.ones(40, 1).double()), 1)
    if kind == "hwo":
        slope = slope @ torch.linalg.inv(inputs.T @ inputs / 40)
    change = (forward(model, joined + 1e-5 * slope, INPUTS) - forward(model, joined - 1e-5 * slope, INPUTS)) / 2e-5
    errors = TARGETS - forward(model, joined, INPUTS)
    factor = (change * errors).sum() / change.square().sum()
    assert torch.allclose(move, factor * slope, rtol=1e-5, atol=1e-8)


def test_equal_gains_are_the_learning_factor():
    """With inputs of rank one there is one gain, and it is the optimal learning factor."""
    line = randn(30, 1, seed=4) @ randn(1, 4, seed=5)
    found = []
    for gains in (True, False):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 1)).double()
        optimizer = OptimalInputGain(model.parameters(), model, gains=gains)
        optimizer.step(closure_of(model, line, line.sum(1, keepdim=True).cos()))
        found.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.allclose(*found, atol=1e-6)


def test_hidden_weight_optimization_is_back_propagation_on_whitened_inputs():
    """The paper's theorem: three steps, the same outputs."""
    for gains in (True, False):
        inputs = torch.cat((INPUTS, torch.ones(40, 1).double()), 1)
        values, vectors = torch.linalg.eigh(inputs.T @ inputs / 40)
        turn = (vectors / values.sqrt()).T
        torch.manual_seed(0)
        raw = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Tanh(), nn.Linear(6, 2)).double()
        white = copy.deepcopy(raw)
        with torch.no_grad():
            white[0].weight.copy_(raw[0].weight @ torch.linalg.inv(turn))
        first = OptimalInputGain(raw.parameters(), raw, hidden="hwo", gains=gains)
        second = OptimalInputGain(white.parameters(), white, hidden="bp", gains=gains)
        for _ in range(3):
            first.step(closure_of(raw, inputs))
            second.step(closure_of(white, inputs @ turn.T))
            assert torch.allclose(raw(inputs), white(inputs @ turn.T), atol=1e-8)
            assert torch.allclose(raw[0].weight, white[0].weight @ turn, atol=1e-8)


def test_hidden_weight_optimization_does_not_see_linear_transforms_of_the_inputs():
    turn = torch.eye(4).double() + 0.4 * randn(4, 4, seed=8)
    plain, turned = perceptron(), perceptron()
    with torch.no_grad():
        turned[0].weight.copy_(plain[0].weight @ torch.linalg.inv(turn))
    for model, inputs in ((plain, INPUTS), (turned, INPUTS @ turn.T)):
        OptimalInputGain(model.parameters(), model, gains=False).step(closure_of(model, inputs))
    assert torch.allclose(plain(INPUTS), turned(INPUTS @ turn.T), atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 99),
    hidden=st.integers(1, 9),
    kind=st.sampled_from(["bp", "hwo"]),
    bypass=st.booleans(),
    gains=st.booleans(),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_error_never_grows_on_a_fixed_batch(seed, hidden, kind, bypass, gains, scale):
    model = perceptron(seed, hidden, bypass)
    inputs = INPUTS * scale
    optimizer = OptimalInputGain(model.parameters(), model, hidden=kind, gains=gains)
    losses = [float(optimizer.step(closure_of(model, inputs)).detach()) for _ in range(5)]
    losses.append(error(model, inputs))
    assert all(after <= before * (1 + 1e-6) + 1e-12 for before, after in itertools.pairwise(losses))


def test_degenerate_data_stays_finite():
    dead = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        dead[0].bias.fill_(-1e3)
    flat_inputs = INPUTS.clone()
    flat_inputs[:, 1], flat_inputs[:, 3] = 2.0, flat_inputs[:, 0]
    for model, ridge in ((dead, 0.0), (perceptron(), 0.0), (perceptron(), 1e-8)):
        optimizer = OptimalInputGain(model.parameters(), model, ridge=ridge)
        for _ in range(3):
            optimizer.step(closure_of(model, flat_inputs))
        assert all(bool(param.isfinite().all()) for param in model.parameters())
    assert error(dead, flat_inputs) == pytest.approx(float(TARGETS.var(0, unbiased=False).mean()))


def test_rates_belong_to_their_groups():
    model, full = perceptron(), perceptron()
    OptimalInputGain(full.parameters(), full).step(closure_of(full))
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = OptimalInputGain(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 0.5}], model
    )
    optimizer.step(closure_of(model))
    assert torch.equal(model[0].weight, before[0])
    ones = torch.ones(40, 1).double()
    wanted = solved(torch.cat((torch.tanh(model[0](INPUTS)).detach(), ones), 1), TARGETS)
    assert torch.allclose(model[2].weight, (before[2] + wanted[:6].T) / 2, atol=1e-5)
    optimizer.param_groups[1]["lr"] = torch.tensor(0.0)
    still = model[2].weight.detach().clone()
    optimizer.step(closure_of(model))
    assert torch.equal(model[2].weight, still)


def test_float32_follows_float64_and_keeps_nothing():
    wide, narrow = perceptron(), perceptron().float()
    for model, data in ((wide, (INPUTS, TARGETS)), (narrow, (INPUTS.float(), TARGETS.float()))):
        optimizer = OptimalInputGain(model.parameters(), model)
        for _ in range(3):
            optimizer.step(closure_of(model, *data))
        assert all(not state for state in optimizer.state.values())
    assert all(param.dtype == torch.float32 for param in narrow.parameters())
    assert torch.allclose(narrow(INPUTS.float()).double(), wide(INPUTS), atol=1e-3)


def test_state_resumes_and_foreign_state_is_refused():
    model = perceptron()
    optimizer = OptimalInputGain(model.parameters(), model)
    optimizer.step(closure_of(model))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin = perceptron(seed=5)
    twin.load_state_dict(weights)
    resumed = OptimalInputGain(twin.parameters(), twin)
    resumed.load_state_dict(state)
    for one, other in ((optimizer, model), (resumed, twin)):
        one.step(closure_of(other))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    adam = torch.optim.Adam(twin.parameters())
    adam.step(lambda: functional.mse_loss(twin(INPUTS), TARGETS).backward())
    with pytest.raises(StateDictError):
        resumed.load_state_dict(adam.state_dict())


def test_settings_that_it_does_not_have_tell_a_foreign_state():
    model = perceptron()
    optimizer = OptimalInputGain(model.parameters(), model)
    start = copy.deepcopy(optimizer.state_dict())
    for kind in (torch.optim.SGD, torch.optim.Rprop, SANIA):
        foreign = kind(model.parameters(), lr=0.1)
        with pytest.raises(StateDictError, match="not saved by OptimalInputGain: its groups have"):
            optimizer.load_state_dict(foreign.state_dict())
        assert optimizer.state_dict() == start


@pytest.mark.parametrize("first", [True, False])
def test_what_schedules_and_users_write_into_groups_is_no_foreign_state(first):
    """Whether the schedule is made before the state is read, or after."""
    model = perceptron()
    group = {"params": list(model.parameters()), "name": "all"}

    def scheduled(optimizer):
        OneCycleLR(optimizer, 0.5, total_steps=10, cycle_momentum=False)
        return optimizer

    state = copy.deepcopy(scheduled(OptimalInputGain([dict(group)], model)).state_dict())
    fresh = OptimalInputGain([dict(group)], model)
    resumed = scheduled(fresh) if first else fresh
    for _ in range(2):
        resumed.load_state_dict(state)
    assert resumed.param_groups[0]["lr"] == state["param_groups"][0]["lr"] == pytest.approx(0.02)


def test_layers_without_biases_and_with_a_layer_in_front():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Softplus(), nn.Linear(5, 2, bias=False)
    ).double()
    optimizer = OptimalInputGain(model.parameters(), model, hidden="bp")
    losses = [float(optimizer.step(closure_of(model, INPUTS.view(40, 2, 2)))) for _ in range(5)]
    assert losses[-1] < losses[1] < losses[0]


def test_returns_the_loss_before_the_step_and_needs_a_closure():
    model = perceptron()
    before = functional.mse_loss(model(INPUTS), TARGETS).detach()
    optimizer = OptimalInputGain(model.parameters(), model)
    assert torch.equal(optimizer.step(closure_of(model)), before)
    with pytest.raises(ClosureError, match="needs a closure"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a number at least 0"),
        ({"lr": float("nan")}, "lr must be a number"),
        ({"ridge": -1e-3}, "ridge must be a number at least 0"),
        ({"hidden": "lm"}, "hidden must be 'bp' or 'hwo', got 'lm'"),
        ({"gains": 1}, "gains must be True or False"),
    ],
)
def test_bad_settings_are_refused(options, message):
    model = perceptron()
    with pytest.raises(SettingError, match=message):
        OptimalInputGain(model.parameters(), model, **options)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "must be an nn.Sequential that ends in Linear, activations, Linear"),
        (nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "must be an nn.Sequential"),
        (nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)), "must be an nn.Sequ"),
        (nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1), nn.Sigmoid()), "must be an nn.Sequential"),
        (nn.Sequential(nn.Linear(2, 3), nn.Softmax(1), nn.Linear(3, 1)), "must act on each unit by itself"),
        (nn.Sequential(nn.Linear(2, 9), nn.Dropout(0.5), nn.Linear(9, 1)), "must act on each unit by itself"),
        (nn.Sequential(nn.Linear(2, 8), nn.GLU(), nn.Linear(4, 1)), "must act on each unit by itself"),
        (nn.Sequential(nn.Linear(2, 3), nn.PReLU(), nn.Linear(3, 1)), "may not have parameters"),
        (nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), "may not have parameters"),
    ],
)
def test_other_models_are_refused(model, message):
    with pytest.raises(SettingError, match=message):
        OptimalInputGain(model.parameters(), model)


def test_no_group_is_added_later():
    model = perceptron()
    optimizer = OptimalInputGain(model.parameters(), model)
    with pytest.raises(SettingError, match="takes no further group"):
        optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    assert len(optimizer.param_groups) == 1


def test_parameters_must_be_the_models():
    model = perceptron()
    with pytest.raises(SettingError, match="2 of the model's are missing and 0 are not its own"):
        OptimalInputGain(model[0].parameters(), model)
    with pytest.raises(SettingError, match="4 of the model's are missing and 4 are not its own"):
        OptimalInputGain(perceptron().parameters(), model)
    model[0].weight.requires_grad_(False)
    with pytest.raises(SettingError, match="1 of the model's are missing"):
        OptimalInputGain(model.parameters(), model)


def _returns(kind, model):
    outputs = model(INPUTS)
    loss = functional.mse_loss(outputs, TARGETS)
    return {
        "alone": lambda: loss,
        "twice": lambda: (loss, model(INPUTS)),
        "reshaped": lambda: (loss, outputs[:, :1]),
        "detached": lambda: (loss, outputs.detach()),
        "l1": lambda: (functional.l1_loss(outputs, TARGETS), outputs),
        "cross-entropy": lambda: (functional.cross_entropy(outputs, torch.zeros(40).long()), outputs),
        "quartic": lambda: ((outputs - TARGETS).pow(4).mean(), outputs),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("alone", "must return the loss and the outputs"),
        ("twice", "it was called 2 times"),
        ("reshaped", r"the outputs are \(40, 1\)"),
        ("detached", "without a graph"),
        ("l1", "needs the squared error"),
        ("cross-entropy", "needs the squared error"),
        ("quartic", "needs the squared error"),
    ],
)
def test_bad_closures_are_refused_before_anything_moves(kind, message):
    model = perceptron()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ClosureError, match=message):
        OptimalInputGain(model.parameters(), model).step(lambda: _returns(kind, model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0]._forward_pre_hooks
