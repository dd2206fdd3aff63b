"""MANAS: EXP3 and least squares against naive ones, regret, the memory of one path, a real table, bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netwright.core.errors import SettingError
from netwright.core.task import load_task
from netwright.search.manas import MANAS, Agents
from netwright.search.nasbench201 import OPERATIONS, nasbench201
from netwright.search.relaxed import Mixed, mixed

torch.set_num_threads(1)


def numbers(agents):
    return [policy.numpy() for policy in agents.policies]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 4.0), st.floats(0.0, 3.0))
def test_exp3_is_its_naive_transcription(seed, rate, explore):
    sizes, rng = [2, 4], np.random.default_rng(seed)
    agents = Agents(sizes, rate=rate, explore=explore, seed=seed)
    totals = [np.zeros(size) for size in sizes]
    for number in range(1, 20):
        policies = []
        for total, size in zip(totals, sizes, strict=True):
            powers = np.exp(-rate * math.sqrt(math.log(size) / (number * size)) * total)
            uniformly = min(1.0, explore / number**0.5)
            policies.append((1 - uniformly) * powers / powers.sum() + uniformly / size)
        for mine, theirs in zip(policies, numbers(agents), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-9)
        uniform = number % 5 == 0
        played, loss = agents.act(uniform=uniform), rng.random()
        agents.observe(loss)
        for total, policy, action in zip(totals, policies, played, strict=True):
            total[action] += loss / (1 / len(total) if uniform else policy[action])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 5.0))
def test_least_squares_is_the_ridge_regression_on_all_rounds(seed, ridge):
    sizes, rng = [3, 2, 4], np.random.default_rng(seed)
    agents = Agents(sizes, credit="least_squares", ridge=ridge, rate=2.0, seed=seed)
    marks, losses = [], []
    for number in range(1, 12):
        played = agents.act()
        marks.append(np.concatenate([np.eye(size)[action] for size, action in zip(sizes, played, strict=True)]))
        losses.append(rng.random())
        agents.observe(losses[-1])
        stacked = np.concatenate([np.array(marks), math.sqrt(ridge) * np.eye(sum(sizes))])
        part = np.linalg.lstsq(stacked, np.concatenate([losses, np.zeros(sum(sizes))]), rcond=None)[0]
        for values, policy in zip(np.split(part, [3, 5]), numbers(agents), strict=True):
            scale = 2.0 * math.sqrt(math.log(len(values)) / ((number + 1) * len(values)))
            powers = np.exp(-scale * number * values)
            np.testing.assert_allclose(policy, powers / powers.sum(), rtol=1e-7)


def regret(credit, rounds, gap, seed, agents=2, options=3):
    """Regret of several agents whose parts of a random loss add up; option 0 of each is better by ``gap``."""
    play = Agents([options] * agents, credit=credit, seed=seed)
    rng, total = np.random.default_rng(seed), 0.0
    for _ in range(rounds):
        wrong = np.count_nonzero(play.act())
        play.observe(float(rng.random() < 0.5 + gap * (wrong - agents / 2)))
        total += gap * wrong
    return total


@pytest.mark.parametrize("credit", ["exp3", "least_squares"])
def test_regret_grows_as_the_square_root_where_it_is_hardest(credit):
    lengths = [100, 400, 1600]
    found = []
    for rounds in lengths:
        gap = min(0.4, math.sqrt(3 * math.log(3) / rounds))
        found.append(np.mean([regret(credit, rounds, gap, seed) for seed in range(3)]))
        assert found[-1] < 2 * 2 * math.sqrt(rounds * 3 * math.log(3))
    exponent = np.polyfit(np.log(lengths), np.log(found), 1)[0]
    assert 0.4 < exponent < 0.6
    assert regret(credit, 2000, 0.3, 0) < 0.5 * 0.3 * 2 * (2 / 3) * 2000  # against uniform play


def test_exp3_keeps_its_bound_against_an_adversary():
    rounds, options = 4000, 4
    agents = Agents([options], seed=0)
    total, fixed = 0.0, np.zeros(options)
    for _ in range(rounds):
        losses = (numbers(agents)[0] > 1 / options).astype(float)  # whatever is likely costs
        (played,) = agents.act()
        agents.observe(float(losses[played]))
        total += losses[played]
        fixed += losses
    assert total - fixed.min() < 2 * math.sqrt(rounds * options * math.log(options))


def test_on_a_real_table_it_ends_among_the_best_percent():
    table = nasbench201("cifar10")
    agents = Agents([len(OPERATIONS)] * 6, credit="least_squares", rate=8.0, seed=0)
    for _ in range(1500):
        params = {f"op{edge}": OPERATIONS[option] for edge, option in enumerate(agents.act())}
        agents.observe(1 - table.evaluate(params)["accuracy"] / 100)
    best = {f"op{edge}": OPERATIONS[option] for edge, option in enumerate(agents.best)}
    assert table.evaluate(best)["accuracy"] > np.percentile(list(table.accuracy.values()), 99)


def test_agents_go_on_from_a_state():
    agents, other = (Agents([3, 2], credit="least_squares", seed=seed) for seed in (0, 1))
    for number in range(10):
        agents.act()
        agents.observe(number / 10)
    other.restore(agents.state())
    for _ in range(5):
        assert agents.act() == other.act()
        agents.observe(0.3)
        other.observe(0.3)
    assert all(torch.equal(a, b) for a, b in zip(agents.policies, other.policies, strict=True))


def wide(count):
    """A network of three edges, each with ``count`` equally large operations."""
    edges = [Mixed({f"layer{k}": nn.Sequential(nn.Linear(30, 30), nn.Tanh()) for k in range(count)}) for _ in range(3)]
    return nn.Sequential(*edges, nn.Linear(30, 2))


def live_bytes(count):
    """Bytes that one iteration keeps for the backward pass, bytes of momentum after it, gradients that were there."""
    torch.manual_seed(0)
    stepper = MANAS(warmup=0)._stepper(wide(count), 0)
    network, x = stepper.networks[0], torch.randn(64, 30)
    kept, touched = {}, []
    for part in network.parameters():
        part.register_hook(lambda gradient: touched.append(gradient.numel()))

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stepper.step(lambda n: lambda: n(x).square().mean(), lambda n: lambda: n(x).square().mean(), 0)
    momentum = sum(v.nbytes for s in stepper.movers[0].state.values() for v in s.values() if v is not None)
    return sum(kept.values()), momentum, sum(touched)


def test_memory_is_that_of_one_path():
    few, many = live_bytes(2), live_bytes(16)
    assert many == few
    one = 3 * (30 * 30 + 30) + 62
    assert few[1:] == (4 * one, one)


def test_a_path_without_weights_is_played_and_trains_nothing():
    torch.manual_seed(0)
    edge = Mixed({"skip": nn.Identity(), "linear": nn.Linear(3, 3)})
    stepper = MANAS(warmup=0, momentum=0.0)._stepper(nn.Sequential(edge), 0)
    x, moved = torch.randn(8, 3), []
    for _ in range(12):
        before = edge.operations[1].weight.detach().clone()
        loss = stepper.step(lambda n: lambda: n(x).square().mean(), lambda n: lambda: n(x).square().mean(), 0)
        moved.append(not torch.equal(before, edge.operations[1].weight))
        assert moved[-1] or loss == pytest.approx(float(x.square().mean()))
    assert 0 < sum(moved) < 12


def test_it_learns_which_path_is_good():
    task = load_task("breast-cancer")
    bad = nn.Sequential(nn.Linear(30, 30), nn.Threshold(1e9, 0.0))
    edges = [Mixed({"bad": bad, "linear": nn.Linear(30, 30), "skip": nn.Identity()}) for _ in range(2)]
    model = nn.Sequential(*edges, nn.Linear(30, 2))
    for credit in ("exp3", "least_squares"):
        result = MANAS(epochs=20, credit=credit, batch_size=16, rate=3.0).search(model, task)
        assert "bad" not in result.choices.values()
        assert result.scores[-1] > 0.9
        assert torch.equal(result.alphas["0"][0], torch.zeros(3))
        probabilities = result.alphas["0"][1:].exp()
        torch.testing.assert_close(probabilities.sum(1), torch.ones(20))
        assert probabilities[-1, 0] < 0.2
    assert all(part.path is None for part in mixed(model).values())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"credit": "lottery"}, "credit must be one of exp3, least_squares"),
        ({"rate": 0.0}, "rate must be positive"),
        ({"rate": -1.0}, "rate must be a non-negative"),
        ({"explore": -0.5}, "explore must be a non-negative"),
        ({"warmup": -1}, "warmup must be a non-negative, finite whole number"),
        ({"window": 0}, "window must be at least 1"),
    ],
)
def test_bad_settings(wrong, words):
    with pytest.raises(SettingError, match=words):
        MANAS(**wrong)


def test_bad_agents():
    for sizes in ([], [3, 1]):
        with pytest.raises(SettingError, match="at least two options"):
            Agents(sizes)
    for wrong in ({"credit": "x"}, {"rate": -1.0}, {"ridge": 0.0}, {"explore": -0.1}):
        with pytest.raises(SettingError, match=next(iter(wrong))):
            Agents([2], **wrong)
    agents = Agents([2])
    with pytest.raises(SettingError, match="act"):
        agents.observe(0.5)
    for loss in (math.nan, 1.5, -0.1):
        agents.act()
        with pytest.raises(SettingError, match="loss of round 1 must be in"):
            agents.observe(loss)
