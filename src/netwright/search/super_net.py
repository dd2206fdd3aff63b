"""Super-networks: one set of weights from which every candidate of a space is cut."""

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from torch import Tensor, nn
from torch.func import functional_call

from netwright.core.batch_statistics import reestimate
from netwright.core.data import batches
from netwright.core.errors import SettingError
from netwright.core.fit import fit
from netwright.core.graph import trace, traced_branches, without_branches
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress
from netwright.search._super_net_parts import branch_parts, unit_order
from netwright.search.space import Params, SearchSpace

__all__ = ["Elastic", "SuperNet"]

_BATCH = 128


@runtime_checkable
class Elastic(Protocol):
    """A super-network, of Netwright's class or of a user's own: a space, and the network of each candidate."""

    @property
    def space(self) -> SearchSpace:
        """The candidates."""
        ...

    def extract(self, params: Params) -> nn.Module:
        """The network of a candidate, an ordinary module with weights of its own.

        Args:
            params: its decisions, as ``space`` has them.
        """
        ...


class SuperNet:
    r"""Makes any traceable network elastic: sub-networks of fewer units and fewer residual branches share its weights.

    Reach for it to search widths and depths without training every candidate: the super-network is trained once, and
    :meth:`extract` cuts a candidate's weights out of it. A super-network of one's own needs only what
    :class:`Elastic` says.

    Every group of coupled units (channels, heads, hidden units; see :func:`netwright.core.graph.trace`) has a decision
    ``width/GROUP``, how many of its units there are, and every residual branch a decision ``branch/NAME``, whether it
    is there. A width of :math:`k` keeps the :math:`k` units of the greatest length in the given weights,

    .. math:: \mathrm{top}_k \Big( \sum_{p} \lVert W_{p,u} \rVert^2 \Big)

    over the parameters :math:`p` that a unit :math:`u` is part of, so that smaller sub-networks lie within larger ones.
    In training (:meth:`fit`) every iteration draws one sub-network: in turn the whole one, the smallest one, and two
    random ones.

    Args:
        model: the largest network, trained or not; it is copied.
        task: its example input, data, loss and recipe.
        least: smallest width, as a share of the whole.
        levels: widths for each group, equally spaced, the whole one included; a few more or fewer in small groups.
        depth: whether branches are decisions too.
        items: training items on which batch norms of an extracted network are set, in equal batches of at most 128; it
            is rounded up to fill them.

    Raises:
        SettingError: a setting out of its range, or a network in which nothing is elastic.
        TraceError: a model that cannot be traced.

    Example:
        >>> from netwright.core.task import load_task
        >>> task = load_task("breast-cancer")
        >>> net = SuperNet(task.build(seed=0), task, least=0.5, levels=2)
        >>> {name: (way.low, way.high, way.step) for name, way in net.space.decisions.items()}
        {'width/0': (128, 256, 128), 'width/2': (128, 256, 128)}
        >>> net.extract({"width/0": 128, "width/2": 256})[0]
        Linear(in_features=30, out_features=128, bias=True)

    Source: papers 2 and 289 (Sarah et al., 2022, arXiv 2202.12954; Cummings et al., 2022, arXiv 2205.10358), whose
        system searches given super-networks; sub-networks that share weights by slicing, and the sandwich of largest,
        smallest and random ones in training, are those of slimmable and once-for-all networks (Yu and Huang, 2019,
        arXiv 1903.05134; Cai et al., 2020, arXiv 1908.09791).

    Differs: the elastic parts are found in the traced graph, so that a super-network need not be written by hand. One
        sub-network an iteration instead of several whose gradients are added, and no distillation from the whole one.
        Kernel sizes are not elastic.

    Cost: an iteration of :meth:`fit` costs that of the whole network, since units are masked, not cut; :meth:`extract`
        takes a copy, a shrink and its checks, a second trace where branches go, and a pass over ``items`` items where
        there are batch norms. Memory: a copy of the network and a mask for each of its parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        least: float = 0.25,
        levels: int = 4,
        depth: bool = True,
        items: int = 512,
    ) -> None:
        if not 0 < least < 1:
            raise SettingError(f"least must lie in (0, 1), got {least!r}. 0.25 allows a quarter of the units.")
        for name, value, low in (("levels", levels, 2), ("items", items, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise SettingError(f"{name} must be an integer of at least {low}, got {value!r}.")
        self.model = copy.deepcopy(model).eval()
        self._task, self._items = task, items
        self._graph = trace(self.model, task.example(2))
        self._orders = {group.name: unit_order(self.model, group) for group in self._graph.groups if group.exact}
        self._branches = branch_parts(self.model, self._graph, task.example(2)) if depth else ()
        self._space = self._elastic(least, levels)

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; the traced graph cannot be sent, and is traced anew there."""
        return {name: value for name, value in vars(self).items() if name != "_graph"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._graph = trace(self.model, self._task.example(2))

    @property
    def space(self) -> SearchSpace:
        """The sub-networks."""
        return self._space

    def _elastic(self, least: float, levels: int) -> SearchSpace:
        decisions: dict[str, BaseDistribution] = {}
        around: dict[str, tuple[str, ...]] = {}  # the branches that a decision lies in
        for branch in self._branches:
            decisions[branch.decision] = CategoricalDistribution((True, False))
            wider = (other for other in self._branches if branch.parameters and branch.parameters < other.parameters)
            around[branch.decision] = tuple(other.decision for other in wider)
        for name, order in self._orders.items():
            size = len(order)
            step = max(1, round(size * (1 - least) / (levels - 1)))
            count = (size - max(1, round(least * size))) // step
            if count:
                decisions[f"width/{name}"] = IntDistribution(size - count * step, size, step=step)
                around[f"width/{name}"] = tuple(each.decision for each in self._branches if name in each.groups)
        if not decisions:
            stopped = "; ".join(f"{item.name}: {item.operation} ({item.reason})" for item in self._graph.blocked[:5])
            raise SettingError(
                f"Nothing in {type(self.model).__name__} is elastic: it has no residual branch, and no group of units "
                f"that can be cut exactly. What stood in the way: {stopped or 'no layers'}."
            )
        return SearchSpace(decisions, active={name: _Present(within) for name, within in around.items() if within})

    def largest(self) -> dict[str, Any]:
        """The whole network as a candidate."""
        return {name: True if _is_choice(way) else _bounds(way)[1] for name, way in self._space.decisions.items()}

    def smallest(self) -> dict[str, Any]:
        """The least of everything."""
        return {name: False if _is_choice(way) else _bounds(way)[0] for name, way in self._space.decisions.items()}

    def extract(self, params: Params) -> nn.Module:
        """A sub-network with a copy of its share of the weights, its batch norms set by training items.

        Args:
            params: its decisions; those that do not count may be left out.

        Raises:
            SpaceError: no candidate of the space; the decision to blame is named.
        """
        self._space.check(params)
        gone, units = self._taken(params)
        small: nn.Module = self._graph.shrink(self.model, units) if units else copy.deepcopy(self.model)
        if gone:
            small = without_branches(small, traced_branches(small, self._task.example(2))[0], gone)
        generator = torch.Generator().manual_seed(0)
        count = math.ceil(self._items / _BATCH)
        size = math.ceil(self._items / count)
        drawn = batches(self._task.data.train, size, generator=generator, drop_last=True)
        reestimate(small, (inputs for inputs, _ in itertools.islice(drawn, count)))
        return small.eval()

    def fit(self, recipe: Recipe | None = None, *, seed: int = 0, progress: Progress | None = None) -> None:
        """Train the shared weights, in place.

        Args:
            recipe: how; None is the task's.
            seed: draws batches and sub-networks.
            progress: told how far it is.

        Raises:
            NonFiniteLossError: a loss that is NaN or infinite.
            SettingError: a task that trains by its own ``fit``.
        """
        if self._task.fit is not None:
            raise SettingError("A super-network is trained by drawing sub-networks; the task's own fit= does not.")
        drawn = _Drawn(self.model, self, seed)
        fit(drawn, self._task, recipe or self._task.recipe, seed=seed, progress=progress, validate=False)
        self.model.eval()

    def masks(self, params: Params) -> dict[str, Tensor]:
        """Ones and zeros for every parameter that a sub-network leaves out in part; they broadcast.

        With its parameters so multiplied the super-network computes what the sub-network does, but for branches that do
        not end in a layer or norm with parameters, and for the statistics of batch norms.

        Args:
            params: its decisions; those that do not count may be left out.

        Raises:
            SpaceError: no candidate of the space; the decision to blame is named.
        """
        self._space.check(params)
        return self._masks(params)

    def _masks(self, params: Params) -> dict[str, Tensor]:
        gone, units = self._taken(params)
        found = self._graph.masks(units) if units else {}
        for branch in self._branches:
            if branch.name in gone:
                found |= {name: torch.zeros(()) for name in branch.parameters}
        return found

    def _taken(self, params: Params) -> tuple[list[str], dict[str, list[int]]]:
        """The branches that go, and the units that go elsewhere."""
        gone = [branch for branch in self._branches if not params.get(branch.decision, True)]
        within = {name for branch in gone for name in branch.groups}
        units = {}
        for name, order in self._orders.items():
            width = int(params.get(f"width/{name}", len(order)))
            if name not in within and width < len(order):
                units[name] = sorted(order[width:])
        return [branch.name for branch in gone], units


@dataclass(frozen=True)
class _Present:
    """Whether branches are all there."""

    decisions: tuple[str, ...]

    def __call__(self, params: Mapping[str, Any]) -> bool:
        return all(params[name] for name in self.decisions)


class _Drawn(nn.Module):
    """The super-network in training: a sub-network in every iteration."""

    def __init__(self, net: nn.Module, owner: SuperNet, seed: int) -> None:
        super().__init__()
        self.net = net
        self._masks, self._space = owner._masks, owner.space
        self._ends: tuple[dict[str, Tensor], ...] = ({}, owner.masks(owner.smallest()))
        self._rng, self._count = torch.Generator().manual_seed(seed), 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the sub-network of this iteration computes; in evaluation, what the whole one does."""
        if not self.training:
            return self.net(*args, **kwargs)
        masks = self._ends[self._count] if self._count < 2 else self._masks(self._random())
        self._count = (self._count + 1) % 4
        weights = dict(self.net.named_parameters())
        masked = {name: weights[name] * mask.to(weights[name].device) for name, mask in masks.items()}
        return functional_call(self.net, masked, args, kwargs)

    def _random(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, way in self._space.decisions.items():
            low, high, step = (0, 1, 1) if _is_choice(way) else _bounds(way)
            value = low + step * int(torch.randint((high - low) // step + 1, (), generator=self._rng))
            found[name] = bool(value) if _is_choice(way) else value
        return found


def _is_choice(way: BaseDistribution) -> bool:
    return isinstance(way, CategoricalDistribution)


def _bounds(way: BaseDistribution) -> tuple[int, int, int]:
    assert isinstance(way, IntDistribution)
    return way.low, way.high, way.step
