"""What must hold of a sampler, one function a property."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import Trial, TrialState, create_trial

from netwright.core.randomness import save_states
from netwright.testing._compare import equal
from netwright.testing._property import expect

__all__ = ["PROPERTIES", "Case"]

_WAYS = (StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE)
_SPACE: Mapping[str, BaseDistribution] = {
    "depth": IntDistribution(1, 8),
    "width": IntDistribution(8, 64, step=8),
    "rate": FloatDistribution(1e-4, 1e-1, log=True),
    "kind": CategoricalDistribution(("a", "b", "c")),
}


@dataclass(frozen=True)
class Case:
    """What is checked."""

    make: Callable[[int], BaseSampler]
    trials: int
    several: bool

    def study(self, sampler: BaseSampler, objectives: int = 1) -> optuna.Study:
        """A new study."""
        with _quiet():
            return optuna.create_study(sampler=sampler, directions=_WAYS[:objectives])


@contextmanager
def _quiet() -> Iterator[None]:
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _values(params: Mapping[str, Any], objectives: int) -> list[float]:
    """A smooth problem with a trade-off."""
    size = params["depth"] * params["width"] / 512
    error = (np.log10(params["rate"]) + 2.5) ** 2 + {"a": 0.0, "b": 0.3, "c": 1.0}[params["kind"]] + 1 / (1 + 8 * size)
    return [float(error), -float(size), float(params["depth"])][:objectives]


def _go_on(
    study: optuna.Study, count: int, objectives: int = 1, space: Mapping[str, BaseDistribution] = _SPACE
) -> list[dict[str, Any]]:
    found = []
    with _quiet():
        for _ in range(count):
            trial = study.ask(dict(space))
            found.append(dict(trial.params))
            study.tell(trial, _values(trial.params, objectives))
    return found


def _determinism(case: Case) -> None:
    first, second = (_go_on(case.study(case.make(3)), case.trials) for _ in range(2))
    place = next((n for n, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), None)
    expect(place is None, f"trial {place} differs between two samplers with the same seed")


def _history(case: Case) -> None:
    study = case.study(case.make(5))
    _go_on(study, case.trials - 3)
    copy = case.study(case.make(5))
    copy.add_trials(study.get_trials())
    one, other = _go_on(study, 3), _go_on(copy, 3)
    expect(one == other, f"on the same history the old sampler proposes {one}, a new one {other}")


def _pickle(case: Case) -> None:
    study = case.study(case.make(5))
    _go_on(study, case.trials - 3)
    copy = case.study(cloudpickle.loads(cloudpickle.dumps(study.sampler)))
    copy.add_trials(study.get_trials())
    one, other = _go_on(study, 2), _go_on(copy, 2)
    expect(one == other, f"the original proposes {one}, its copy {other}")


def _distributions(case: Case) -> None:
    kinds: dict[str, BaseDistribution] = {
        "float": FloatDistribution(-1.0, 1.0),
        "logarithmic": FloatDistribution(1e-7, 1.0, log=True),
        "stepped": FloatDistribution(-10.2, 10.2, step=0.1),
        "int": IntDistribution(-10, 10),
        "int_stepped": IntDistribution(3, 9, step=2),
        "int_logarithmic": IntDistribution(1, 100, log=True),
        "choice": CategoricalDistribution((1, 1.5, "x", None, True)),
        "single": IntDistribution(4, 4),
        "only": CategoricalDistribution(("one",)),
    }
    study = case.study(case.make(1))
    with _quiet():
        for _ in range(case.trials):
            trial = study.ask(kinds)
            for name, distribution in kinds.items():
                value = trial.params[name]
                inside = distribution._contains(distribution.to_internal_repr(value))
                expect(inside, f"{name} got {value!r}, which is not in {distribution}")
                expect(not isinstance(value, np.generic), f"{name} got {value!r} of NumPy's {type(value).__name__}")
            study.tell(trial, trial.params["float"] + trial.params["int"] / 10)


def _states(case: Case) -> None:
    study = case.study(case.make(2))
    with _quiet():
        for number in range(case.trials):
            trial = study.ask(dict(_SPACE))
            if number % 5 == 0:
                study.tell(trial, state=TrialState.FAIL)
            elif number % 5 == 1:
                trial.report(0.5, step=0)
                study.tell(trial, state=TrialState.PRUNED)
            elif number % 5 == 2:
                study.tell(trial, float("nan"), skip_if_finished=True)
            elif number % 10 != 3:
                study.tell(trial, _values(trial.params, 1))
        for state in (TrialState.FAIL, TrialState.PRUNED):
            study.add_trial(create_trial(state=state, params={}, distributions={}))
    _go_on(study, case.trials)


def _unseen(case: Case) -> None:
    study = case.study(case.make(2))
    _go_on(study, case.trials)

    def other(trial: Trial) -> float:
        high = 8 if trial.number % 2 else 16
        return trial.suggest_int("depth", 1, high) + trial.suggest_float("late", 0.0, 1.0)

    with _quiet():
        study.optimize(other, n_trials=6)
    expect(
        all(0 <= trial.params["late"] <= 1 for trial in study.trials[-6:]), "a late decision got no value in its range"
    )


def _conditional(case: Case) -> None:
    def objective(trial: Trial) -> float:
        if trial.suggest_categorical("branch", ["left", "right"]) == "left":
            return trial.suggest_float("x", 0.0, 1.0)
        return trial.suggest_int("y", 1, 5) + trial.suggest_float("z", 1e-3, 1.0, log=True)

    study = case.study(case.make(4))
    with _quiet():
        study.optimize(objective, n_trials=case.trials)
    branches = {trial.params["branch"] for trial in study.trials}
    expect(branches == {"left", "right"}, f"only the branch {branches} was ever tried")


def _objectives(case: Case) -> None:
    for count in (2, 3):
        study = case.study(case.make(6), count)
        _go_on(study, case.trials, count)
        expect(len(study.best_trials) > 0, f"{count} objectives left no best trial")


def _constraints(case: Case) -> None:
    for offset in (0.0, 1e6):
        study = case.study(case.make(6), 2 if case.several else 1)
        with _quiet():
            for _ in range(case.trials):
                trial = study.ask(dict(_SPACE))
                trial.set_constraint("depth", trial.params["depth"] - 4 + offset)
                study.tell(trial, _values(trial.params, 2 if case.several else 1))


def _parallel(case: Case) -> None:
    fixed = CategoricalDistribution(("one",))
    for space in (_SPACE, {**_SPACE, "fixed": fixed}):
        study = case.study(case.make(7))
        _go_on(study, case.trials, space=space)
        with _quiet():
            asked = [study.ask(dict(space)) for _ in range(8)]
            different = {tuple(trial.params.items()) for trial in asked}
            expect(len(different) >= 7, f"eight asks before a tell gave {len(different)} that differ: {different}")
            for trial in reversed(asked):
                study.tell(trial, _values(trial.params, 1))
        _go_on(study, 2, space=space)
        with _quiet():
            one, other = study.ask(), study.ask()
            for name, distribution in space.items():
                for trial in (one, other):
                    _suggest(trial, name, distribution)
            expect(one.params != other.params, f"two trials that suggest in turns both get {one.params}")


def _suggest(trial: Trial, name: str, distribution: BaseDistribution) -> None:
    if isinstance(distribution, CategoricalDistribution):
        trial.suggest_categorical(name, distribution.choices)
    elif isinstance(distribution, IntDistribution):
        trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    elif isinstance(distribution, FloatDistribution):
        trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)


def _reseed(case: Case) -> None:
    first, second = case.make(8), case.make(8)
    first.reseed_rng()
    one, other = _go_on(case.study(first), 6), _go_on(case.study(second), 6)
    expect(one != other, "after reseed_rng it proposes what a sampler with the old seed does")


def _random_state(case: Case) -> None:
    before = save_states()
    _go_on(case.study(case.make(9)), case.trials)
    after = save_states()
    moved = [name for name in before if not equal(before[name], after[name])]
    expect(not moved, f"the global random state of {', '.join(moved)} moved")


PROPERTIES: Mapping[str, Callable[[Case], None]] = {
    "determinism": _determinism,
    "history": _history,
    "pickle": _pickle,
    "distributions": _distributions,
    "states": _states,
    "unseen": _unseen,
    "conditional": _conditional,
    "objectives": _objectives,
    "constraints": _constraints,
    "parallel": _parallel,
    "reseed": _reseed,
    "random_state": _random_state,
}
"""Every property by name."""
