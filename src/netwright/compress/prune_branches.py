"""Shallower residual networks: branches go, their skips stay."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from netwright.compress._held_items import held_items, loss_of
from netwright.compress._settings import check_count, check_number, check_weights, require_loss
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.graph import traced_branches, without_branches
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["PruneBranches"]

_GREEDY = 12  # branches up to which each removal is judged in the company of those before it


@dataclass(frozen=True)
class PruneBranches:
    r"""Takes residual branches out: where a network computes ``skip(x) + branch(x)``, ``skip(x)`` stays.

    Reach for it where the number of operations, and not their width, is what takes the time: small residual networks
    and transformers, above all after :class:`~netwright.compress.Prune` has made them thin. Blocks of convolutions,
    attention and feed-forward layers are branches alike; where the skip is a projection, the projection stays.

    Branches go one after the other, each time the one :math:`b` whose absence costs least,

    .. math:: b_t = \arg\min_b L(f \setminus \{b_1, \dots, b_{t-1}, b\})

    with the loss :math:`L` on ``items`` training items. Of more than twelve branches, all are ordered by their loss
    alone.

    Args:
        drop: which branches go: their share in (0, 1], rounded and at least one, or their names as :meth:`plan` has
            them.
        items: training items on which the losses are taken.

    Raises:
        TransformError: a setting outside its range; on a call, a name that is no branch, weights that are not finite,
            a task without a loss where the choice needs it.
        NothingToPruneError: on a call, a network without residual branches.
        TraceError: on a call, a model that cannot be traced.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         x = x + self.first(x).relu()
        ...         return x + self.second(x).relu()
        >>> split = lambda: TensorDataset(torch.rand(8, 4), torch.zeros(8).long())
        >>> data = Data(split(), split(), split())
        >>> task = Task("tiny", Residual(), data, nn.functional.cross_entropy, lambda o, t: 0.0)
        >>> shallow = PruneBranches(["first"])(Residual(), task)
        >>> [name for name, _ in shallow.named_parameters()]
        ['second.weight', 'second.bias']

    Source: layer pruning, as in the comparison of paper 100 (Kim, El Halabi, Ji and Song, "LayerMerge", 2024, arXiv
        2406.12837), for any sum with a skip.

    Cost: a trace, and with :math:`n` branches to choose from :math:`n (n + 1) / 2` evaluations of ``items`` items, at
        most 78, :math:`n` above twelve; none where names are given. Memory: a copy of the model.
    """

    drop: float | Sequence[str] = 0.5
    items: int = 256

    def __post_init__(self) -> None:
        if isinstance(self.drop, str):
            raise TransformError(f"PruneBranches.drop must be a share or a sequence of names; write [{self.drop!r}].")
        if isinstance(self.drop, Sequence):
            object.__setattr__(self, "drop", tuple(self.drop))
            if not self.drop:
                raise TransformError("PruneBranches.drop names no branch. Name at least one, or give a share.")
        else:
            check_number(self, "drop", self.drop, high=1.0, above=True)
        check_count(self, "items", self.items)

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """A copy of ``model`` without the branches, as a graph with its parameter names, in eval mode.

        Args:
            model: any module that ``torch.export`` traces.
            task: gives example inputs; its loss and training split where branches are to be chosen.
            budget: not needed, nothing is trained.
            seed: draws the items.
            progress: told how far it is.
        """
        report = progress or (lambda fraction, what: None)
        check_weights(self, model)
        report(0.0, "tracing")
        traced, found = _traced(model, task)
        if isinstance(self.drop, Sequence):
            names = self._known(found, self.drop)
        else:
            count = max(1, round(self.drop * len(found)))
            names = self._order(model, task, traced, found, count, seed, report)
        made = without_branches(model, traced, names)
        report(1.0, f"removed {len(names)} of {len(found)} branches")
        return made

    def plan(self, model: nn.Module, task: Task, *, seed: int = 0, progress: Progress | None = None) -> list[str]:
        """All branches by name, those first that the network misses least.

        Args:
            model: as in a call.
            task: as in a call.
            seed: as in a call.
            progress: told how far it is.
        """
        check_weights(self, model)
        traced, found = _traced(model, task)
        return self._order(model, task, traced, found, len(found), seed, progress or (lambda fraction, what: None))

    def _known(self, found: Sequence[str], wanted: Sequence[str]) -> list[str]:
        for name in wanted:
            if name not in found:
                raise TransformError(f"PruneBranches.drop names no branch {name!r}; known are {', '.join(found)}.")
        return list(wanted)

    def _order(
        self,
        model: nn.Module,
        task: Task,
        traced: fx.GraphModule,
        found: Sequence[str],
        count: int,
        seed: int,
        report: Progress,
    ) -> list[str]:
        require_loss(self, task)
        held = held_items(task, self.items, seed)
        left = list(found)
        chosen: list[str] = []
        done, total = 0, sum(range(len(left) - count + 1, len(left) + 1)) if len(left) <= _GREEDY else len(left)
        while len(chosen) < count:
            losses = {}
            for name in left:
                losses[name] = loss_of(without_branches(model, traced, [*chosen, name]), task, held)
                done += 1
                report(0.1 + 0.8 * min(1.0, done / total), f"loss without {name}")
            ranked = sorted(left, key=losses.__getitem__)
            chosen += ranked[:1] if len(found) <= _GREEDY else ranked[:count]
            left = [name for name in left if name not in chosen]
        return chosen


def _traced(model: nn.Module, task: Task) -> tuple[fx.GraphModule, list[str]]:
    """The graph of a model and the names of its branches."""
    module, found = traced_branches(model, task.example())
    if not found:
        raise NothingToPruneError(
            f"PruneBranches: {type(model).__name__} has no residual branch, that is, no sum of an activation and "
            "something that layers make of it. Leave this step out, or take Prune or LayerMerge."
        )
    return module, [branch.name for branch in found]
