"""Exact Gauss-Newton against dense linear algebra in float64."""

import functools
import gc
import io
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from netwright.core.errors import ClosureError, GradientError, SettingError, StateDictError
from netwright.core.randomness import isolated
from netwright.optim._item_jacobian import ItemJacobian, find_uses, is_coupled
from netwright.optim.exact_gauss_newton import ExactGaussNewton
from netwright.testing import check_optimizer


class Tied(nn.Module):
    """One weight used twice, as a matrix and transposed."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x):
        return functional.linear(torch.tanh(self.layer(x)), self.layer.weight.T)[:, :3]


class Words(nn.Module):
    """An embedding, a position, attention over places, a matrix product with an untransposed weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.randn(5, 4))
        self.norm = nn.LayerNorm(4)
        self.query = nn.Linear(4, 4, bias=False)
        self.plain = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        stream = self.embed(x) + self.position
        weights = torch.softmax(self.query(self.norm(stream)) @ stream.mT, -1)
        return (weights @ stream).mean(1) @ self.plain


def conv(norm=True):
    layers = [nn.Conv2d(2, 3, 3, 2, 1), nn.BatchNorm2d(3) if norm else nn.Identity(), nn.Tanh()]
    return nn.Sequential(*layers, nn.Conv2d(3, 4, 2, dilation=2, bias=False), nn.Flatten(), nn.Linear(16, 3))


NETWORKS = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (7, 4)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(30, 3)), (6, 5, 4)),
    "convolution": (lambda: conv(False), (5, 2, 8, 8)),
    "batch norm": (conv, (5, 2, 8, 8)),
    "batch norm, eval": (lambda: conv().eval(), (5, 2, 8, 8)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(4, 3)), (6, 2, 3, 3)),
    "tied": (Tied, (6, 4)),
    "words": (Words, None),
}
LOSSES = {
    "mse": lambda y, seed=3: functional.mse_loss(y, randn(*y.shape, seed=seed)),
    "cross-entropy": lambda y: functional.cross_entropy(y, torch.arange(len(y)) % 3),
    "huber": lambda y: functional.huber_loss(y, randn(*y.shape, seed=3), delta=0.7),
    "l1": lambda y: functional.l1_loss(y, randn(*y.shape, seed=3)),
}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(name):
    torch.manual_seed(1)
    make, shape = NETWORKS[name]
    inputs = torch.arange(30).view(6, 5) % 7 if shape is None else randn(*shape, seed=2)
    return make().double(), inputs


def jacobian(outputs, params):
    rows = []
    for entry in outputs.flatten():
        grads = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel()).double() if g is None else g.flatten()
                    for p, g in zip(params, grads, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def blocks(outputs, loss):
    """The gradient and the Hessian of ``b loss`` by the outputs, whole."""
    at = outputs.detach()
    first = torch.autograd.functional.jacobian(loss, at).flatten() * len(at)
    second = torch.autograd.functional.hessian(loss, at).reshape(at.numel(), at.numel()) * len(at)
    return first, second


def dense(model, inputs, loss, damping, residual=False):
    """``(J'QJ / b + D)^-1 J'r / b`` as a flat vector; ``damping`` a number or a vector."""
    params = [param for param in model.parameters() if param.requires_grad]
    outputs = model(inputs)
    rows, items = jacobian(outputs, params), len(outputs)
    slope, curvature = blocks(outputs, loss)
    if residual:
        wide = len(slope) // items
        kept = torch.zeros_like(curvature)
        for i in range(items):
            part = slice(i * wide, (i + 1) * wide)
            r = slope[part]
            kept[part, part] = torch.outer(r, r) / (r @ torch.linalg.pinv(curvature[part, part], hermitian=True) @ r)
        curvature = kept
    system = rows.T @ curvature @ rows / items + torch.eye(rows.shape[1]).double() * damping
    return torch.linalg.solve(system, rows.T @ slope / items)


def flat(model):
    return torch.cat([param.detach().flatten() for param in model.parameters() if param.requires_grad])


def closure_of(model, inputs, loss):
    def closure():
        outputs = model(inputs)
        return loss(outputs), outputs

    return closure


def moved(model, inputs, loss, **options):
    before = flat(model)
    ExactGaussNewton(model.parameters(), **{"lr": 1.0, "damping": 0.02, **options}).step(
        closure_of(model, inputs, loss)
    )
    return before - flat(model)


def near(left, right, tolerance=1e-9):
    assert float((left - right).norm()) <= tolerance * float(right.norm())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_step_equals_dense_gauss_newton(name, loss):
    model, inputs = build(name)
    near(moved(model, inputs, LOSSES[loss]), dense(build(name)[0], inputs, LOSSES[loss], 0.02))


@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
@pytest.mark.parametrize("name", ["perceptron", "convolution", "words", "batch norm, eval", "tied"])
def test_residual_curvature_equals_dense(name, loss):
    model, inputs = build(name)
    near(
        moved(model, inputs, LOSSES[loss], curvature="residual"),
        dense(build(name)[0], inputs, LOSSES[loss], 0.02, residual=True),
        1e-8,
    )


def test_residual_curvature_of_cross_entropy_is_that_of_the_margin():
    model, inputs = build("perceptron")
    outputs, targets = model(inputs), torch.arange(7) % 3
    right = outputs.gather(1, targets[:, None])[:, 0]
    others = outputs.masked_fill(functional.one_hot(targets, 3).bool(), -torch.inf).logsumexp(1)
    rows = jacobian(right - others, list(model.parameters()))
    sure = torch.sigmoid(right - others).detach()
    system = rows.T @ torch.diag(sure * (1 - sure)) @ rows / 7 + 0.02 * torch.eye(rows.shape[1])
    wanted = torch.linalg.solve(system, -rows.T @ (1 - sure) / 7)
    near(moved(model, inputs, LOSSES["cross-entropy"], curvature="residual"), wanted, 1e-8)


def test_one_output_makes_both_curvatures_the_same():
    found = []
    for kind in ("exact", "residual"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        found.append(moved(model, randn(8, 4), LOSSES["mse"], curvature=kind))
    near(*found)


def test_residual_rows_add_up_to_the_gradient_under_batch_norm():
    model, inputs = build("batch norm")
    gradient = torch.autograd.grad(LOSSES["cross-entropy"](model(inputs)), list(model.parameters()))
    gradient = torch.cat([part.flatten() for part in gradient])
    near(1e6 * moved(model, inputs, LOSSES["cross-entropy"], curvature="residual", damping=1e6), gradient, 1e-4)
    model = build("batch norm")[0]
    assert float(moved(model, inputs, LOSSES["cross-entropy"], curvature="residual", damping=1e-3) @ gradient) > 0


def test_singular_softmax_curvature_is_stable_in_float32():
    steps = {}
    for dtype in (torch.float64, torch.float32):
        model = build("perceptron")[0].to(dtype)
        with torch.no_grad():
            model[2].weight.mul_(30)  # probabilities down to 1e-15
        inputs = build("perceptron")[1].to(dtype)
        steps[dtype] = moved(model, inputs, LOSSES["cross-entropy"], damping=1e-3).double()
    near(steps[torch.float32], steps[torch.float64], 2e-3)
    model = build("perceptron")[0]
    with torch.no_grad():
        model[2].weight.mul_(30)
    near(steps[torch.float64], dense(model, build("perceptron")[1], LOSSES["cross-entropy"], 1e-3), 1e-6)


def test_an_item_far_on_the_wrong_side_keeps_its_gradient():
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[400.0, 0.0], [-400.0, 0.0]]))
    inputs, loss = (
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double(),
        lambda y: functional.cross_entropy(y, torch.tensor([1, 0])),
    )
    for kind in ("exact", "residual"):
        copy = nn.Linear(2, 2, bias=False).double()
        copy.load_state_dict(model.state_dict())
        near(moved(copy, inputs, loss, curvature=kind), dense(model, inputs, loss, 0.02), 1e-8)


def test_groups_have_their_own_rates_and_damping_and_frozen_parameters_stay():
    model, inputs = build("perceptron")
    model[0].bias.requires_grad_(False)
    rates, dampings = (0.5, 2.0), (0.01, 0.3)
    groups = [
        {"params": layer.parameters(), "lr": lr, "damping": d}
        for layer, lr, d in zip((model[0], model[2]), rates, dampings, strict=True)
    ]
    each = torch.cat([torch.full((24,), 0.01, dtype=torch.float64), torch.full((21,), 0.3, dtype=torch.float64)])
    wanted = dense(model, inputs, LOSSES["mse"], each) * torch.cat([torch.full((24,), 0.5), torch.full((21,), 2.0)])
    before, bias = flat(model), model[0].bias.detach().clone()
    ExactGaussNewton(groups).step(closure_of(model, inputs, LOSSES["mse"]))
    near(before - flat(model), wanted)
    assert torch.equal(model[0].bias, bias)


def test_parameters_outside_the_graph_stay():
    model, inputs = build("perceptron")
    other = nn.Parameter(torch.ones(3).double())
    wanted = dense(model, inputs, LOSSES["mse"], 0.02)
    before = flat(model)
    optimizer = ExactGaussNewton([*model.parameters(), other], lr=1.0, damping=0.02)
    optimizer.step(closure_of(model, inputs, LOSSES["mse"]))
    near(before - flat(model), wanted)
    assert torch.equal(other, torch.ones(3))


def test_momentum_is_averaged_and_corrected():
    model, inputs = build("perceptron")
    optimizer = ExactGaussNewton(model.parameters(), lr=0.3, damping=0.1, momentum=0.8)
    kept = torch.zeros_like(flat(model))
    for time in range(1, 4):
        kept = 0.8 * kept + 0.2 * dense(model, inputs, LOSSES["mse"], 0.1)
        before = flat(model)
        optimizer.step(closure_of(model, inputs, LOSSES["mse"]))
        near(before - flat(model), 0.3 * kept / (1 - 0.8**time))
    assert all(set(state) == {"momentum_buffer", "step"} for state in optimizer.state.values())
    assert sum(s["momentum_buffer"].numel() for s in optimizer.state.values()) == flat(model).numel()


def test_without_momentum_nothing_is_kept():
    model, inputs = build("perceptron")
    optimizer = ExactGaussNewton(model.parameters())
    optimizer.step(closure_of(model, inputs, LOSSES["mse"]))
    assert all(not state for state in optimizer.state.values())


def along(model, start, move, size, inputs, loss):
    nn.utils.vector_to_parameters(start + size * move, model.parameters())
    return float(loss(model(inputs)).detach())


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_line_search_and_adaptive_damping_follow_their_rules(momentum):
    model, inputs = build("convolution")
    loss = LOSSES["cross-entropy"]
    optimizer = ExactGaussNewton(
        model.parameters(), lr=20.0, damping=0.3, momentum=momentum, line_search=True, adapt=1.7
    )
    twin = build("convolution")[0]
    kept, last, scale, lengths = torch.zeros_like(flat(model)), 1.0, 1.0, set()
    for time in range(1, 6):
        outputs = twin(inputs)
        rows, (slope, curvature) = jacobian(outputs, list(twin.parameters())), blocks(outputs, loss)
        kept = momentum * kept + (1 - momentum) * dense(twin, inputs, loss, 0.3 * scale)
        move, start, now = -20.0 * kept / (1 - momentum**time), flat(twin), float(loss(outputs).detach())
        falls, bends = float(slope @ rows @ move) / 5, float(move @ rows.T @ curvature @ rows @ move) / 5
        size, tried = min(1.0, 1.5 * last), 1
        while along(twin, start, move, size, inputs, loss) > now + 0.1 * size * falls and tried < 15:
            size, tried = 0.8 * size, tried + 1
        share = (along(twin, start, move, size, inputs, loss) - now) / (size * falls + size**2 * bends / 2)
        scale = scale * 1.7 if share < 0.25 else scale / 1.7 if share > 0.75 else scale
        optimizer.step(closure_of(model, inputs, loss))
        near(flat(model), flat(twin), 1e-7)
        shared = optimizer.state[next(model.parameters())]
        assert shared["step_size"] == pytest.approx(size)
        assert shared["damping_scale"] == pytest.approx(scale)
        last = size
        lengths.add(size)
    assert len(lengths) > 1


def test_repeated_closures_see_the_same_dropout():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 30), nn.Dropout(0.5), nn.Linear(30, 1)).double()
    seen = []

    def closure():
        outputs = model(randn(6, 4))
        seen.append(torch.get_rng_state())
        return LOSSES["mse"](outputs), outputs

    ExactGaussNewton(model.parameters(), lr=1e-9, adapt=1.1).step(closure)
    assert len(seen) == 2
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(torch.get_rng_state(), seen[0])


def test_repeated_closures_see_the_same_random_numbers_of_every_kind():
    model = nn.Linear(4, 1).double()
    seen = []

    def closure():
        outputs = model(randn(6, 4))
        seen.append((random.random(), float(torch.rand(()))))
        return LOSSES["mse"](outputs), outputs

    with isolated(3):
        drawn = [(random.random(), float(torch.rand(()))) for _ in range(2)]
    with isolated(3):
        for _ in range(2):
            ExactGaussNewton(model.parameters(), lr=1e-9, adapt=1.1).step(closure)
    assert seen == [drawn[0]] * 2 + [drawn[1]] * 2


@settings(max_examples=12, deadline=None)
@given(
    items=st.integers(1, 4),
    channels=st.integers(1, 3),
    outs=st.integers(1, 4),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    count=st.integers(1, 3),
    bias=st.booleans(),
)
def test_rows_of_convolutions_equal_autograd(items, channels, outs, kernel, stride, padding, count, bias):
    torch.manual_seed(items)
    layer = nn.Conv2d(channels, outs, kernel, stride, padding, bias=bias).double()
    outputs = torch.tanh(layer(randn(items, channels, 3, 4))).square().flatten(1)
    params = list(layer.parameters())
    seeds = randn(count, *outputs.shape, seed=4)
    found = ItemJacobian(outputs, params, find_uses(outputs.grad_fn, {id(p): p for p in params})[0], seeds, False)
    wide = outputs.shape[1]
    full = jacobian(outputs, params).view(items, wide, -1)
    wanted = torch.einsum("kic,icp->ikp", seeds, full).reshape(items * count, -1)
    rows = torch.cat([found.rows(place) for place in range(len(params))], 1)
    assert torch.allclose(rows, wanted, atol=1e-10)
    assert torch.allclose(found.gram([1.0] * len(params)), wanted @ wanted.T, atol=1e-9)
    weights = randn(items, count, seed=5)
    total = torch.cat([found.combine(place, weights) for place in range(len(params))])
    assert torch.allclose(total, weights.flatten() @ wanted, atol=1e-9)
    direction = [randn(*param.shape, seed=6) for param in params]
    ahead = sum(found.along(place, part) for place, part in enumerate(direction))
    assert torch.allclose(ahead.flatten(), wanted @ torch.cat([part.flatten() for part in direction]), atol=1e-9)


@pytest.mark.parametrize(
    ("name", "coupled"), [("perceptron", False), ("batch norm", True), ("batch norm, eval", False)]
)
def test_coupled_items_are_found(name, coupled):
    model, inputs = build(name)
    outputs = model(inputs)
    uses, _ = find_uses(outputs.grad_fn, {id(p): p for p in model.parameters()})
    assert is_coupled(outputs, uses) is coupled


def test_items_that_are_not_outermost_still_give_the_exact_step():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return torch.tanh(self.layer(x.transpose(0, 1))).sum(0)

    torch.manual_seed(0)
    model, inputs = Last().double(), randn(4, 6, 3)
    wanted = dense(model, inputs, LOSSES["mse"], 0.02)
    near(moved(model, inputs, LOSSES["mse"]), wanted)


def test_switching_to_eval_is_noticed():
    model, inputs = build("batch norm")
    optimizer = ExactGaussNewton(model.parameters(), lr=1.0, damping=0.02)
    for train in (False, True, False):
        model.train(train)
        wanted, before = dense(model, inputs, LOSSES["mse"], 0.02), flat(model)
        model.load_state_dict(model.state_dict())
        optimizer.step(closure_of(model, inputs, LOSSES["mse"]))
        near(before - flat(model), wanted, 1e-8)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5, "curvature": "residual", "line_search": True, "adapt": 1.5}])
def test_conformance(options):
    # memory: batched backward passes fill caches of torch that grow for a thousand steps; below, tensors are counted
    check_optimizer(functools.partial(ExactGaussNewton, **options), coupled=True, steps=400)


def test_nothing_grows():
    model, inputs = build("perceptron")
    optimizer = ExactGaussNewton(model.parameters(), momentum=0.5, adapt=1.1)

    found = []
    for steps in (10, 40):
        for _ in range(steps):
            optimizer.step(closure_of(model, inputs, LOSSES["cross-entropy"]))
        gc.collect()
        tensors = [item.numel() for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter)]
        found.append((len(tensors), sum(tensors)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a number at least 0"),
        ({"lr": float("nan")}, "lr must be a number"),
        ({"damping": 0.0}, "damping must be a number greater than 0"),
        ({"damping": float("inf")}, "damping must be a number"),
        ({"momentum": 1.0}, "momentum must be a number at least 0 and less than 1"),
        ({"curvature": "full"}, "curvature must be 'exact' or 'residual', got 'full'"),
        ({"line_search": 1}, "line_search must be True or False"),
        ({"adapt": 0.5}, "adapt must be a number at least 1"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(SettingError, match=message):
        ExactGaussNewton([nn.Parameter(torch.zeros(2))], **options)


def test_complex_parameters_are_refused():
    with pytest.raises(SettingError, match="complex"):
        ExactGaussNewton([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


def _returns(kind, model, inputs):
    outputs = model(inputs)
    loss = LOSSES["mse"](outputs)
    return {
        "loss alone": loss,
        "vector": (outputs[:, 0], outputs),
        "detached": (loss, outputs.detach()),
        "whole": (loss, outputs.sum()),
        "integers": (loss, outputs.argmax(1)),
        "penalty": (loss + model[0].weight.square().sum(), outputs),
        "other outputs": (loss, outputs + 1),
        "coupled": ((outputs / outputs.norm()).sum(), outputs),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("loss alone", "must return the loss and the outputs, got Tensor"),
        ("vector", "must return a scalar loss"),
        ("detached", "without a graph"),
        ("whole", "at least one item"),
        ("integers", "real numbers"),
        ("penalty", r"shape \(6, 4\) other than through the outputs"),
        ("other outputs", "other than through the outputs"),
        ("coupled", "couples items"),
    ],
)
def test_bad_closures_are_refused_before_anything_moves(kind, message):
    model, inputs = build("perceptron")
    before = flat(model)
    with pytest.raises(ClosureError, match=message):
        ExactGaussNewton(model.parameters()).step(lambda: _returns(kind, model, inputs))
    assert torch.equal(flat(model), before)


def test_missing_closure_and_numbers_that_are_not_finite():
    model, inputs = build("perceptron")
    with pytest.raises(ClosureError, match="needs a closure"):
        ExactGaussNewton(model.parameters()).step()
    with pytest.raises(GradientError, match="not finite"):
        ExactGaussNewton(model.parameters()).step(closure_of(model, inputs * torch.nan, LOSSES["mse"]))


def test_state_survives_a_file_and_that_of_another_optimizer_is_refused():
    model, inputs = build("perceptron")
    options = {"momentum": 0.5, "line_search": True, "adapt": 1.3}
    optimizer = ExactGaussNewton(model.parameters(), **options)
    for _ in range(3):
        optimizer.step(closure_of(model, inputs, LOSSES["mse"]))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin = build("perceptron")[0]
    twin.load_state_dict(weights)
    resumed = ExactGaussNewton(twin.parameters(), **options)
    resumed.load_state_dict(state)
    for one, other in ((optimizer, model), (resumed, twin)):
        one.step(closure_of(other, inputs, LOSSES["mse"]))
    assert torch.equal(flat(model), flat(twin))
    with pytest.raises(StateDictError):
        resumed.load_state_dict(torch.optim.Adam(twin.parameters()).state_dict())


def test_loss_falls_to_nothing_in_one_step_of_a_linear_model():
    model = nn.Linear(3, 2).double()
    inputs, weights = randn(10, 3), randn(3, 2, seed=9)
    loss = lambda y: functional.mse_loss(y, inputs @ weights)  # noqa: E731
    moved(model, inputs, loss, damping=1e-12)
    assert float(loss(model(inputs)).detach()) < 1e-18


def test_returns_the_loss_before_the_step():
    model, inputs = build("perceptron")
    wanted = LOSSES["mse"](model(inputs)).detach()
    found = ExactGaussNewton(model.parameters()).step(closure_of(model, inputs, LOSSES["mse"]))
    assert isinstance(found, Tensor)
    assert torch.equal(found, wanted)
