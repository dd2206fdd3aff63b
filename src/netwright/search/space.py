"""Search spaces: named decisions, which of them count, and what makes a candidate valid."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from netwright.core.errors import SettingError
from netwright.search.graphs import Graph

__all__ = ["Params", "Rule", "SearchSpace", "SpaceError"]

Params: TypeAlias = Mapping[str, Any]
"""A candidate: the value of every decision by name."""
_DRAWS = 100_000  # random candidates without a valid one before there is taken to be none


class SpaceError(SettingError):
    """A space without candidates, or a candidate that does not belong to it."""


@dataclass(frozen=True)
class Rule:
    """What must hold of a valid candidate.

    Args:
        decision: the decision to blame where it does not hold.
        holds: called with the active decisions of a candidate.
        words: what must hold, as it ends the sentence "Decision 'width' is invalid: ...".

    Example:
        >>> rule = Rule("width", lambda params: params["width"] % params["groups"] == 0, "groups must divide width")
        >>> rule.holds({"width": 12, "groups": 5})
        False
    """

    decision: str
    holds: Callable[[Params], bool]
    words: str


@dataclass(frozen=True)
class SearchSpace:
    """Named decisions as Optuna distributions, with the rules that candidates obey.

    Reach for it to say once what a candidate is: samplers of this wing propose valid candidates only, tell apart two
    candidates only where they differ in a decision that counts, and see candidates through ``features``. Rules,
    ``features`` and ``graph`` are told the decisions that count, and no others.

    Args:
        decisions: a distribution for every decision.
        rules: what must hold of a candidate; the first broken one is named.
        active: for a decision that counts only sometimes, when it does, told from the other decisions. The decisions of
            a block of layers that is not there are an example. A condition sees the decisions that count; where it asks
            for another one, its own decision does not count either.
        features: further numbers that describe a candidate to predictors, always as many.
        graph: the candidate as a graph, for samplers that look at structure.

    Raises:
        SpaceError: no decision, a rule or condition about a decision that is not there, or a decision that is no
            distribution.

    Example:
        >>> space = SearchSpace(
        ...     {"width": IntDistribution(8, 32, step=8), "groups": CategoricalDistribution((1, 2, 3))},
        ...     rules=[Rule("groups", lambda p: p["width"] % p["groups"] == 0, "it must divide width")],
        ... )
        >>> space.check({"width": 8, "groups": 3})
        Traceback (most recent call last):
        netwright.search.space.SpaceError: Decision 'groups' is invalid: it must divide width; got 3.
        >>> space.size
        12
    """

    decisions: Mapping[str, BaseDistribution]
    rules: Sequence[Rule] = ()
    active: Mapping[str, Callable[[Params], bool]] = field(default_factory=dict)
    features: Callable[[Params], Sequence[float]] | None = None
    graph: Callable[[Params], Graph] | None = None

    def __post_init__(self) -> None:
        if not self.decisions:
            raise SpaceError(
                "The space is empty: it has no decision. Give at least one, such as {'depth': IntDistribution(1, 4)}."
            )
        for name, distribution in self.decisions.items():
            if not isinstance(distribution, CategoricalDistribution | FloatDistribution | IntDistribution):
                raise SpaceError(
                    f"Decision {name!r} must be an Optuna distribution, got {type(distribution).__name__}. Use "
                    "IntDistribution(low, high), FloatDistribution(low, high) or CategoricalDistribution(choices)."
                )
        for name in (*(rule.decision for rule in self.rules), *self.active):
            if name not in self.decisions:
                raise SpaceError(
                    f"A rule speaks of {name!r}, which is no decision. Known are {', '.join(self.decisions)}."
                )
        object.__setattr__(self, "decisions", MappingProxyType(dict(self.decisions)))
        object.__setattr__(self, "active", MappingProxyType(dict(self.active)))
        object.__setattr__(self, "rules", tuple(self.rules))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"decisions": dict(self.decisions), "active": dict(self.active)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fixed = {name: MappingProxyType(state[name]) for name in ("decisions", "active")}
        self.__dict__.update(state | fixed)

    @property
    def size(self) -> float:
        """How many candidates there are before rules and conditions; infinite where a decision is continuous."""
        return math.prod(map(_count, self.decisions.values()))

    def reduced(self, params: Params) -> dict[str, Any]:
        """The decisions of a candidate that count, in the order of the space.

        They are the most for which every condition holds, told from them alone; so they are their own reduction.

        Raises:
            SpaceError: one of them is missing.
        """
        found = {name: params[name] for name in self.decisions if name in params}
        while len(kept := {name: value for name, value in found.items() if self._counts(name, found)}) < len(found):
            found = kept
        for name in self.decisions:
            if name not in params and self._counts(name, found):
                raise SpaceError(f"Decision {name!r} is missing from the candidate {dict(params)}.")
        return found

    def _counts(self, name: str, among: Params) -> bool:
        """Whether a decision counts where no others than those in ``among`` do."""
        if name not in self.active:
            return True
        seen = _Seen(among, self.decisions)
        try:
            holds = bool(self.active[name](seen))
        except Exception:  # a condition may do anything with what it asked for in vain
            if not seen.missed and not (seen.whole and len(among) < len(self.decisions)):
                raise
            return False
        return holds and not seen.missed

    def key(self, params: Params) -> tuple[tuple[str, Any], ...]:
        """The same for two candidates exactly where they are the same network."""
        return tuple(self.reduced(params).items())

    def broken(self, params: Params) -> Rule | None:
        """The first rule that a candidate breaks."""
        counted = self.reduced(params)
        return next((rule for rule in self.rules if rule.decision in counted and not rule.holds(counted)), None)

    def valid(self, params: Params) -> bool:
        """Whether no rule is broken."""
        return self.broken(params) is None

    def check(self, params: Params) -> None:
        """Assure that a candidate belongs to the space.

        Raises:
            SpaceError: it does not; the decision to blame is named.
        """
        for name in params:
            if name not in self.decisions:
                raise SpaceError(f"{name!r} is no decision of the space. Known are {', '.join(self.decisions)}.")
        for name, value in self.reduced(params).items():
            if not contains(self.decisions[name], value):
                raise SpaceError(f"Decision {name!r} must be one of {_range(self.decisions[name])}, got {value!r}.")
        rule = self.broken(params)
        if rule is not None:
            raise SpaceError(f"Decision {rule.decision!r} is invalid: {rule.words}; got {params[rule.decision]!r}.")

    def sample(self, rng: np.random.Generator) -> dict[str, Any]:
        """A valid candidate, uniform over the decisions; with every decision, also those that do not count.

        Raises:
            SpaceError: 100,000 candidates were invalid; the rules that they broke are named.
        """
        blamed: Counter[str] = Counter()
        for _ in range(_DRAWS):
            params = {name: draw(distribution, rng) for name, distribution in self.decisions.items()}
            rule = self.broken(params)
            if rule is None:
                return params
            blamed[f"{rule.decision!r} ({rule.words})"] += 1
        worst = ", ".join(f"{words} in {100 * count / _DRAWS:.0f}%" for words, count in blamed.most_common(3))
        raise SpaceError(
            f"None of {_DRAWS} random candidates is valid: the rules contradict each other, or leave fewer than about "
            f"one in {_DRAWS // 3}. Broken were {worst}. Loosen a rule, or widen a decision."
        )


class _Seen(Mapping[str, Any]):
    """The decisions that count, as a condition sees them.

    Attributes:
        missed: whether it asked for another decision.
        whole: whether it asked for all of them, so that it may have missed one in a copy.
    """

    def __init__(self, among: Params, decisions: Collection[str]) -> None:
        self._among, self._decisions = among, decisions
        self.missed, self.whole = False, False

    def __getitem__(self, name: str) -> Any:
        if name not in self._among and name in self._decisions:
            self.missed = True
        return self._among[name]

    def __iter__(self) -> Iterator[str]:
        self.whole = True
        return iter(self._among)

    def __len__(self) -> int:
        return len(self._among)


def draw(distribution: BaseDistribution, rng: np.random.Generator) -> Any:
    """A value of a distribution, uniform over it (over the logarithm where it is logarithmic)."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[int(rng.integers(len(distribution.choices)))]
    return from_unit(distribution, float(rng.random()))


def from_unit(distribution: BaseDistribution, unit: float) -> Any:
    """The value at a place of [0, 1] in the range of an ordered distribution."""
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = float(distribution.low), float(distribution.high), distribution.step
    whole = isinstance(distribution, IntDistribution)
    if distribution.log:
        edge = 0.5 if whole else 0.0
        value = math.exp(math.log(low - edge) + unit * (math.log(high + edge) - math.log(low - edge)))
    elif step is not None:
        steps = math.floor((high - low) / step + 1e-9)
        value = low + min(math.floor(unit * (steps + 1)), steps) * step
    else:
        value = low + unit * (high - low)
    value = min(max(value, low), high)
    return round(value) if whole else value


def to_unit(distribution: BaseDistribution, value: float) -> float:
    """The place of a value in the range of an ordered distribution, as :func:`from_unit` reads it."""
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = float(distribution.low), float(distribution.high), distribution.step
    whole = isinstance(distribution, IntDistribution)
    if distribution.log:
        edge = 0.5 if whole else 0.0
        width = math.log(high + edge) - math.log(low - edge)
        unit = (math.log(value) - math.log(low - edge)) / width if width else 0.5
    elif step is not None:
        unit = ((value - low) / step + 0.5) / (math.floor((high - low) / step + 1e-9) + 1)
    else:
        unit = (value - low) / (high - low) if high > low else 0.5
    return min(max(unit, 0.0), 1.0)


def values(distribution: BaseDistribution) -> list[Any]:
    """All values of a distribution, of which :func:`_count` says that there are finitely many."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    count = int(_count(distribution))
    return [from_unit(distribution, (place + 0.5) / count) for place in range(count)]


def _count(distribution: BaseDistribution) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if distribution.single():
        return 1
    return (
        math.inf
        if distribution.step is None
        else math.floor((distribution.high - distribution.low) / distribution.step + 1e-9) + 1
    )


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a value is one of a distribution's; of an ordered one's are numbers alone, a whole 3.0 among integers."""
    if isinstance(value, str | bool | np.bool_) and not isinstance(distribution, CategoricalDistribution):
        return False
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except (ValueError, TypeError):
        return False


def _range(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(map(repr, distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    step = "" if distribution.step is None else f" in steps of {distribution.step}"
    return f"{distribution.low} to {distribution.high}{step}"
