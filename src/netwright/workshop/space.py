"""The space of steps that a run searches."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from netwright.core.errors import TargetError
from netwright.search import SearchSpace
from netwright.workshop.point import Step, key

__all__ = ["STEPS", "Droppable", "Space", "check_steps", "parse_steps", "weight_bits"]

STEPS = ("prune", "branches", "int8", "int4", "codebooks")
"""What ``optimize`` may do to a network, in the order in which it is done."""

_SIZE_ONLY = ("int4", "codebooks")  # steps
_LADDER = (
    *((8, 0.0), (0, 0.0), (12, 0.0), (4, 1.0), (4, 0.0)),
    *((8, 0.5), (4, 0.5), (16, 0.0), (14, 0.0)),
)  # levels of thinness, and shares of the branches that go
_LEVEL = 0.25  # a level is so many octaves
_SPREAD = 1.0
_BLOCK = 8  # channels that kernels work on together
_BOTH_FORMS = 5  # rungs of the ladder that are tried in two ways of writing weights
_COUNTED = 2  # the same, where no target is a latency
_BITS = (4, 3)  # of an index into a codebook
_WHOLE, _NARROW = 8, 4  # bits of an integer weight; it is computed with as 8 either way


@dataclass(frozen=True)
class Droppable:
    """A residual branch that may go.

    Args:
        name: as :class:`~netwright.compress.PruneBranches` has it.
        groups: the groups of units that lie within it, and go with it.
    """

    name: str
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Space:
    """Structured pruning of every group, residual branches that go, then integers, codebooks or neither.

    The share of group ``g`` that is kept is ``2**(offset_g - thin / 4)``, cut to the range that leaves at least one
    unit: one number says how small the network becomes, and one for each group says where. Of groups of 16 units and
    more, multiples of 8 are kept, or 4: kernels work on blocks, and a network with convolutions of 15 channels took
    twice as long as with 16 (float, AVX2). The saliency that ranks the units is a choice too. Of the branches, the
    first ``branches`` go.

    Args:
        groups: name and size of every group that may be pruned.
        int8: settings of the quantization step that this machine runs fastest, or None where it
            gains nothing.
        branches: those that may go, the most dispensable first.
        codebooks: whether weights may become indices into codebooks, which saves size only.
        widths: bits of the weights that integers may be tried with; fewer than 8 save size only.
        free: groups of which any number may be kept, as of attention heads.
        gradients: whether units may be ranked by a loss's gradients, which a task that trains by its own fit may lack.
        thinnest: largest ``thin``; 20 keeps one unit of 32.

    Example:
        >>> space = Space((("conv1", 8), ("conv2", 16)), int8={"activation": "uint8"})
        >>> [step.method for step in space.steps({"thin": 4, "offset/conv1": -1.0, "int8": True})]
        ['netwright.compress:Prune', 'netwright.compress:Int8']
        >>> space.steps({"thin": 4, "offset/conv1": -1.0})[0].settings["ratios"]
        {'conv1': 0.75, 'conv2': 0.5}
    """

    groups: tuple[tuple[str, int], ...]
    int8: Mapping[str, Any] | None
    branches: tuple[Droppable, ...] = ()
    codebooks: bool = False
    widths: tuple[int, ...] = (8,)
    free: frozenset[str] = frozenset()
    gradients: bool = True
    thinnest: int = 20

    def offered(self) -> tuple[str, ...]:
        """Those of :data:`STEPS` that may be proposed."""
        whole = self.int8 is not None
        offers = {
            "prune": bool(self.groups),
            "branches": bool(self.branches),
            "int8": whole and _WHOLE in self.widths,
            "int4": whole and _NARROW in self.widths,
            "codebooks": self.codebooks,
        }
        return tuple(name for name in STEPS if offers[name])

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """What may be proposed for each parameter."""
        found: dict[str, optuna.distributions.BaseDistribution] = {}
        if self.groups:
            found["thin"] = optuna.distributions.IntDistribution(0, self.thinnest)
            if self.gradients:
                found["saliency"] = optuna.distributions.CategoricalDistribution(["magnitude", "taylor"])
            for name, _ in self.groups:
                found[f"offset/{name}"] = optuna.distributions.FloatDistribution(-_SPREAD, _SPREAD, step=_LEVEL)
        if self.branches:
            found["branches"] = optuna.distributions.IntDistribution(0, len(self.branches))
        if self.int8 is not None:
            found["int8"] = optuna.distributions.CategoricalDistribution([True, False])
            if len(self.widths) > 1:
                found["bits"] = optuna.distributions.CategoricalDistribution(self.widths)
        if self.codebooks:
            found["codebooks"] = optuna.distributions.CategoricalDistribution([0, *_BITS])
        return found

    def search_space(self) -> SearchSpace:
        """The same with its conditions: what lies in a branch that goes, and bits of other forms, do not count."""
        active: dict[str, Callable[[Mapping[str, Any]], bool]] = {}
        known = {name for name, _ in self.groups}
        for rank, branch in enumerate(self.branches):
            for name in known.intersection(branch.groups):
                active[f"offset/{name}"] = _Reaches("branches", rank)
        if self.codebooks and self.int8 is not None:
            active["codebooks"] = _is_float
        if self.int8 is not None and len(self.widths) > 1:
            active["bits"] = _is_integer
        return SearchSpace(self.distributions(), active=active)

    def steps(self, values: Mapping[str, Any]) -> tuple[Step, ...]:
        """The steps that a proposal stands for. Parameters left out are neutral."""
        gone = self.branches[: values.get("branches", 0)]
        lost = {name for branch in gone for name in branch.groups}
        ratios = {}
        for name, size in self.groups:
            share = 2.0 ** (values.get(f"offset/{name}", 0.0) - _LEVEL * values.get("thin", 0))
            removed = size - (_whole(share * size, size) if name in self.free else _blocks(share * size, size))
            if removed and name not in lost:
                ratios[name] = removed / size
        found = []
        if ratios:
            settings = {"ratios": ratios, "saliency": values.get("saliency", "magnitude")}
            found.append(Step("netwright.compress:Prune", settings))
        if gone:
            found.append(Step("netwright.compress:PruneBranches", {"drop": [branch.name for branch in gone]}))
        if self.int8 is not None and values.get("int8", False):
            bits = values.get("bits", self.widths[0])
            narrow = {} if bits == _WHOLE else {"weight_bits": bits}
            found.append(Step("netwright.compress:Int8", {**self.int8, **narrow}))
        elif self.codebooks and values.get("codebooks", 0):
            found.append(Step("netwright.compress:Codebooks", {"bits": values["codebooks"], "groups": 1}))
        return tuple(found)

    def ladder(self, form: int = 0, *, counted: bool = False) -> Sequence[dict[str, Any]]:
        """Proposals to begin with: uniformly thinner and shallower, from the middle outwards.

        The second rung is the whole network, which a short run should have tried: rounded only, it mostly keeps the
        score. The first rung is tried in all forms, the next ones in two, and the others in that of number ``form``
        among :meth:`forms`. Where the targets are ``counted`` fewer rungs show which form is best; a latency depends on
        how thin a network is.
        """
        forms = self.forms()
        if not self.groups and not self.branches:
            return forms[:-1] if len(forms) > 1 else forms
        neutral: dict[str, Any] = {}
        if self.groups:
            ranked = {"saliency": "magnitude"} if self.gradients else {}
            neutral = {**ranked, **{f"offset/{name}": 0.0 for name, _ in self.groups}}
        rungs: list[dict[str, Any]] = []
        for level, depth in _LADDER:
            rung = {"thin": level} if self.groups else {}
            if self.branches:
                rung["branches"] = round(depth * len(self.branches))
            possible = level <= self.thinnest and (bool(self.branches) or not depth)
            if possible and rung not in rungs and (self.groups or rung["branches"]):
                rungs.append(rung)
        found: dict[str, dict[str, Any]] = {}  # by what is done: two levels may keep as many blocks
        for number, rung in enumerate(rungs):
            count = len(forms) if number == 0 else 2
            for way in forms[:count] if number < (_COUNTED if counted else _BOTH_FORMS) else [forms[form]]:
                values = {**rung, **neutral, **way}
                found.setdefault(key(self.steps(values)), values)
        return list(found.values())

    def forms(self) -> list[dict[str, Any]]:
        """Ways to write the weights, the most promising first, floats last."""
        none = {"codebooks": 0} if self.codebooks else {}
        choice = self.int8 is not None and len(self.widths) > 1
        bits = [{"bits": width} for width in self.widths] if choice else [{}]
        floats = {} if self.int8 is None else {"int8": False, **bits[0]}
        forms = [] if self.int8 is None else [{"int8": True, **width, **none} for width in bits]
        if self.codebooks:
            forms.append({**floats, "codebooks": _BITS[0]})
        return [*forms, {**floats, **none}]

    def size(self) -> float:
        """Base-10 logarithm of the number of different proposals, ratios counted in whole units."""
        count = sum(math.log10(max(size, 1)) for _, size in self.groups)
        count += math.log10(2) if self.groups and self.gradients else 0.0
        return count + math.log10(len(self.branches) + 1) + math.log10(len(self.forms()) + self.codebooks)


def weight_bits(steps: Sequence[str], sized: bool) -> tuple[int, ...]:
    """Bits of integer weights that a run tries: fewer than 8 where a target speaks of size.

    Example:
        >>> weight_bits(("prune", "int8", "int4"), sized=True), weight_bits(("int4",), sized=False)
        ((8, 4), ())
    """
    whole = (_WHOLE,) if "int8" in steps else ()
    return (*whole, _NARROW) if "int4" in steps and sized else whole


def _whole(wanted: float, size: int) -> int:
    return min(size, max(1, round(wanted)))


def _blocks(wanted: float, size: int) -> int:
    """The nearest number of units that fills blocks, half a block being the smallest; all where all are wanted."""
    if wanted >= size:
        return size
    for block in (_BLOCK, _BLOCK // 2):
        if size >= 2 * _BLOCK and wanted >= 0.75 * block:
            return min(size, block * round(wanted / block))
    return _whole(wanted, size)


def check_steps(steps: Sequence[str] | None, sized: bool) -> None:
    """Steps of which at least one does something for the targets; None stands for all.

    Raises:
        TargetError: only steps that save nothing but size, and no target that speaks of it.
    """
    if steps is not None and not sized and all(name in _SIZE_ONLY for name in steps):
        raise TargetError(
            f"{' and '.join(steps)} save size only, and no target speaks of it. Add one, as size<=0.1x, or name other "
            "steps too."
        )


@dataclass(frozen=True)
class _Reaches:
    """Whether a count does not go beyond a number."""

    name: str
    most: int

    def __call__(self, values: Mapping[str, Any]) -> bool:
        return bool(values.get(self.name, 0) <= self.most)


def _is_integer(values: Mapping[str, Any]) -> bool:
    return bool(values.get("int8", False))


def _is_float(values: Mapping[str, Any]) -> bool:
    return not values.get("int8", False)


def parse_steps(names: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of steps, as a sequence or with commas between, in the order of :data:`STEPS`; None stands for all.

    Raises:
        TargetError: an unknown name, or none at all.

    Example:
        >>> parse_steps("int8,prune")
        ('prune', 'int8')
    """
    if names is None:
        return None
    wanted = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    unknown = [name for name in wanted if name not in STEPS]
    if unknown or not wanted:
        said = f"{unknown[0]!r} is no step of optimize" if unknown else "No step is named"
        raise TargetError(f"{said}. Known are {', '.join(STEPS)}; leave the option out for all of them.")
    return tuple(name for name in STEPS if name in wanted)
