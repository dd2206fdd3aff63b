"""APQ: the network against a loop and a plain module, what transfer keeps and when it is dropped, conformance."""

import itertools
import math

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, IntDistribution
from scipy.stats import spearmanr
from torch import nn

from netwright.core.errors import SettingError
from netwright.core.front import hypervolume
from netwright.search import SearchSpace, SpaceError
from netwright.search._apq_predictor import (
    TransferredPredictor,
    forward,
    pretrain,
    random_start,
    turns,
    without_bits,
)
from netwright.search._encoding import Encoding
from netwright.search.apq import APQSampler
from netwright.testing import check_sampler

optuna.logging.set_verbosity(optuna.logging.ERROR)
torch.set_num_threads(1)

SMALL = {"members": 2, "hidden": 8, "steps": 30, "population": 40, "generations": 2, "draws": 4}
SPACE = SearchSpace(
    {
        "width": IntDistribution(1, 16),
        "bits": CategoricalDistribution((3, 4, 8)),
        "kernel": CategoricalDistribution((1, 3, 5)),
        "head_bits": IntDistribution(2, 8),
    }
)
BITS = ("bits", "head_bits")


def full(params):
    return -((params["width"] - 11) ** 2) / 40 + math.log(params["kernel"])


def quantized(params):
    return full(params) - 3 / params["bits"] - 1 / params["head_bits"]


CHEAP = [
    (params, full(params))
    for w, k in itertools.product(range(1, 17), (1, 3, 5))
    if (params := {"width": w, "kernel": k})
]


def searched(sampler, trials=20, sign=1.0, direction="maximize"):
    study = optuna.create_study(sampler=sampler, direction=direction)
    for _ in range(trials):
        trial = study.ask(dict(SPACE.decisions))
        study.tell(trial, sign * quantized(trial.params))
    return study


@pytest.mark.parametrize("bits", [(), ("a", "none")])
def test_it_is_a_sampler(bits):
    check_sampler(lambda seed: APQSampler(bits=bits, start=10, batch=10, seed=seed, **{**SMALL, "steps": 3}), trials=22)


def test_it_is_a_sampler_with_full_precision():
    sampler = APQSampler(SPACE, BITS, CHEAP, start=6, batch=6, seed=3, **SMALL)
    first, again = searched(sampler), searched(APQSampler(SPACE, BITS, CHEAP, start=6, batch=6, seed=3, **SMALL))
    assert [trial.params for trial in first.trials] == [trial.params for trial in again.trials]
    assert len({tuple(sorted(trial.params.items())) for trial in first.trials}) == 20
    state = torch.get_rng_state()
    searched(sampler, trials=8)
    assert torch.equal(state, torch.get_rng_state())


def test_the_network_is_its_equation():
    rng = np.random.default_rng(0)
    weights = random_start(3, 2, members=2, hidden=4, seed=1).weights
    weights = tuple(weight + 0.1 for weight in weights)
    inputs, bits = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)
    found = forward(weights, torch.from_numpy(inputs), torch.from_numpy(bits))
    of_inputs, of_bits, first, between, second, last, level = (weight.double().tolist() for weight in weights)
    for m, n in itertools.product(range(2), range(5)):
        one = [
            max(
                0.0,
                sum(inputs[n, i] * of_inputs[m][i][h] for i in range(3))
                + sum(bits[n, i] * of_bits[m][i][h] for i in range(2))
                + first[m][0][h],
            )
            for h in range(4)
        ]
        two = [max(0.0, sum(one[i] * between[m][i][h] for i in range(4)) + second[m][0][h]) for h in range(4)]
        wanted = sum(two[i] * last[m][i][0] for i in range(4)) + level[m][0][0]
        assert float(found[m, n]) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("count", [2, 128, 129, 300])
def test_observations_take_turns_so_that_none_is_left_out(count):
    seen = torch.cat([torch.arange(count)[turn] for turn in turns(count, 9)])
    assert len(seen) == 9 * min(count, 128)
    times = torch.bincount(seen, minlength=count)
    assert times.max() - times.min() <= 1


def test_many_observations_are_learned_as_few_are():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(600, 4))
    targets = inputs @ [1.0, -2.0, 0.5, 0.0]
    start, bits = random_start(4, 0, 5, 32, 0), np.zeros(4, dtype=bool)
    for count in (120, 500):
        model = TransferredPredictor(start, bits, 200, 1e-2).fit(inputs[:count], targets[:count])
        assert spearmanr(model.predict(inputs[500:])[0], targets[500:])[0] > 0.97


def test_without_full_precision_it_is_an_ordinary_network_trained_from_scratch():
    rng = np.random.default_rng(1)
    inputs, targets = rng.random((20, 5)), rng.random(20)
    mask = np.array([False, True, False, True, False])
    start = random_start(3, 2, members=1, hidden=6, seed=2)
    found, _ = TransferredPredictor(start, mask, steps=25, rate=1e-2).fit(inputs, targets).predict(inputs)

    rows = torch.tensor((inputs - inputs.mean(0)) / inputs.std(0), dtype=torch.float32)
    rows = torch.cat([rows[:, ~torch.from_numpy(mask)], rows[:, torch.from_numpy(mask)]], 1)
    wanted = torch.tensor((targets - targets.mean()) / targets.std(), dtype=torch.float32)
    network = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))
    a, q, b1, w2, b2, w3, b3 = (weight[0] for weight in start.weights)
    given = [torch.cat([a, q]).T, b1[0], w2.T, b2[0], w3.T, b3[0]]
    with torch.no_grad():
        for weight, value in zip(network.parameters(), given, strict=True):
            weight.copy_(value)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 25)
    for _ in range(25):
        optimizer.zero_grad()
        pull = sum(((now - then) ** 2).sum() for now, then in zip(network.parameters(), given, strict=True))
        (((network(rows)[:, 0] - wanted) ** 2).mean() + 0.01 * pull).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        expected = network(rows)[:, 0].numpy() * targets.std() + targets.mean()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_before_the_first_step_the_bits_say_nothing_and_full_precision_everything():
    rng = np.random.default_rng(2)
    inputs = rng.random((60, 4))
    mask = np.array([False, False, True, True])
    learned = pretrain(random_start(2, 2, 3, 32, 0), inputs[:, :2], inputs[:, 0] - inputs[:, 1] ** 2, 300, 1e-2)
    predictor = TransferredPredictor(without_bits(learned), mask, steps=0, rate=1e-2).fit(inputs[:9], rng.random(9))
    mean, spread = predictor.predict(inputs)
    assert spearmanr(mean, inputs[:, 0] - inputs[:, 1] ** 2)[0] > 0.99
    other = inputs.copy()
    other[:, 2:] = rng.random((60, 2))
    np.testing.assert_array_equal(predictor.predict(other)[0], mean)
    assert (spread > 0).all()


def rows_and_scores(count, seed):
    rng = np.random.default_rng(seed)
    encoding, drawn = Encoding(SPACE), [SPACE.sample(rng) for _ in range(count)]
    rows = encoding.features(np.array([encoding.genes(params) for params in drawn]))
    return rows, np.array([quantized(params) for params in drawn])


def chosen(cheap, count):
    """What the sampler's own fit chooses from ``count`` quantized scores, and its rank correlation on unseen ones."""
    rows, scores = rows_and_scores(count, 5)
    sampler = APQSampler(SPACE, BITS, cheap, seed=0, members=3, hidden=32)
    encoding = sampler._encoding(dict(SPACE.decisions))
    found = sampler._fit(encoding, rows, -scores, -1.0)
    unseen, truth = rows_and_scores(300, 6)
    return found.name, spearmanr(-found.predict(unseen)[0], truth)[0], found, unseen, truth


def test_transfer_is_worth_many_quantized_scores():
    name, with_transfer, *_ = chosen(CHEAP, 12)
    assert name == "bits from zero"
    assert with_transfer > 0.9
    assert chosen([], 12)[1] < with_transfer - 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_that_say_nothing_do_no_harm(seed):
    order = np.random.default_rng(seed).permutation(len(CHEAP))
    shuffled = [(params, CHEAP[place][1]) for (params, _), place in zip(CHEAP, order, strict=True)]
    name, correlation, found, *_ = chosen(shuffled, 60)
    assert set(found.errors) == {"bits from zero", "bits at random"}
    surpassed = found.errors["bits at random"] < found.errors["bits from zero"] * (1 - 120**-0.5)
    assert name == ("bits at random" if surpassed else "bits from zero")
    assert correlation > chosen([], 60)[1] - 0.03


def test_the_deviation_is_honest():
    _, _, found, unseen, truth = chosen(CHEAP, 40)
    mean, spread = found.predict(unseen)
    assert 0.4 < np.sqrt(np.mean(((-mean - truth) / spread) ** 2)) < 2.5


def test_signs_mirror():
    upward = APQSampler(SPACE, BITS, CHEAP, start=6, batch=6, seed=1, **SMALL)
    mirrored = [(params, -score) for params, score in CHEAP]
    downward = APQSampler(SPACE, BITS, mirrored, start=6, batch=6, seed=1, **SMALL)
    first = [trial.params for trial in searched(upward).trials]
    assert first == [trial.params for trial in searched(downward, sign=-1.0, direction="minimize").trials]


def test_predictions_have_the_unit_and_sign_of_the_study():
    candidates = every()[::5]
    truth = np.array([quantized(params) for params in candidates])
    rose, fell = (
        APQSampler(
            SPACE, BITS, [(params, sign * score) for params, score in CHEAP], start=30, seed=0, members=3, hidden=32
        )
        for sign in (1, -1)
    )
    risen = searched(rose, trials=30)
    fallen = searched(fell, trials=30, sign=-1.0, direction="minimize")
    found = rose.predict(risen, candidates)
    assert np.sqrt(np.mean((found - truth) ** 2)) < 0.4 * truth.std()
    np.testing.assert_allclose(fell.predict(fallen, candidates), -found, atol=1e-4)
    with pytest.raises(SettingError, match="at least two complete trials, got 0"):
        rose.predict(optuna.create_study(), candidates)


def every():
    ranges = range(1, 17), (3, 4, 8), (1, 3, 5), range(2, 9)
    return [dict(zip(SPACE.decisions, row, strict=True)) for row in itertools.product(*ranges)]


def test_it_finds_the_optimum():
    sampler = APQSampler(SPACE, BITS, CHEAP, start=6, batch=6, seed=0, **{**SMALL, "steps": 100})
    assert searched(sampler, trials=24).best_value > max(map(quantized, every())) - 0.05


def test_it_finds_the_front():
    sampler = APQSampler(SPACE, BITS, CHEAP, objective=1, start=6, batch=6, seed=0, **{**SMALL, "steps": 100})
    study = optuna.create_study(sampler=sampler, directions=["minimize", "maximize"])

    def both(params):
        return [params["width"] * params["bits"], quantized(params)]

    for _ in range(30):
        trial = study.ask(dict(SPACE.decisions))
        study.tell(trial, both(trial.params))
    found, wanted = (
        hypervolume(np.array([both(params) for params in some]) * [1, -1], [60.0, 2.0])
        for some in ([trial.params for trial in study.trials], every())
    )
    assert found > 0.9 * wanted


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"bits": ("bit",)}, SpaceError, "bits names 'bit', which is no decision"),
        ({"full_precision": [({"width": 3}, 1.0)] * 2}, SpaceError, "'kernel' is missing"),
        ({"full_precision": [({"width": 3, "kernel": 2}, 1.0)] * 2}, SpaceError, "'kernel' must be one of 1, 3, 5"),
        ({"full_precision": [({"width": 3, "kernel": 1, "bits": 3}, 1.0)] * 2}, SpaceError, "'bits' is no decision"),
        ({"full_precision": [CHEAP[0], (CHEAP[1][0], math.nan)]}, SettingError, "holds the score nan"),
        ({"full_precision": CHEAP[:1]}, SettingError, "at least two candidates"),
        ({"full_precision": CHEAP, "bits": ()}, SettingError, "Name them in bits"),
        ({"full_precision": CHEAP, "bits": tuple(SPACE.decisions)}, SpaceError, "Every decision is named in bits"),
        ({"full_precision": CHEAP, "space": None}, SettingError, "needs the space"),
        ({"members": 0}, SettingError, "members"),
        ({"start": 1}, SettingError, "start"),
        ({"objective": -1}, SettingError, "objective"),
        ({"reference": (math.inf,)}, SettingError, "reference must hold finite numbers, got inf"),
    ],
)
def test_bad_settings(settings, error, words):
    with pytest.raises(error, match=words):
        APQSampler(**{"space": SPACE, "bits": BITS, **settings})


@pytest.mark.parametrize(
    ("settings", "words"), [({"objective": 1}, "the study has 1"), ({"reference": (1.0, 2.0)}, "2 values for 1")]
)
def test_settings_that_do_not_fit_the_study(settings, words):
    with pytest.raises(SettingError, match=words):
        searched(APQSampler(SPACE, BITS, start=4, batch=4, seed=0, **SMALL, **settings), trials=6)


def test_predict_refuses_what_is_no_candidate():
    sampler = APQSampler(SPACE, BITS, start=4, batch=4, seed=0, **SMALL)
    study = searched(sampler, 6)
    good = {"width": 3, "bits": 4, "kernel": 3, "head_bits": 2}
    assert np.isfinite(sampler.predict(study, [good])).all()
    for change, words in (({"width": 99}, "'width' must be one of 1 to 16"), ({"more": 1}, "'more' is no decision")):
        with pytest.raises(SpaceError, match=words):
            sampler.predict(study, [good, good | change])
    shared = APQSampler(start=4, batch=4, seed=0, **SMALL)
    assert np.isfinite(shared.predict(study, [good | {"more": 1}])).all()
    with pytest.raises(SpaceError, match="'width' must be one of 1 to 16"):
        shared.predict(study, [good | {"width": 99}])
