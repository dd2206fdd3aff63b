"""The sampler suite passes correct samplers and names the one property that a broken one breaks."""

import random

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import TrialState
from scipy.stats import uniform

from netwright.testing import check_sampler, sampler_properties

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Plain(RandomSampler):
    """Uniform, from the seed and the number of the trial alone: a correct sampler. The others break one property."""

    def __init__(self, seed):
        super().__init__(seed)
        self.seed = seed

    def reseed_rng(self):
        self.seed += 1000

    def sample_independent(self, study, trial, name, distribution):
        state = np.random.default_rng([self.seed, self.place(study, trial), *name.encode()])
        if isinstance(distribution, FloatDistribution):
            if distribution.step is None and not distribution.log:
                return float(state.uniform(distribution.low, distribution.high))
            return distribution.low
        if hasattr(distribution, "choices"):
            return distribution.choices[int(state.integers(len(distribution.choices)))]
        places = (distribution.high - distribution.low) // distribution.step + 1
        return distribution.low + distribution.step * int(state.integers(places))

    def place(self, study, trial):
        return trial.number


class Same(Plain):
    """What is asked before the next result is the same."""

    def place(self, study, trial):
        return sum(other.state is TrialState.COMPLETE for other in study.get_trials(deepcopy=False))


class Pairs(Plain):
    """Two asks in a row are the same, so that not all are."""

    def place(self, study, trial):
        return trial.number // 2


class InTurns(Plain):
    """It settles a trial at its first suggestion, and sees what others try only after their last."""

    def __init__(self, seed):
        super().__init__(seed)
        self.places = {}

    def place(self, study, trial):
        told = sum(len(other.params) >= 4 for other in study.get_trials(deepcopy=False) if other.number != trial.number)
        return self.places.setdefault((id(study), trial.number), told)


class BesideOneValue(Plain):
    """A decision that has one value makes it blind to what others try."""

    def place(self, study, trial):
        others = study.get_trials(deepcopy=False)
        blind = any("fixed" in other.params for other in others)
        return sum(other.state is TrialState.COMPLETE for other in others) if blind else trial.number


class Drawing(Plain):
    """It draws from a global generator."""

    def __init__(self, seed, draw):
        super().__init__(seed)
        self.draw = draw

    def place(self, study, trial):
        self.draw()
        return trial.number


@pytest.mark.parametrize("make", [Plain, lambda seed: TPESampler(seed=seed, n_startup_trials=5)], ids=["plain", "TPE"])
def test_correct_samplers_pass(make):
    own = make is Plain
    check_sampler(make, trials=12, history=own, skip=() if own else ["pickle"])


@pytest.mark.parametrize("broken", [Same, Pairs, InTurns, BesideOneValue])
def test_asks_that_do_not_differ_are_found(broken):
    others = [name for name in sampler_properties() if name != "parallel"]
    with pytest.raises(AssertionError, match=f"{broken.__name__} breaks 'parallel'"):
        check_sampler(broken, trials=6, skip=others)
    check_sampler(Plain, trials=6, skip=others)


@pytest.mark.parametrize(
    ("draw", "name"),
    [(lambda: torch.rand(1), "torch"), (random.random, "python"), (uniform.rvs, "numpy")],
)
def test_a_draw_from_a_global_generator_is_found(draw, name):
    torch.manual_seed(0)
    torch.rand(100)  # away from the ends of its state, which a sampler could change unseen
    others = [other for other in sampler_properties() if other != "random_state"]
    with pytest.raises(AssertionError, match=f"'random_state': the global random state of {name} moved"):
        check_sampler(lambda seed: Drawing(seed, draw), trials=6, skip=others)


def test_a_name_that_is_no_property_is_told():
    with pytest.raises(AssertionError, match="skip names no property: speed"):
        check_sampler(Plain, skip=["speed"])
