"""LINAS: the gain against exact hypervolumes, the warp, rules and constraints, exhaustive truth, conformance."""

import itertools

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution

from netwright.core.errors import SettingError
from netwright.core.front import hypervolume, non_dominated
from netwright.search import LINASSampler, Rule, SearchSpace
from netwright.search._encoding import Encoding
from netwright.search._gain import directions, front_rows, reach, volume
from netwright.search._proposer import Measured, Settings, propose
from netwright.search._scale import Scale, bounded
from netwright.testing._sampler import check_sampler

optuna.logging.set_verbosity(optuna.logging.ERROR)


def small(seed):
    return LINASSampler(start=10, batch=8, population=60, generations=3, draws=8, seed=seed)


def test_it_is_a_sampler():
    check_sampler(small, trials=30)


@pytest.mark.parametrize(("objectives", "tolerance"), [(1, 1e-12), (2, 0.005), (3, 0.03)])
def test_volume_by_directions_is_the_hypervolume(objectives, tolerance):
    rng = np.random.default_rng(objectives)
    points, reference = rng.random((30, objectives)), np.full(objectives, 1.1)
    along = directions(objectives, 2000)
    found = volume(reach(points, reference, along).max(0), objectives)
    assert found == pytest.approx(hypervolume(points, reference), rel=tolerance)
    wider = np.concatenate([points, rng.random((1, objectives)) * 1e-3])
    assert volume(reach(wider, reference, along).max(0), objectives) > found


def test_front_by_blocks_is_the_front():
    points = np.random.default_rng(0).random((1000, 2))
    assert sorted(front_rows(points)) == np.flatnonzero(non_dominated(points)).tolist()


def test_warp_is_one_to_one_linear_where_good_and_flat_where_bad():
    values = np.linspace(-3, 300, 400)[:, None]
    scale = Scale(np.concatenate([[[0.0], [1.0], [2.0]], values]), 3)
    warped = scale.warp(values)
    np.testing.assert_allclose(scale.unwarp(warped), (values - 1) / 1)
    assert (np.diff(warped[:, 0]) > 0).all()
    np.testing.assert_allclose(warped[values <= 1], (values - 1)[values <= 1])
    assert warped[-1, 0] < 6
    assert scale.reference().tolist() == [3.0]


def test_violations_keep_their_sign_and_order_and_the_far_ones_lie_near():
    values = np.array([-5.0, -0.01, 0.0, 0.01, 0.02, 0.03, 0.06, 600.0])  # three times the median of |v| is 0.075
    found = bounded(values)
    assert (np.sign(found) == np.sign(values)).all()
    assert (np.diff(found) > 0).all()
    np.testing.assert_allclose(found[:-1], values[:-1] / 0.075)
    assert found[-1] == pytest.approx(1 + np.log(600 / 0.075))
    np.testing.assert_array_equal(bounded(np.array([0.0, 0.0, 2.0])), [0.0, 0.0, 1.0])


def test_what_hardly_ever_meets_a_constraint_is_left_alone():
    """Cost falls towards a cliff, and all that lies before it is known: later candidates stay before it."""
    study = optuna.create_study(sampler=LINASSampler(start=8, batch=4, seed=0))
    space = {name: IntDistribution(0, 40) for name in ("thin", "a", "b", "c")}
    beyond = []
    for _ in range(40):
        trial = study.ask(space)
        thin = trial.params["thin"]
        trial.set_constraint("score", -0.01 if thin <= 30 else 0.3 + 0.02 * trial.params["a"] / 40)
        beyond.append(thin > 30)
        study.tell(trial, -thin + 0.05 * (trial.params["b"] - 20) ** 2)
    assert np.mean(beyond[20:]) < 0.4  # 0.55 to 0.7 where every chance counts


class Certain:
    """Knows the truth."""

    def __init__(self, column):
        self.column = column

    def predict(self, rows):
        return rows[:, self.column], np.zeros(len(rows))


def test_with_the_truth_known_the_batch_is_the_greedy_one_by_exact_hypervolume():
    space = SearchSpace({name: CategoricalDistribution(tuple(range(5))) for name in "abc"})
    encoding = Encoding(space)
    genes = np.array(list(itertools.product(range(5), repeat=3)), dtype=float)
    truth = np.random.default_rng(3).normal(size=(125, 2)) + 2
    place = {row.tobytes(): number for number, row in enumerate(genes)}
    known = Measured(genes[:20], truth[:20], np.zeros((20, 0)), np.ones(2))
    scale = Scale(truth[:20], 20)
    columns = iter([0, 1])

    def look(rows):
        return scale.warp(truth[[place[row.tobytes()] for row in rows]])

    settings = Settings(4, 300, 6, 2, None, 20)
    tried = set(encoding.keys(genes[:20]))
    found = propose(encoding, known, tried, settings, 0, look=look, fit=lambda *_: Certain(next(columns)))
    measured, wanted = list(truth[:20]), []
    for _ in range(4):
        volumes = [hypervolume([*measured, point], scale.reference()) for point in truth]
        wanted.append(int(np.argmax(volumes)))
        measured.append(truth[wanted[-1]])
    assert [place[row.tobytes()] for row in found][:3] == wanted[:3]


def test_nothing_twice_and_the_whole_of_a_small_space():
    space = SearchSpace({"a": IntDistribution(0, 5), "b": CategoricalDistribution(tuple("uvwxy"))})
    study = optuna.create_study(sampler=LINASSampler(space, start=6, batch=4, population=40, generations=3, seed=0))
    for _ in range(30):
        trial = study.ask(dict(space.decisions))
        study.tell(trial, trial.params["a"])
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 30


def test_rules_are_kept_in_start_and_search():
    space = SearchSpace(
        {"a": IntDistribution(0, 9), "b": IntDistribution(0, 9)},
        rules=[Rule("b", lambda p: p["b"] >= p["a"], "b must be at least a")],
    )
    study = optuna.create_study(sampler=LINASSampler(space, start=8, batch=4, population=60, generations=3, seed=1))
    for _ in range(28):
        trial = study.ask(dict(space.decisions))
        assert trial.params["b"] >= trial.params["a"]
        study.tell(trial, trial.params["b"] - 2 * trial.params["a"])
    assert study.best_value == -9


def test_hard_constraints_steer():
    study = optuna.create_study(sampler=LINASSampler(start=12, batch=6, seed=2))
    space = {"x": IntDistribution(0, 60), "y": IntDistribution(0, 60)}
    met = []
    for _ in range(48):
        trial = study.ask(space)
        x, y = trial.params["x"], trial.params["y"]
        trial.set_constraint("sum", x + y - 40)
        met.append(x + y <= 40)
        study.tell(trial, -x - 0.5 * y)
    assert np.mean(met[24:]) > 0.6
    best = min(trial.value for trial, ok in zip(study.trials, met, strict=True) if ok)
    assert best <= -39


def proposed(**settings):
    """Shares ``x`` that are proposed after the first two batches, where ``x`` is gained at the cost of its square."""
    sampler = LINASSampler(start=10, batch=10, seed=0, **settings)
    study = optuna.create_study(sampler=sampler, directions=["maximize", "minimize"])
    for _ in range(40):
        trial = study.ask({"x": IntDistribution(0, 400)})
        x = trial.params["x"] / 400
        study.tell(trial, [x, x**2])
    return np.array([trial.params["x"] / 400 for trial in study.trials[20:]])


def test_a_reference_in_the_signs_of_the_study():
    assert np.mean(proposed(reference=(0.5, 0.6)) > 0.5) > 0.8
    with pytest.raises(SettingError, match="reference has 3 values for 2 objectives"):
        proposed(reference=(0.0, 1.0, 2.0))


def test_nothing_is_gained_beyond_an_ideal():
    """A score that cannot surpass 1 is not sought where it is dear; without the ideal it is."""
    assert np.mean(proposed(ideal=(0.5, -np.inf)) > 0.55) < 0.2 < np.mean(proposed() > 0.55)
    with pytest.raises(SettingError, match="ideal has 1 values for 2 objectives"):
        proposed(ideal=(0.5,))


def test_an_infinite_ideal_is_none_whatever_its_sign():
    np.testing.assert_array_equal(proposed(ideal=(0.5, np.inf)), proposed(ideal=(0.5, -np.inf)))
    np.testing.assert_array_equal(proposed(ideal=(-np.inf, np.inf)), proposed())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start": 1}, "start must be at least 2"),
        ({"batch": 0}, "batch"),
        ({"draws": 0}, "draws"),
        ({"ideal": (1.0, np.nan)}, "ideal must hold numbers, got nan"),
        ({"reference": (np.nan, 1.0)}, "reference must hold finite numbers, got nan"),
        ({"reference": (1.0, -np.inf)}, "reference must hold finite numbers, got -inf"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(SettingError, match=words):
        LINASSampler(**settings)
