"""Structured pruning: whole channels, heads and hidden units are cut out of a network."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from netwright.compress._choose import Limits, choose_global, choose_layer
from netwright.compress._saliency import saliency_magnitude, saliency_taylor
from netwright.compress._savings import macs_per_unit
from netwright.compress._settings import check_choice, check_count, check_weights
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.graph import Graph, Group, trace
from netwright.core.randomness import isolated
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["Prune", "saliency_magnitude", "saliency_taylor"]

Scope = Literal["layer", "global"]
Count = Literal["units", "macs"]
Saliency = Literal["magnitude", "taylor"]


@dataclass(frozen=True)
class Prune:
    r"""Removes the units that matter least, so that every layer around them becomes smaller.

    Reach for it first when a network has to become faster: the result is an ordinary dense module with fewer channels,
    attention heads or hidden units, faster in every runtime. It is pure surgery, nothing is trained, whatever the
    budget: let :func:`netwright.core.fit.fit` recover the accuracy afterwards, with the original as teacher.

    Units are those of the groups that :func:`netwright.core.graph.trace` finds. Unit :math:`u` of a group has slices
    :math:`W_{p,u}` of the parameters :math:`p` around it, and matters by

    .. math:: \text{magnitude: } s_u = \sqrt{\textstyle\sum_p \lVert W_{p,u} \rVert^2} \qquad
              \text{taylor: } s_u = \frac1B \sum_{b=1}^B \Big| \sum_p \Big\langle W_{p,u},
              \frac{\partial L_b}{\partial W_{p,u}} \Big\rangle \Big|

    with :math:`L_b` the task's loss on batch :math:`b` of the training split. With ``scope="layer"`` each group loses
    ``floor(ratio * size)`` units, lowest first. With ``scope="global"`` scores are divided by their group's mean and
    the lowest of all groups go, until ``ratio`` of all units is reached, or with ``count="macs"``, taken by score per
    saved multiply-accumulate operation, ``ratio`` of all operations that single units account for. An operation
    between two pruned groups counts for both.

    Args:
        ratios: share of the units to remove, in [0, 1): one for all groups, or by group name, where groups that are not
            named stay whole.
        scope: "layer" applies ratios to each group, "global" one ratio to all of them together.
        saliency: "magnitude" needs no data, "taylor" reads ``batches`` batches. Neither is ahead throughout: try both.
        count: what a global ratio is a share of.
        exclude: names of groups to leave alone.
        keep_at_least: units that stay in every group.
        round_to: numbers of units that stay are rounded up to multiples of it (kernels for int8 like 4 or 8); a
            group that is smaller stays whole. Heads are not rounded.
        inexact: also prune groups whose removal changes statistics, as a residual stream under layer normalization.
        batches: batches that "taylor" reads.
        batch_size: items in each.

    Raises:
        TransformError: a setting outside its range; on a call, an unknown group, weights or gradients that are not
            finite, a global ratio out of reach, or ratios so small that no unit would go.
        NothingToPruneError: on a call, no group is left to prune.
        TraceError: on a call, a model that cannot be traced.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.rand(8, 4), torch.zeros(8).long())
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> task = Task("tiny", model, Data(split(), split(), split()), nn.functional.cross_entropy, lambda o, t: 0.0)
        >>> Prune(0.75)(model, task)
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )

    Cost: one trace, a copy of the model, and for "taylor" ``batches`` forward and backward passes.
    """

    ratios: float | Mapping[str, float] = 0.5
    scope: Scope = "layer"
    saliency: Saliency = "magnitude"
    count: Count = "units"
    exclude: Sequence[str] = ()
    keep_at_least: int = 1
    round_to: int = 1
    inexact: bool = True
    batches: int = 8
    batch_size: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.ratios, Mapping):
            object.__setattr__(self, "ratios", dict(self.ratios))
        if isinstance(self.exclude, str):
            raise TransformError(f"Prune.exclude must be a sequence of group names; write ({self.exclude!r},).")
        object.__setattr__(self, "exclude", tuple(self.exclude))
        for name, ratio in self.ratios.items() if isinstance(self.ratios, Mapping) else [("all groups", self.ratios)]:
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
                raise TransformError(
                    f"Prune.ratios for {name} must lie in [0, 1), got {ratio!r}. 0.5 removes half of the units."
                )
        for field, kinds in (("scope", Scope), ("saliency", Saliency), ("count", Count)):
            check_choice(self, field, getattr(self, field), get_args(kinds))
        for field in ("keep_at_least", "round_to", "batches", "batch_size"):
            check_count(self, field, getattr(self, field))
        if self.scope == "global" and isinstance(self.ratios, Mapping):
            raise TransformError("Prune.ratios must be one number with scope='global'; leave groups out with exclude.")

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """A copy of ``model`` without its least important units, in eval mode.

        Args:
            model: any module that ``torch.export`` traces.
            task: gives example inputs; its loss and training split where saliency is "taylor".
            budget: not needed, nothing is trained.
            seed: draws the batches for "taylor".
            progress: told how far it is.
        """
        report = progress or (lambda fraction, what: None)
        graph, units = self._plan(model, task, seed, report)
        total = sum(map(len, units.values()))
        report(0.9, f"removing {total} units")
        smaller = graph.shrink(model, units).eval()
        report(1.0, f"removed {total} of {sum(group.size for group in graph.groups)} units")
        return smaller

    def plan(self, model: nn.Module, task: Task, *, seed: int = 0) -> dict[str, list[int]]:
        """The units that a call would remove, for each group that loses any.

        Args:
            model: as in a call.
            task: as in a call.
            seed: as in a call.
        """
        return self._plan(model, task, seed, lambda fraction, what: None)[1]

    def _plan(self, model: nn.Module, task: Task, seed: int, report: Progress) -> tuple[Graph, dict[str, list[int]]]:
        check_weights(self, model)
        report(0.0, "tracing")
        with isolated(seed):
            inputs = task.example()
        graph = trace(model, inputs)
        groups = self._groups(graph)
        report(0.3, f"scoring by {self.saliency}")
        scores = self._scores(model, groups, task, seed, report)
        limits = {
            group.name: Limits(self.keep_at_least, 1 if group.kind == "heads" else self.round_to) for group in groups
        }
        if self.scope == "global":
            assert not isinstance(self.ratios, Mapping)
            costs = macs_per_unit(graph, groups) if self.count == "macs" else dict.fromkeys(scores, 1.0)
            chosen = choose_global(scores, costs, self.ratios, limits)
        else:
            chosen = choose_layer(scores, {group.name: self._ratio(group) for group in groups}, limits)
        units = {name: removed for name, removed in chosen.items() if removed}
        if not units and any(self._ratio(group) for group in groups):
            sizes = ", ".join(f"{group.name} has {group.size}" for group in groups[:4])
            raise TransformError(
                f"Prune would remove no unit: ratios={self.ratios!r}, keep_at_least={self.keep_at_least} and "
                f"round_to={self.round_to} leave every group whole ({sizes}). Raise the ratio or lower the others."
            )
        return graph, units

    def _ratio(self, group: Group) -> float:
        return self.ratios.get(group.name, 0.0) if isinstance(self.ratios, Mapping) else self.ratios

    def _groups(self, graph: Graph) -> list[Group]:
        """The groups to prune.

        Raises:
            TransformError: a group that is named but not there, or not to be pruned.
            NothingToPruneError: none is left.
        """
        known = {group.name: group for group in graph.require_groups()}
        named = list(self.ratios) if isinstance(self.ratios, Mapping) else []
        for field, names in (("ratios", named), ("exclude", self.exclude)):
            for name in names:
                if name not in known:
                    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
                    raise TransformError(f"Prune.{field} names no group {name!r}; the closest is {', '.join(close)!r}.")
        for name in named:
            if not self.inexact and not known[name].exact:
                raise TransformError(
                    f"Prune.ratios names the group {name!r}, whose removal changes statistics. Set inexact=True."
                )
        groups = [
            group
            for name, group in known.items()
            if name not in self.exclude and (group.exact or self.inexact) and (not named or name in named)
        ]
        if not groups:
            raise NothingToPruneError(
                f"Of the {len(known)} groups of this model exclude={list(self.exclude)!r} and inexact={self.inexact} "
                "leave none to prune."
            )
        return groups

    def _scores(
        self, model: nn.Module, groups: Sequence[Group], task: Task, seed: int, report: Progress
    ) -> dict[str, Tensor]:
        if self.saliency == "magnitude":
            return {group.name: saliency_magnitude(model, group) for group in groups}
        return saliency_taylor(
            model,
            groups,
            task,
            count=self.batches,
            batch_size=self.batch_size,
            seed=seed,
            told=lambda fraction: report(0.3 + 0.6 * fraction, "scoring by taylor"),
        )
