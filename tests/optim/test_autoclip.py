"""AutoClip against NumPy's percentile over the whole history, and its sketch against exact ranks."""

import io
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netwright.core.errors import GradientError, SettingError, StateDictError
from netwright.optim._quantile_sketch import QuantileSketch
from netwright.optim.autoclip import AutoClip


def _params(*shapes, dtype=torch.float64):
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]


def _set_grads(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale).to(param.dtype)


def _through_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("percentile", [0.0, 10.0, 37.5, 50.0, 90.0, 100.0])
def test_equals_the_paper_written_with_numpy(percentile):
    params, clip, norms = _params((3, 4), (5,), ()), AutoClip(percentile), []
    scales = np.exp(np.random.default_rng(0).normal(size=60))
    for step, scale in enumerate(scales):
        _set_grads(params, step, float(scale))
        before = np.concatenate([param.grad.numpy().ravel() for param in params])
        norms.append(math.sqrt(sum(float(x) ** 2 for x in before)))
        threshold = np.percentile(norms, percentile)
        returned = clip(params)
        after = np.concatenate([param.grad.numpy().ravel() for param in params])
        assert float(returned) == pytest.approx(norms[-1], rel=1e-14)
        assert clip.threshold == pytest.approx(threshold, rel=1e-14)
        np.testing.assert_allclose(after, before * min(1.0, threshold / norms[-1]), rtol=1e-13)


def test_the_first_gradient_and_percentile_100_are_never_clipped():
    for clip in (AutoClip(0.0), AutoClip(100.0)):
        params = _params((7,))
        for step in range(1 if clip.percentile == 0 else 20):
            _set_grads(params, step, 1 + step)
            before = params[0].grad.clone()
            clip(params)
            assert torch.equal(params[0].grad, before)


def test_it_agrees_with_torch_at_a_fixed_threshold():
    params, other, clip = _params((4, 4), (3,)), _params((4, 4), (3,)), AutoClip(0.0)
    small = _params((1,))
    small[0].grad = torch.tensor([0.5], dtype=torch.float64)
    clip(small)
    _set_grads(params, 3)
    _set_grads(other, 3)
    theirs = nn.utils.clip_grad_norm_(other, 0.5)
    assert float(clip(params)) == pytest.approx(float(theirs), rel=1e-14)
    for mine, their in zip(params, other, strict=True):
        torch.testing.assert_close(mine.grad, their.grad, rtol=2e-6, atol=0)  # torch adds 1e-6 to the norm


def test_a_single_tensor_a_generator_and_missing_gradients():
    model = nn.Linear(3, 2, dtype=torch.float64)
    clip = AutoClip()
    assert float(clip(model.parameters())) == 0.0
    assert float(clip([])) == 0.0
    assert clip.threshold is None
    model.weight.grad = torch.full((2, 3), 2.0, dtype=torch.float64)
    assert float(clip(model.parameters())) == pytest.approx(math.sqrt(24))
    assert float(clip(model.weight)) == pytest.approx(math.sqrt(24))
    empty = nn.Parameter(torch.zeros(0))
    empty.grad = torch.zeros(0)
    assert float(clip([empty])) == 0.0
    assert clip.history.count == 2


def test_gradients_of_several_types_are_clipped_together():
    kinds = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
    params = [nn.Parameter(torch.zeros(6, dtype=dtype)) for dtype in kinds]
    clip = AutoClip(0.0)
    one = _params((1,))
    one[0].grad = torch.tensor([0.1], dtype=torch.float64)
    clip(one)
    generator = torch.Generator().manual_seed(0)
    for param in params:
        param.grad = torch.randn(6, generator=generator).to(param.dtype)
        if param.is_complex():
            param.grad += 1j * torch.randn(6, generator=generator).to(param.dtype)
    expected = math.sqrt(sum(float(param.grad.to(torch.complex128).abs().square().sum()) for param in params))
    assert float(clip(params)) == pytest.approx(expected, rel=1e-6)
    after = math.sqrt(sum(float(param.grad.to(torch.complex128).abs().square().sum()) for param in params))
    assert after == pytest.approx(0.1, rel=5e-3)  # rounded to bfloat16
    assert [param.grad.dtype for param in params] == kinds


def test_gradients_that_are_conjugated_on_reading_are_clipped():
    param = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    for scale in (1.0, 2.0):
        param.grad = torch.tensor([3.0 + 0.0j, 4.0j]).mul_(scale).conj()
        assert float(AutoClip(0.0)([param])) == pytest.approx(5.0 * scale)
    clip = AutoClip(0.0)
    for scale in (1.0, 2.0):
        param.grad = torch.tensor([3.0 + 0.0j, 4.0j]).mul_(scale).conj()
        clip([param])
    assert torch.allclose(param.grad, torch.tensor([3.0 + 0.0j, -4.0j]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_norms_are_summed_in_single_precision(dtype):
    params = _params((100_000,), dtype=dtype)
    params[0].grad = torch.full((100_000,), 300.0, dtype=dtype)  # the norm is beyond float16
    exact = float(params[0].grad.double().norm())
    norm = AutoClip()(params)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(exact, rel=1e-4)


def test_a_norm_beyond_single_precision_is_not_taken_for_an_overflow():
    params = _params((4,), dtype=torch.float32)
    clip = AutoClip(0.0)
    params[0].grad = torch.ones(4)
    clip(params)
    params[0].grad = torch.full((4,), 1e30)
    assert float(clip(params)) == pytest.approx(2e30, rel=1e-6)
    assert float(params[0].grad.norm()) == pytest.approx(2.0, rel=1e-6)
    assert clip.refused == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_happens_to_gradients_that_are_not_finite(bad):
    for kind, expected in (("zero", [0.0, 0.0]), ("keep", [bad, 1.0])):
        params, clip = _params((2,), (1,)), AutoClip(50.0, nonfinite=kind)
        _set_grads(params, 0)
        clip(params)
        threshold = clip.threshold
        params[0].grad = torch.tensor([bad, 1.0], dtype=torch.float64)
        params[1].grad = torch.ones(1, dtype=torch.float64)
        assert not bool(clip(params).isfinite())
        np.testing.assert_equal(params[0].grad.tolist(), expected)
        assert params[1].grad.tolist() == ([0.0] if kind == "zero" else [1.0])
        assert clip.threshold == threshold
        assert (clip.history.count, clip.refused) == (1, 1)
    params[0].grad = torch.tensor([bad, 1.0], dtype=torch.float64)
    with pytest.raises(GradientError, match="the norm of the gradients is"):
        AutoClip(nonfinite="raise")(params)


def test_a_zero_norm_does_not_pull_the_threshold_to_zero():
    params, clip = _params((2,)), AutoClip(10.0)
    for _ in range(30):
        params[0].grad = torch.zeros(2, dtype=torch.float64)
        clip(params)
    params[0].grad = torch.ones(2, dtype=torch.float64)
    clip(params)
    assert params[0].grad.tolist() == [1.0, 1.0]


def test_sparse_gradients_are_refused_before_anything_moves():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    dense = _params((2,))
    _set_grads(dense, 0)
    before = dense[0].grad.clone()
    clip = AutoClip()
    with pytest.raises(GradientError, match=r"sparse gradients, and the parameter of shape \(5, 3\)"):
        clip([*dense, *embedding.parameters()])
    assert torch.equal(dense[0].grad, before)
    assert clip.history.count == 0


def test_resumes_to_the_last_bit_from_a_file_in_either_regime():
    for calls in (5, 75):
        clip, params = AutoClip(25.0, capacity=16), _params((6,), dtype=torch.float32)
        for step in range(calls):
            _set_grads(params, step)
            clip(params)
        other = AutoClip(25.0)
        other.load_state_dict(_through_disk(clip.state_dict()))
        for step in range(calls, calls + 40):
            _set_grads(params, step)
            first = (float(clip(params)), params[0].grad.clone())
            _set_grads(params, step)
            assert float(other(params)) == first[0]
            assert torch.equal(params[0].grad, first[1])
            assert other.threshold == clip.threshold


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"percentile": -1.0}, "percentile must be a number at least 0 and at most 100"),
        ({"percentile": 101}, "percentile"),
        ({"percentile": math.nan}, "percentile"),
        ({"percentile": "10"}, "percentile"),
        ({"capacity": 7}, "capacity must be an even number"),
        ({"capacity": 0}, "capacity"),
        ({"capacity": 4.0}, "capacity"),
        ({"nonfinite": "skip"}, "nonfinite must be one of 'zero', 'keep', 'raise', got 'skip'"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(SettingError, match=message):
        AutoClip(**arguments)


def test_foreign_states():
    with pytest.raises(StateDictError, match="not saved by AutoClip"):
        AutoClip().load_state_dict({"norms": []})
    with pytest.raises(StateDictError, match="it has no capacity"):
        AutoClip().load_state_dict({"history": {}, "refused": 0})
    with pytest.raises(SettingError, match="nothing was added yet"):
        QuantileSketch().quantile(0.5)


# --- the sketch


def _weighted_rank_interval(values, answer):
    """The ranks that ``answer`` has among ``values``: numbers below, and numbers not above."""
    ordered = np.sort(values)
    return np.searchsorted(ordered, answer, "left"), np.searchsorted(ordered, answer, "right")


def _check_ranks(sketch, values, allowed):
    for share in (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999, 1.0):
        answer = sketch.quantile(share)
        low, high = _weighted_rank_interval(values, answer)
        position = share * (len(values) - 1)
        assert low - allowed - 1 <= position <= high + allowed, share


@pytest.mark.parametrize("order", ["random", "rising", "falling", "constant", "steps"])
def test_rank_error_stays_within_its_bounds(order):
    capacity, count = 64, 20_000
    values = np.random.default_rng(1).lognormal(size=count)
    values = {
        "random": values,
        "rising": np.sort(values),
        "falling": np.sort(values)[::-1],
        "constant": np.full(count, 2.5),
        "steps": np.repeat(np.arange(count // 50), 50).astype(float),
    }[order]
    sketch = QuantileSketch(capacity)
    checked = {capacity, capacity + 1, 1000, 7777, count}
    for seen, value in enumerate(values.tolist(), 1):
        sketch.add(value)
        if seen in checked:
            stated = 0 if seen <= capacity else seen / (2 * capacity) * math.log2(2 * seen / capacity) + seen / capacity
            assert sketch.rank_error <= stated
            _check_ranks(sketch, values[:seen], sketch.rank_error)
    held = len(sketch.state_dict()["levels"])
    assert held <= 2 + math.log2(count / capacity)
    assert all(len(level) <= capacity for level in sketch.state_dict()["levels"])
    assert _total_weight(sketch) == count


def _total_weight(sketch):
    return sum(2**height * len(level) for height, level in enumerate(sketch.state_dict()["levels"]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=64), st.floats(0, 1))
def test_exact_up_to_the_capacity(values, share):
    sketch = QuantileSketch(64)
    for value in values:
        sketch.add(value)
    assert sketch.rank_error == 0
    assert sketch.quantile(share) == pytest.approx(np.quantile(values, share), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=1, max_size=5), st.integers(0, 10**6))
def test_merging_keeps_weights_and_bounds(sizes, seed):
    draw = np.random.default_rng(seed)
    whole, everything = QuantileSketch(16), []
    for size in sizes:
        part, values = QuantileSketch(16), draw.normal(size=size) + draw.integers(0, 3)
        for value in values.tolist():
            part.add(value)
        everything += values.tolist()
        before = part.state_dict()
        whole.merge(part)
        assert all(torch.equal(a, b) for a, b in zip(before["levels"], part.state_dict()["levels"], strict=True))
    assert whole.count == len(everything) == _total_weight(whole)
    if everything:
        _check_ranks(whole, np.array(everything), whole.rank_error)
        whole.add(0.5)
        assert whole.count == _total_weight(whole)


def test_quantiles_of_a_full_sketch_rise_and_match_the_weighted_list():
    sketch = QuantileSketch(8)
    for value in np.random.default_rng(2).normal(size=333).tolist():
        sketch.add(value)
    levels = sketch.state_dict()["levels"]
    repeated = sorted(v for height, level in enumerate(levels) for v in level.tolist() for _ in range(2**height))
    shares = np.linspace(0, 1, 101)
    answers = [sketch.quantile(float(share)) for share in shares]
    np.testing.assert_allclose(answers, np.quantile(repeated, shares), rtol=1e-12, atol=1e-15)
    assert all(first <= second for first, second in pairwise(answers))


def test_memory_is_bounded():
    clip, param = AutoClip(capacity=32), _params((1,))
    for step in range(1, 3001):
        param[0].grad = torch.tensor([1.0 / step], dtype=torch.float64)
        clip(param)
    held = sum(len(level) for level in clip.state_dict()["history"]["levels"])
    assert held <= 32 * (1 + math.log2(3000 / 32))
    assert clip.history.count == 3000
