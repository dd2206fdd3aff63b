"""What methods that train and remove units at once have in common: which units may go, how many, and held zeros."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from netwright.compress._groups import input_dim, without_excluded
from netwright.compress._settings import check_choice, check_ratio, check_weights, checked_paths
from netwright.compress._unit_vectors import Places, UnitVectors
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.fit import StepHook
from netwright.core.graph import Graph, Group, Place, trace
from netwright.core.graph.agreement import difference
from netwright.core.optimization import make_schedule
from netwright.core.recipe import Recipe, resolve
from netwright.core.task import Task

__all__ = [
    "Goal",
    "Plan",
    "Scope",
    "Structured",
    "UnitHook",
    "check_structured",
    "goal_of",
    "plan",
    "producing",
    "step_sizes",
]

Scope = Literal["global", "layer"]
_ROUNDING = 1e-9  # 0.29 * 100 is a little less than 29
_AGREES = 1e-3


class Shared(Protocol):
    """The settings that say how many units go."""

    @property
    def ratio(self) -> float: ...

    @property
    def scope(self) -> Scope: ...


class Structured(Shared, Protocol):
    """The settings that all methods of this kind share."""

    @property
    def exclude(self) -> Sequence[str]: ...

    @property
    def start(self) -> float: ...

    @property
    def stop(self) -> float: ...


def check_structured(owner: Structured) -> None:
    """Check the shared settings and make ``exclude`` a tuple.

    Raises:
        TransformError: a setting outside its range.
    """
    object.__setattr__(owner, "exclude", checked_paths(owner, "exclude", owner.exclude))
    check_ratio(owner, "ratio", owner.ratio, what="removes half of the units")
    check_choice(owner, "scope", owner.scope, get_args(Scope))
    check_ratio(owner, "start", owner.start, what="begins to prune after half of the training", zero=True)
    check_ratio(owner, "stop", owner.stop, what="has pruned after half of the training")
    if owner.stop <= owner.start:
        raise TransformError(f"{type(owner).__name__}.stop must be above start={owner.start!r}, got {owner.stop!r}.")


@dataclass(frozen=True)
class Goal:
    """How many units are to go.

    Args:
        counts: from each group; None where only the total is fixed.
        total: from all groups together.
    """

    counts: Mapping[str, int] | None
    total: int

    def lowest(self, scores: Mapping[str, Tensor], share: float = 1.0) -> dict[str, Tensor]:
        """For each group ``(size,)`` whether a unit is among those of lowest score that are to go.

        The unit of highest score stays in every group. Of equal scores the first go first.

        Args:
            scores: ``(size,)`` for each group; minus infinity for units that are gone already.
            share: of the units that are to go.
        """
        if self.counts is not None:
            return {name: _lowest(score, round(share * self.counts[name])) for name, score in scores.items()}
        guarded = [score.double().index_fill(0, score.argmax(), torch.inf) for score in scores.values()]
        lowest = _lowest(torch.cat(guarded), round(share * self.total))
        parts = torch.split(lowest, [len(score) for score in guarded])
        return dict(zip(scores, parts, strict=True))


def _lowest(scores: Tensor, count: int) -> Tensor:
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[torch.argsort(scores.cpu(), stable=True)[:count]] = True
    return mask


def goal_of(owner: Shared, groups: Sequence[Group]) -> Goal:
    """``floor(ratio * size)`` units of each group, or of all groups together; one stays in each.

    Raises:
        TransformError: a ratio so large or so small that it cannot be met.
    """
    sizes = {group.name: group.size for group in groups}
    name, total = type(owner).__name__, sum(sizes.values())
    if owner.scope == "layer":
        counts = {group: int(owner.ratio * size + _ROUNDING) for group, size in sizes.items()}
        goal = Goal(counts, sum(counts.values()))
        least = 1.0 / max(sizes.values())
    else:
        goal = Goal(None, int(owner.ratio * total + _ROUNDING))
        least = 1.0 / total
    if goal.total > total - len(sizes):
        raise TransformError(
            f"{name}.ratio={owner.ratio:g} is out of reach: with one unit left in each of the {len(sizes)} groups at "
            f"most {(total - len(sizes)) / total:.4f} of the {total} units can go. Lower the ratio."
        )
    if goal.total == 0:
        raise TransformError(
            f"{name}.ratio={owner.ratio:g} would remove no unit; the smallest ratio that removes one is {least:.4f}."
        )
    return goal


@dataclass(frozen=True)
class Plan:
    """A traced model, its zero-invariant groups, what produces their units, and how many are to go."""

    graph: Graph
    groups: Sequence[Group]
    places: Places
    goal: Goal


def plan(owner: Structured, model: nn.Module, task: Task) -> Plan:
    """Trace ``model`` and find what ``owner`` may remove.

    Only exact groups are taken: of others zeroing a unit is not removing it.

    Raises:
        TransformError: weights that are not finite, an unknown name in ``exclude``, or a ratio that cannot be met.
        NothingToPruneError: no group is left.
    """
    check_weights(owner, model)
    graph = trace(model, task.example())
    groups = [group for group in without_excluded(owner, graph, owner.exclude) if group.exact]
    if not groups:
        raise NothingToPruneError(
            f"{type(owner).__name__}: of the {len(graph.groups)} groups of this model exclude={list(owner.exclude)!r} "
            "leaves none whose units can be zeroed without changing the others. Prune(inexact=True) takes those."
        )
    goal = goal_of(owner, groups)
    return Plan(graph, groups, producing(graph, model, groups, task), goal)


def producing(graph: Graph, model: nn.Module, groups: Sequence[Group], task: Task) -> dict[str, list[Place]]:
    """For each group the parameter entries that produce its units: zero there, a unit puts out nothing.

    That is what is not the input side of a matrix or kernel. Where zeros there do not suffice (batch norm without
    affine parameters), it is all entries that belong to the units.
    """
    shapes = {name: value.ndim for name, value in model.named_parameters(remove_duplicate=False)}
    found: dict[str, list[Place]] = {}
    for group in groups:
        known = [place for place in group.places if place.parameter in shapes]
        makers = [p for p in known if shapes[p.parameter] == 1 or p.dim != input_dim(model, p)]
        units = list(range(group.size // 2))
        copy = deepcopy(model)
        gone = torch.arange(group.size) < len(units)
        UnitVectors(copy, {group.name: makers}).multiply({group.name: (~gone).double()})
        same = makers and not difference(graph.zero(model, {group.name: units}), copy, task.example(), _AGREES)
        found[group.name] = makers if same else known
    return found


class UnitHook(StepHook):
    """Keeps units that are gone at zero while a network is trained.

    Args:
        vectors: of the model that is trained.
        plan: which groups, and how many of their units are to go.
    """

    def __init__(self, vectors: UnitVectors, plan: Plan) -> None:
        self.vectors, self.goal = vectors, plan.goal
        self.gone = {group.name: torch.zeros(group.size, dtype=torch.bool) for group in plan.groups}

    def before_step(self, step: int, total: int) -> None:
        """The gradients of units that are gone become zero."""
        self.vectors.multiply_gradients(self._kept())

    def after_step(self, step: int, total: int) -> None:
        """Units that are gone become zero."""
        self.hold()

    def hold(self) -> None:
        """Set units that are gone to zero."""
        self.vectors.multiply(self._kept())

    def finish(self) -> None:
        """Let the shortest vectors go until as many units are gone as are to go."""
        norms = {name: vector.norm(dim=1).double().cpu() for name, vector in self.vectors.read().items()}
        self.gone = self.goal.lowest(self.without_gone(norms))
        self.hold()

    def without_gone(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores with minus infinity for units that are gone."""
        return {name: score.masked_fill(self.gone[name], -torch.inf) for name, score in scores.items()}

    def units(self) -> dict[str, list[int]]:
        """For each group that loses any, the units that are gone."""
        return {name: mask.nonzero().flatten().tolist() for name, mask in self.gone.items() if bool(mask.any())}

    def _kept(self) -> dict[str, Tensor]:
        return {name: (~mask).double() for name, mask in self.gone.items() if bool(mask.any())}


def step_sizes(recipe: Recipe, total: int) -> list[float]:
    """The learning rate of each of ``total`` iterations by a recipe.

    Example:
        >>> step_sizes(Recipe(optimizer_settings={"lr": 0.5}, schedule=None), 2)
        [0.5, 0.5]
    """
    if total == 0:
        return []
    rate = recipe.optimizer_settings.get("lr")
    if rate is None:
        given = inspect.signature(resolve(recipe.optimizer)).parameters.get("lr")
        rate = 1.0 if given is None else given.default
    rate = float(rate) if isinstance(rate, int | float) else 1.0
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate, momentum=0.9)
    schedule = make_schedule(recipe, stand_in, total)
    sizes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's reminder to step the optimizer first
        for _ in range(total):
            sizes.append(float(stand_in.param_groups[0]["lr"]))
            if schedule is not None:
                schedule.step()
    return sizes
