"""The conformance suite of Optuna samplers."""

import math
from collections.abc import Callable, Collection

from optuna.samplers import BaseSampler

from netwright.testing._property import run_properties
from netwright.testing._sampler_properties import PROPERTIES, Case

__all__ = ["check_sampler", "sampler_properties"]


def sampler_properties() -> tuple[str, ...]:
    """The names that ``check_sampler`` reports and that its ``skip`` understands, in the order of checking."""
    return tuple(PROPERTIES)


def check_sampler(
    make_sampler: Callable[[int], BaseSampler],
    *,
    trials: int = 40,
    multi_objective: bool = True,
    history: bool = True,
    skip: Collection[str] = (),
) -> None:
    """Check that a sampler keeps what Optuna, ``search.run`` and parallel workers rely on.

    Reach for it in the tests of a sampler of your own. Nothing needs pytest.

    ================= ====================================================================================
    property          what must hold
    ================= ====================================================================================
    ``determinism``   the same seed gives the same trials
    ``history``       a new sampler on a copy of the trials proposes what the old one does
    ``pickle``        a copy by cloudpickle proposes what the original does
    ``distributions`` every kind of distribution is respected, with plain Python values
    ``states``        PRUNED, FAIL, RUNNING and NaN trials in the history are tolerated
    ``unseen``        a decision that appears late, or a range that moves, gets a value
    ``conditional``   decisions that depend on others are sampled
    ``objectives``    two and three objectives, of either direction
    ``constraints``   trials with constraints, also where none is feasible
    ``parallel``      many asks before the first tell, and suggestions in turns, give trials that differ,
                      also beside a decision that has one value
    ``reseed``        ``reseed_rng`` makes two equal samplers differ
    ``random_state``  the global random states of torch, NumPy and Python are left as they were
    ================= ====================================================================================

    Args:
        make_sampler: builds the sampler from a seed.
        trials: how many are run where a property needs a model; more than the sampler's random start.
        multi_objective: whether it claims to know several objectives.
        history: whether it claims to derive everything from the history.
        skip: properties to leave out, by name; say in your own tests why.

    Raises:
        AssertionError: the first property that does not hold, by name, with what was seen.

    Example:
        >>> from optuna.samplers import RandomSampler
        >>> check_sampler(lambda seed: RandomSampler(seed=seed), history=False, skip=["pickle"])

    Cost: about sixteen times ``trials`` suggestions.
    """
    left_out = {*skip, *(() if multi_objective else ("objectives",)), *(() if history else ("history",))}
    name = type(make_sampler(0)).__name__
    run_properties(name, PROPERTIES, Case(make_sampler, max(2, math.ceil(trials)), multi_objective), left_out)
