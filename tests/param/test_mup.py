"""muP against its table, dense one-step updates of deep linear networks, and training at several widths."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

from netwright.core.errors import SettingError
from netwright.core.optimization import Parameterization, make_optimizer
from netwright.core.recipe import Recipe
from netwright.optim.kfac import KFAC
from netwright.optim.shampoo import Shampoo
from netwright.param.fold import fold
from netwright.param.geometric_parameterization import geometric_parameterization
from netwright.param.mup import coordinate_check, mup, shapes_of
from netwright.param.weight_conditioning import weight_conditioning

DAMPING = {"sgd": None, "adam": 1e-8, "kfac": 1e-4, "shampoo": 1e-4}


def network(width, inputs=8, classes=3):
    return nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes)
    )


def settings_by_name(model, groups, key):
    names = {id(param): name for name, param in model.named_parameters()}
    return {names[id(param)]: group.get(key) for group in groups for param in group["params"]}


# The table

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")


@pytest.mark.parametrize(
    ("optimizer", "rates"),
    [
        ("sgd", (4, 4, 1, 4, 1 / 4, 1)),
        ("adam", (1, 1, 1 / 4, 1, 1 / 4, 1)),
        ("kfac", (1, 1, 1, 4, 1, 4)),
        ("shampoo", (2, 2, 1, 2, 1 / 2, 1)),
    ],
)
def test_learning_rates_at_four_times_the_width(optimizer, rates):
    model = network(64)
    groups = mup(model, network(16), optimizer=optimizer, lr=0.1)
    wanted = {name: pytest.approx(0.1 * rate) for name, rate in zip(NAMES, rates, strict=True)}
    assert settings_by_name(model, groups, "lr") == wanted
    assert len(groups) == len(set(rates))
    assert all(set(group) == {"params", "lr"} for group in groups)


def test_learning_rates_where_two_widths_grow_apart():
    def build(first, second):
        return nn.Sequential(nn.Linear(8, first), nn.Linear(first, second), nn.Linear(second, 3))

    rates = {}
    for optimizer in ("sgd", "adam", "kfac", "shampoo"):
        model = build(32, 160)
        groups = mup(model, build(16, 10), optimizer=optimizer, lr=1.0)
        rates[optimizer] = settings_by_name(model, groups, "lr")["1.weight"]
    assert rates == pytest.approx({"sgd": 8.0, "adam": 0.5, "kfac": 1.0, "shampoo": math.sqrt(8)})


def test_dampings_at_four_times_the_width():
    found = {}
    for optimizer, key in (("adam", "eps"), ("kfac", "damping"), ("shampoo", "damping")):
        model = network(64)
        found[optimizer] = settings_by_name(model, mup(model, network(16), optimizer=optimizer, damping=0.04), key)
    assert list(found["adam"].values()) == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.04, 0.04])
    assert found["shampoo"] == pytest.approx(dict(zip(NAMES, (0.01, 0.01, 0.04, 0.01, 0.16, 0.04), strict=True)))
    assert found["kfac"]["0.weight"] == found["kfac"]["0.bias"] == pytest.approx((0.2, 0.05))
    assert found["kfac"]["2.weight"] == found["kfac"]["2.bias"] == pytest.approx((0.8, 0.05))
    assert found["kfac"]["4.weight"] == found["kfac"]["4.bias"] == pytest.approx((0.8, 0.2))


def test_at_the_width_of_the_base_nothing_changes():
    model, twin = network(16), None
    twin = copy.deepcopy(model)
    groups = mup(model, network(16), network(32), optimizer="kfac", lr=0.1, damping=0.04)
    assert len(groups) == 1
    assert groups[0]["lr"] == 0.1
    assert groups[0]["damping"] == pytest.approx((0.2, 0.2))
    assert groups[0]["params"] == list(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_delta_tells_a_width_that_the_model_has_in_common_with_the_base():
    def build(first, second):
        return nn.Sequential(nn.Linear(8, first), nn.Linear(first, second))

    gains = []
    for delta in (None, build(20, 40)):
        model = build(64, 10)
        before = model[1].weight.detach().clone()
        mup(model, build(16, 10), delta)
        gains.append(float((model[1].weight.detach() / before).mean()))
    assert gains == pytest.approx([0.5, 1.0])  # an output of fixed length, and a hidden layer


# Initial scales


class Everything(nn.Module):
    """Layers of every kind that has a rule of its own."""

    def __init__(self, width):
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 3)
        self.conv = nn.Conv2d(width, width, 3)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.up = nn.ConvTranspose2d(width, width, 2)
        self.up_in = nn.ConvTranspose2d(3, width, 2)
        self.up_out = nn.ConvTranspose2d(width, 3, 2)
        self.norm = nn.BatchNorm2d(width)
        self.embed = nn.Embedding(500, width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.memory = nn.LSTM(40, width)
        self.out = nn.Linear(width, 50)
        self.position = nn.Parameter(torch.randn(1, 60, width))
        self.scale = nn.Parameter(torch.ones(()))


def spreads(model):
    return {name: float(param.detach().std(unbiased=False)) for name, param in model.named_parameters()}


def test_initial_spread_of_every_kind_of_layer():
    """Against the table, which torch's own initialization does not follow."""
    torch.manual_seed(0)
    narrow, wide = Everything(16), Everything(256)
    base = spreads(narrow)
    groups = mup(wide, Everything(16), optimizer="sgd", lr=1.0)
    rates = settings_by_name(wide, groups, "lr")
    found = {
        name: spread / base[name]
        for name, spread in spreads(wide).items()
        if base[name] > 0.001 and narrow.get_parameter(name).numel() >= 16
    }
    hidden = {
        "conv.weight",
        "up.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "memory.weight_hh_l0",
    }
    output = {"up_out.weight", "out.weight"}
    for name, ratio in found.items():
        wanted = 1 / 4 if name in hidden else 1 / 16 if name in output else 1.0
        assert ratio == pytest.approx(wanted, rel=0.35 if narrow.get_parameter(name).numel() < 1000 else 0.12), name
    finite = {"up_out.bias", "out.bias", "scale"}
    for name, rate in rates.items():
        assert rate == (1 if name in hidden | finite else 1 / 16 if name in output else 16), name


def test_initialization_with_a_constant_spread():
    def build(width):
        model = network(width)
        for param in model.parameters():
            nn.init.normal_(param, std=0.02)
        return model

    torch.manual_seed(0)
    model = build(256)
    before = copy.deepcopy(model)
    mup(model, build(16), initialization="constant")
    ratios = [float((a / b).detach().mean()) for a, b in zip(model.parameters(), before.parameters(), strict=True)]
    assert ratios == pytest.approx([1, 1, 1 / 4, 1, 1 / 16, 1])


def test_keep_changes_nothing_in_the_model():
    model = network(64)
    before = copy.deepcopy(model)
    groups = mup(model, network(16), optimizer="sgd", lr=0.1, initialization="keep")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    again = mup(model, network(16), optimizer="sgd", lr=0.1)
    assert [group["lr"] for group in groups] == [group["lr"] for group in again]


# One step of a deep linear network, in dense algebra


def linear_step(optimizer, width, maximal):
    """How much a step changes the features of ``W3 W2 W1 x``, root mean square for each layer; all by hand."""
    generator = torch.Generator().manual_seed(width)
    shapes = [(width, 6), (width, width), (3, width)]
    model = nn.Sequential(*(nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64) for shape in shapes))
    with torch.no_grad():
        for layer in model:
            layer.weight.normal_(generator=generator).div_(math.sqrt(layer.in_features))
    base = nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in ((6, 16), (16, 16), (16, 3))))
    groups = mup(model, base if maximal else model, optimizer=optimizer, lr=0.01, damping=DAMPING[optimizer])
    rates = list(settings_by_name(model, groups, "lr").values())
    dampings = list(settings_by_name(model, groups, "damping").values())
    weights = [layer.weight.detach().numpy() for layer in model]
    inputs = [np.linspace(-1, 1, 6)]
    for weight in weights:
        inputs.append(weight @ inputs[-1])
    gradient, moved = np.array([1.0, -0.5, 0.25]), [None] * 3
    for place in (2, 1, 0):
        a, g = inputs[place], gradient
        step = np.outer(g, a)
        if optimizer == "adam":
            step = np.sign(step)
        elif optimizer == "kfac":  # the inverse of a rank-one matrix and damping has a vector over its squared length
            step = np.outer(g / (g @ g + dampings[place][1]), a / (a @ a + dampings[place][0]))
        elif optimizer == "shampoo":
            step = step / math.sqrt((g @ g) * (a @ a) + dampings[place])
        moved[place] = weights[place] - rates[place] * step
        gradient = weights[place].T @ gradient
    features, changes = inputs[0], []
    for place, weight in enumerate(moved):
        features = weight @ features
        changes.append(math.sqrt(np.mean((features - inputs[place + 1]) ** 2)))
    return changes


def linear_slopes(optimizer, maximal):
    widths = [128, 256, 512, 1024]
    changes = np.mean([[linear_step(optimizer, width + shift, maximal) for width in widths] for shift in range(4)], 0)
    return np.polyfit(np.log(widths), np.log(changes), 1)[0]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "kfac", "shampoo"])
def test_features_of_a_deep_linear_network_move_alike_at_all_widths(optimizer):
    np.testing.assert_allclose(linear_slopes(optimizer, True), 0.0, atol=0.12)


@pytest.mark.parametrize(
    ("optimizer", "slopes"),
    [("sgd", (-0.5, 0.5, 1.0)), ("adam", (0.0, 1.0, 1.5)), ("kfac", (-0.5, -0.5, 0.0)), ("shampoo", (-0.5, 0.0, 0.5))],
)
def test_and_do_not_with_the_settings_of_the_base(optimizer, slopes):
    """The exponents that theory gives the standard parameterization."""
    found = linear_slopes(optimizer, False)
    for got, wanted in zip(found, slopes, strict=True):
        assert got == pytest.approx(wanted, abs=0.2), found
    assert np.abs(found).max() > 0.35


# Training


def builder(optimizer, maximal):
    def build(width):
        model = network(width)
        rate = {"sgd": 0.1, "adam": 2e-3, "kfac": 0.05, "shampoo": 0.05}[optimizer]
        base = network(32) if maximal else model
        groups = mup(model, base, optimizer=optimizer, lr=rate, damping=DAMPING[optimizer])
        if optimizer == "kfac":
            return model, KFAC(groups, model, momentum=0.0, invert_every=1, kl_clip=None)
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "shampoo": Shampoo}
        return model, kinds[optimizer](groups)

    return build


BATCH = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(32) % 3


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "kfac", "shampoo"])
def test_coordinate_check(optimizer):
    flat = coordinate_check(builder(optimizer, True), [32, 64, 128, 256], BATCH, LABELS)
    assert flat.names == ("0", "1", "2", "3", "4")
    assert flat.sizes.shape == flat.changes.shape == (4, 4, 5)
    assert np.abs(flat.slopes).max() < 0.25
    assert flat.size_slopes[0, :4] == pytest.approx(0.0, abs=0.1)
    steep = coordinate_check(builder(optimizer, False), [32, 64, 128, 256], BATCH, LABELS)
    assert np.abs(steep.slopes).max() > 0.3


class Power(nn.Module):
    """An output of size ``width ** power``, that a step of SGD doubles."""

    def __init__(self, width, power):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), float(width) ** power))

    def forward(self, inputs):
        return self.weight * 1.0


def test_coordinate_check_finds_a_known_exponent():
    def build(width):
        model = nn.Sequential(Power(width, 0.75))
        return model, torch.optim.SGD(model.parameters(), lr=width**0.75)

    found = coordinate_check(build, [10, 20, 40], torch.ones(1), torch.ones(1), lambda o, t: -o.sum(), steps=2)
    np.testing.assert_allclose(found.slopes, 0.75, atol=1e-6)
    np.testing.assert_allclose(found.size_slopes, 0.75, atol=1e-6)
    np.testing.assert_allclose(found.changes[1][:, 0], [width**0.75 for width in (10, 20, 40)], rtol=1e-6)
    np.testing.assert_allclose(found.changes[2], 2 * found.changes[1], rtol=1e-6)
    assert not found.changes[0].any()


def test_coordinate_check_leaves_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    coordinate_check(builder("sgd", True), [32, 48], BATCH, LABELS, steps=1, seeds=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("widths", "steps", "seeds"), [([8], 1, 1), ([8, 8], 1, 1), ([8, 16], 0, 1), ([8, 16], 1, 0)])
def test_coordinate_check_refuses_too_little(widths, steps, seeds):
    with pytest.raises(SettingError, match="needs two widths or more, a step and a seed"):
        coordinate_check(builder("sgd", True), widths, BATCH, LABELS, steps=steps, seeds=seeds)


# Around it


class Tied(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.out = nn.Linear(width, 7)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.embed(tokens))


class Named(Tied):
    def forward(self, tokens):
        return self.out(input=self.embed(tokens))


def test_a_tied_output_has_its_input_divided():
    model = Tied(64)
    plain = copy.deepcopy(model)
    groups = mup(model, Tied(16), optimizer="adam", lr=0.1)
    assert settings_by_name(model, groups, "lr") == {"embed.weight": 0.1, "out.bias": 0.1}
    assert torch.equal(model.embed.weight, plain.embed.weight)
    tokens = torch.tensor([1, 3])
    wanted = functional.linear(plain.embed(tokens) / 4, plain.out.weight, 2 * plain.out.bias)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(tokens), wanted)
    mup(model, Tied(16), initialization="keep")
    torch.testing.assert_close(model(tokens), wanted)
    named = Named(64)
    mup(named, Tied(16))
    named.load_state_dict(model.state_dict())
    torch.testing.assert_close(named(tokens), wanted)


def test_keep_gives_a_tied_output_its_divisor_where_it_has_none():
    """As in a new process, which reads a trained model's state dict into a fresh one."""
    model, fresh, tokens = Tied(64), Tied(64), torch.tensor([1, 3])
    mup(model, Tied(16))
    fresh.load_state_dict(model.state_dict())
    assert not torch.allclose(fresh(tokens), model(tokens))
    for _ in range(2):
        before = copy.deepcopy(fresh.state_dict())
        mup(fresh, Tied(16), initialization="keep")
        assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in before.items())
        assert torch.equal(fresh(tokens), model(tokens))


def test_what_k_fac_leaves_to_sgd_follows_sgd():
    model = Everything(64)
    natural = mup(model, Everything(16), optimizer="kfac", lr=1.0, damping=0.01)
    rates, dampings = (settings_by_name(model, natural, key) for key in ("lr", "damping"))
    plain = settings_by_name(model, mup(model, Everything(16), optimizer="sgd", lr=1.0, initialization="keep"), "lr")
    layers = {"conv_in", "conv", "out", "attention.out_proj"}
    for name, rate in rates.items():
        if name.rpartition(".")[0] in layers:
            assert dampings[name] is not None
        else:
            assert dampings[name] is None
            assert rate == plain[name]


def test_roles_settle_what_shapes_do_not():
    class Own(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.head = nn.Parameter(torch.ones(5, width))
            self.inverse = nn.Parameter(torch.ones(width, 2, width))

    model = Own(64)
    groups = mup(model, Own(16), optimizer="sgd", lr=1.0, roles={"head": "output"})
    assert settings_by_name(model, groups, "lr") == {"head": 0.25, "inverse": 1.0}
    groups = mup(model, Own(16), optimizer="sgd", lr=1.0, initialization="keep")
    assert settings_by_name(model, groups, "lr") == {"head": 4.0, "inverse": 1.0}
    with pytest.raises(SettingError, match="roles calls inverse 'input', but 2 of its dimensions grow"):
        mup(Own(64), Own(16), roles={"inverse": "input"})


def test_a_recipe_can_name_it():
    shapes = json.loads(json.dumps(shapes_of(network(16))))
    recipe = Recipe(
        optimizer="netwright.optim.kfac:KFAC",
        optimizer_settings={"momentum": 0.0},
        parameterization="netwright.param.mup:mup",
        parameterization_settings={"base": shapes, "optimizer": "kfac", "lr": 0.1, "damping": 0.01},
    )
    model = network(64)
    groups = Parameterization(recipe, model).groups
    optimizer = make_optimizer(recipe, model, groups)
    assert isinstance(optimizer, KFAC)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.1, 0.1, 0.1, 0.4, 0.4])
    places = optimizer._listener.places.values()
    assert len(places) == 3
    assert all(place.tap.bias for place in places), "biases belong to their weights, in groups of their own"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, kfac, shampoo, got 'lion'"),
        ({"initialization": "xavier"}, "initialization must be one of fan_in, constant, keep"),
        ({"lr": -0.1}, "lr must be a number at least 0"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": True}, "lr must be"),
        ({"damping": -1.0}, "damping must be a number at least 0"),
        ({"optimizer": "sgd", "damping": 1.0}, "SGD has no damping"),
        ({"roles": {"7.weight": "input"}}, "roles has '7.weight'"),
        ({"roles": {"0.weight": "middle"}}, "roles has '0.weight': 'middle'"),
        ({"base": 16}, "base must be a model, or the shapes of one by name, got int"),
        ({"base": nn.Linear(3, 4)}, "the model and base differ in more than width: only one of them has"),
        ({"delta": {"0.weight": [3]}}, "the model and delta differ"),
        ({"base": {**shapes_of(network(16)), "0.bias": [16, 1]}}, "0.bias has shape"),
        ({"base": nn.Sequential(*network(16)[:4], nn.Linear(16, 3, bias=False))}, "only one of them has 4.bias"),
    ],
)
def test_bad_settings(options, words):
    model = network(64)
    before = copy.deepcopy(model)
    with pytest.raises(SettingError, match=words):
        mup(model, **{"base": network(16), **options})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    "rewrite",
    [
        parametrizations.weight_norm,
        weight_conditioning,
        geometric_parameterization,
        lambda layer: nn.utils.spectral_norm(layer),
        lambda layer: nn.utils.weight_norm(layer),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_are_computed_have_no_role(rewrite):
    def rewritten(width):
        model = network(width)
        rewrite(model[2])
        return model

    model = rewritten(64)
    before = copy.deepcopy(model.state_dict())
    for initialization in ("fan_in", "keep"):
        with pytest.raises(SettingError, match="layer '2' computes its weight from other parameters"):
            mup(model, rewritten(16), initialization=initialization)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    if parametrize.is_parametrized(model[2]):
        mup(fold(model), network(16))


def test_more_bad_models():
    with pytest.raises(SettingError, match=r"model must be an nn\.Module, got list"):
        mup([], network(16))
    with pytest.raises(SettingError, match=r"dimension 2 of weight, shape .* differs from the base but is no width"):
        mup(nn.Conv2d(3, 8, 5), nn.Conv2d(3, 4, 3))
    model = network(64)
    mup(model, network(16))
    with pytest.raises(SettingError, match="rescaled before"):
        mup(model, network(16))
    with pytest.raises(SettingError, match="rescaled before"):
        mup(copy.deepcopy(model), network(16))
