"""RegNet: published models to the last parameter, costs against the trace, spaces under search; EDFs against SciPy."""

import math

import cloudpickle
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from netwright.core.errors import SettingError
from netwright.core.graph.export import export_model
from netwright.core.graph.macs import total_macs
from netwright.search import LINASSampler, SpaceError, run
from netwright.search.regnet import AnyNetSpace, RegNetSpace, design_space_edf, quantized_widths

torch.set_num_threads(1)

PUBLISHED = [  # decisions, then widths, depths, parameters and 10^6 multiply-accumulates as published
    ((13, 24, 36.44, 2.49, 8), (24, 56, 152, 368), (1, 1, 4, 7), 2_684_792, 199),
    ((22, 24, 24.48, 2.54, 16), (32, 64, 160, 384), (1, 2, 7, 12), 5_157_512, 398),
    ((16, 48, 36.97, 2.24, 24), (48, 96, 240, 528), (1, 3, 5, 7), 6_196_040, 601),
    ((16, 56, 35.73, 2.28, 16), (64, 128, 288, 672), (1, 3, 7, 5), 7_259_656, 800),
]
NAMES = ("depth", "w0", "wa", "wm", "group_width")
GROUPS = (1, 2, 4, 8, 16, 24, 32)


@pytest.mark.parametrize(("numbers", "widths", "depths", "parameters", "megamacs"), PUBLISHED)
def test_published_models(numbers, widths, depths, parameters, megamacs):
    space, params = RegNetSpace(group_width=GROUPS), dict(zip(NAMES, numbers, strict=True))
    stages = space.stages(params)
    assert tuple(stage.width for stage in stages) == widths
    assert tuple(stage.depth for stage in stages) == depths
    assert round(space.macs(params) / 1e6) == megamacs
    network = space.build(params)
    assert sum(weight.numel() for weight in network.parameters()) == parameters
    assert space.widths(params) == [width for width, depth in zip(widths, depths, strict=True) for _ in range(depth)]


def transcribed(depth, w0, wa, wm):
    """Equations 2 to 4 of the paper, one block after the other, in whole arithmetic where they allow it."""
    found = []
    for j in range(depth):
        s = math.log((w0 + wa * j) / w0, wm)
        assume(abs(s - math.floor(s) - 0.5) > 1e-9)  # halves depend on the last digit
        eighths = w0 * wm ** (math.floor(s + 0.5)) / 8
        assume(abs(eighths - math.floor(eighths) - 0.5) > 1e-9)
        found.append(8 * math.floor(eighths + 0.5))
    return found


@given(depth=st.integers(1, 40), w0=st.integers(1, 32), wa=st.floats(0.5, 256), wm=st.floats(1.3, 3.3))
@settings(deadline=None, max_examples=200)
def test_widths_are_the_papers(depth, w0, wa, wm):
    found = quantized_widths(depth, 8 * w0, wa, wm)
    assert found == transcribed(depth, 8 * w0, wa, wm)
    assert found == sorted(found)
    assert found[0] == 8 * w0


@given(seed=st.integers(0, 10**6), side=st.integers(1, 40))
@settings(deadline=None, max_examples=6)
def test_cost_is_that_of_the_trace_and_groups_divide(seed, side):
    rng = np.random.default_rng(seed)
    shape = {"inputs": (2, side, side + 3), "outputs": 5, "stem": 8}
    regular = RegNetSpace(depth=(2, 6), w0=(8, 24), wa=(2, 20), **shape)
    free = AnyNetSpace(stages=3, depth=(1, 2), width=(8, 64), **shape)
    for space in (regular, free):
        params = space.sample(rng)
        assert all(stage.width % stage.group_width == 0 for stage in space.stages(params))
        network = space.build(params)
        images = torch.zeros(2, *shape["inputs"])
        assert network(images).shape == (2, 5)
        assert space.macs(params) == total_macs(export_model(network, images))


def test_resolution_is_halved_late_and_not_below_four():
    space = AnyNetSpace(stages=3, inputs=(1, 20, 16), outputs=2, stem=8)
    params = {
        f"{name}{i}": value for i in (1, 2, 3) for name, value in (("depth", 2), ("width", 8), ("group_width", 4))
    }
    network = space.build(params)
    sizes = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: sizes.append(tuple(out.shape[2:]))) for block in network.blocks
    ]
    image = torch.rand(2, 1, 20, 16)
    logits = network(image)
    for hook in hooks:
        hook.remove()
    assert sizes == [(20, 16), (20, 16), (10, 8), (10, 8), (5, 4), (5, 4)]
    assert torch.equal(torch.fx.symbolic_trace(network)(image), logits)


def test_designs_nest():
    params = {f"depth{i}": d for i, d in enumerate((1, 3, 2), 1)} | {
        f"width{i}": w for i, w in enumerate((8, 8, 16), 1)
    }
    made = {design: AnyNetSpace(stages=3, design=design) for design in "CDE"}
    shared = params | {"group_width": 4}
    assert [made[design].valid(shared) for design in "CDE"] == [True, True, False]
    assert not made["D"].valid(shared | {"width2": 24})
    assert made["C"].valid(shared | {"width2": 24})
    own = AnyNetSpace(stages=3).stages(params | {"group_width1": 4, "group_width2": 8, "group_width3": 1})
    assert [stage.group_width for stage in own] == [4, 8, 1]


def test_search_runs_and_bounds_hold():
    space = RegNetSpace(
        depth=(2, 10), w0=(8, 48), wa=(2, 40), macs=(2e5, 1e6), stages=(2, 3), inputs=(1, 8, 8), outputs=10, stem=8
    )

    def evaluate(params):
        return {"macs": space.macs(params), "depth": params["depth"], "stages": len(space.stages(params))}

    sampler = LINASSampler(cloudpickle.loads(cloudpickle.dumps(space)), start=8, batch=4, population=30, seed=0)
    found = run(space, evaluate, {"macs": "minimize", "depth": "maximize"}, sampler=sampler, evaluations=16)
    assert len(found.evaluations) == 16
    assert all(2e5 <= entry.metrics["macs"] <= 1e6 for entry in found.evaluations)
    assert {entry.metrics["stages"] for entry in found.evaluations} <= {2, 3}


def test_same_weights_under_a_seed():
    space, built = RegNetSpace(inputs=(1, 8, 8), outputs=2), []
    params = {"depth": 3, "w0": 8, "wa": 8.0, "wm": 2.0, "group_width": 4}
    for _ in range(2):
        torch.manual_seed(7)
        built.append(space.build({**params, "depth": 8}))
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in built), strict=True))
    with pytest.raises(SpaceError, match="depth"):
        space.build(params)


@pytest.mark.parametrize(
    ("space", "settings", "words"),
    [
        (RegNetSpace, {"depth": (9, 3)}, "depth must be"),
        (RegNetSpace, {"w0": (8, 20)}, "w0 must be multiples of 8"),
        (RegNetSpace, {"wa": (0, 10)}, "wa must be above 0"),
        (RegNetSpace, {"wm": (1.0, 2.0)}, "wm must be above 1"),
        (RegNetSpace, {"group_width": ()}, "group_width"),
        (RegNetSpace, {"group_width": (0,)}, "group_width"),
        (RegNetSpace, {"stages": (0, 2)}, "stages"),
        (RegNetSpace, {"macs": (5, 1)}, "macs"),
        (RegNetSpace, {"inputs": (3, 0, 8)}, "inputs"),
        (RegNetSpace, {"outputs": 0}, "outputs"),
        (RegNetSpace, {"stem": 0}, "stem"),
        (AnyNetSpace, {"design": "A"}, "B, C, D, E"),
        (AnyNetSpace, {"stages": 0}, "stages"),
        (AnyNetSpace, {"width": (float("nan"), 8)}, "width"),
    ],
)
def test_bad_settings(space, settings, words):
    with pytest.raises(SpaceError, match=words):
        space(**settings)


def test_a_band_that_nothing_meets_is_named():
    with pytest.raises(SpaceError, match="multiply-accumulates must be 1 to 2"):
        RegNetSpace(macs=(1, 2)).sample(np.random.default_rng(0))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_edf_is_scipys_and_dominance_is_by_definition(first, second):
    one, two = design_space_edf(first), design_space_edf(second)
    grid = np.arange(-1, 11, 0.5)
    strict = stats.ecdf(first).cdf.evaluate(np.nextafter(grid, -np.inf))  # SciPy's counts e_i <= e
    np.testing.assert_allclose(one(grid), strict)
    np.testing.assert_allclose(one.mean, np.mean(first))
    fine = np.linspace(-1, 8, 9001)
    assert one.area(8) == pytest.approx(np.trapezoid(one(fine), fine), abs=5e-3)
    ahead = one(grid) - two(grid)
    assert one.dominates(two) == (bool((ahead >= 0).all()) and bool((ahead > 0).any()))


def test_best_range_is_the_limit_of_the_papers_bootstrap():
    rng = np.random.default_rng(0)
    errors = rng.random(40)
    values = 100 * errors + 20 * rng.random(40)
    draws = rng.integers(40, size=(40_000, 10))
    best = draws[np.arange(len(draws)), errors[draws].argmin(1)]
    wanted = np.quantile(values[best], [0.025, 0.975], method="inverted_cdf")
    assert design_space_edf(errors).best_range(values) == pytest.approx(tuple(wanted))


@pytest.mark.parametrize("errors", [[], [[0.1]], [0.1, math.nan], [math.inf]])
def test_bad_errors(errors):
    with pytest.raises(SettingError, match="errors must be"):
        design_space_edf(errors)


@pytest.mark.parametrize(
    ("values", "settings"),
    [([1.0], {}), ([1.0, math.nan], {}), ([1.0, 2.0], {"share": 0}), ([1, 2], {"confidence": 1.0})],
)
def test_bad_properties(values, settings):
    with pytest.raises(SettingError, match="must be"):
        design_space_edf([0.1, 0.2]).best_range(values, **settings)
