"""HESSO: units are scored while a network trains, and exactly the share asked for fades out."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from netwright.compress._settings import check_count, check_flag
from netwright.compress._sparse_recipe_masks import shared_epochs, steps_per_epoch
from netwright.compress._training import train
from netwright.compress._unit_plan import Plan, Scope, UnitHook, check_structured, plan
from netwright.compress._unit_saliency import unit_saliency
from netwright.compress._unit_vectors import UnitVectors
from netwright.core.randomness import isolated
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["HESSO"]


def _fade(step: int, steps: int) -> float:
    """What multiplies a fading unit in step ``step`` of ``steps``: ``(T - t - 1) / (T - t)``, so that 0 is reached."""
    return (steps - step - 1) / (steps - step)


@dataclass(frozen=True)
class HESSO:
    r"""Trains a network and removes exactly the share of units asked for, without a penalty to tune.

    Reach for it where a share of channels, heads and hidden units has to go and training is at hand: one setting,
    ``ratio``, and the result has it exactly. With ``corrective=True`` redundant units are identified in cycles, which
    costs some training and guards against removing units that only seem redundant, at high ratios above all.

    Units are scored on a batch by five criteria, each over its mean: length, length over the root of the number of
    entries, one minus the cosine between parameters and gradient, and two terms of Taylor's series. Between ``start``
    and ``stop`` of the training there are ``periods``. At the beginning of each the units whose scores were lowest, on
    average over the last ``window`` steps, join those that are to go, the same number in each period, and fade out
    after every step :math:`t` of the period's :math:`T`:

    .. math:: x_g \leftarrow \frac{T - t - 1}{T - t}\, \bar x_g

    where :math:`\bar x` is what the optimizer makes of :math:`x`. The other units train on. What is gone stays zero.

    With ``corrective=True`` (CRIC), the first half of that time belongs to at most ``cycles``. A cycle lets the set
    :math:`V` of the lowest :math:`K` units fade out as above, scoring all units at each step; then all weights are put
    back. :math:`V` of the next cycle are units that were among the lowest :math:`K` on the way and have never faded.
    When there are none, or after ``cycles``, the :math:`K` units whose scores are lowest on average over all steps go,
    and fade out over what is left of that time.

    Args:
        ratio: share of the units to remove, in (0, 1).
        scope: "layer" takes the share of each group; "global" counts units in all groups together, and may leave a
            group a single unit.
        corrective: identify redundant units in cycles.
        periods: in which units go, without ``corrective``.
        window: steps before a period whose scores count for it, at most those since the one before, without
            ``corrective``.
        cycles: at most, with ``corrective``.
        start: fraction of the training after which pruning begins.
        stop: fraction after which all units that are to go are gone, above ``start``.
        exclude: names of groups to leave whole.

    Raises:
        TransformError: a setting outside its range; on a call, a ratio that cannot be met, a name in ``exclude`` that
            no group has, weights that are not finite, or, to be trained, a task without a loss or one that trains by
            its own ``fit``.
        NothingToPruneError: on a call, no zero-invariant group is left.
        TraceError: on a call, a model that cannot be traced.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.rand(64, 4), torch.zeros(64).long())
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> task = Task("tiny", model, Data(split(), split(), split()), nn.functional.cross_entropy, lambda o, t: 0.0)
        >>> HESSO(0.75)(model, task, budget=4)
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )

    Source: 149. T. Chen, X. Qu, D. Aponte, C. Banbury, J. Ko, T. Ding, Y. Ma, V. Lyapunov, I. Zharkov, L. Liang. HESSO:
        Towards Automatic Efficient and User Friendly Any Neural Network Training and Pruning. 2024. arXiv:2409.09085.

    Differs: gradients are those of the loss, not the optimizer's directions. Scores are averaged over ``window`` steps,
        since those of one batch are noisy (the paper's: ``window=1``). One unit stays in every group. Restoring weights
        after a cycle restores the statistics of batch norms too, and leaves the optimizer's state. The loss measured on
        trial projections of whole layers, which the authors' code adds to the scores, is left out. A moving average and
        a parameterization of the recipe are left out of this training.

    Cost: the training that ``budget`` allows (None: the recipe's epochs); a pass over the pruned layers' weights and
        gradients at each step of a window, in cycles at every step, with a copy of the model. One trace, and a copy
        of the model for each group.
    """

    trains: ClassVar[bool] = True

    ratio: float = 0.5
    scope: Scope = "layer"
    corrective: bool = False
    periods: int = 5
    window: int = 20
    cycles: int = 3
    start: float = 0.1
    stop: float = 0.3
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_structured(self)
        check_count(self, "periods", self.periods)
        check_count(self, "window", self.window)
        check_count(self, "cycles", self.cycles)
        check_flag(self, "corrective", self.corrective)

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """A smaller, trained copy of ``model``, in eval mode.

        Args:
            model: any module that ``torch.export`` traces, trained or not.
            task: data, loss and recipe.
            budget: epochs to train; None is the recipe's, 0 cuts the shortest groups.
            seed: draws the batches.
            progress: told how far it is.
        """
        report = progress or (lambda fraction, what: None)
        report(0.0, "tracing")
        with isolated(seed):
            found = plan(self, model, task)
        epochs = (task.recipe or Recipe()).epochs if budget is None else budget
        [epochs] = shared_epochs(task, epochs, [1.0])
        result = deepcopy(model)
        hook = Fading(self, result, found, round(epochs * steps_per_epoch(task)))
        train(
            self,
            result,
            task,
            epochs=epochs,
            seed=seed,
            hook=hook,
            progress=lambda fraction, what: report(0.05 + 0.9 * fraction, what),
            average=None,
        )
        hook.finish()
        smaller = found.graph.shrink(result, hook.units()).eval()
        report(1.0, f"removed {found.goal.total} units")
        return smaller


class Fading(UnitHook):
    """Chooses units and lets them fade, after every step of the optimizer.

    Args:
        method: the settings.
        model: that is trained.
        plan: its groups, and how many units are to go.
        total: iterations of the training.
    """

    def __init__(self, method: HESSO, model: nn.Module, plan: Plan, total: int) -> None:
        super().__init__(UnitVectors(model, plan.places), plan)
        begin = int(method.start * total)
        self.model, self._end = model, max(begin + 1, int(method.stop * total))
        self._fading = {name: torch.zeros_like(mask) for name, mask in self.gone.items()}
        length = (self._end - begin) // (2 * method.cycles) if method.corrective else 0
        self._cycles = _Cycles(self, begin, length, method.cycles) if length else None
        self._identified = False
        self._bounds = _split(begin, self._end, 1 if method.corrective else method.periods)
        self._window, self._sums = method.window, self._nothing()

    def before_step(self, step: int, total: int) -> None:
        """Score, and choose what is to fade."""
        super().before_step(step, total)
        if self._cycles is not None and self._cycles.within(step):
            self._cycles.score()
        elif not self._identified:
            coming = next((bound for bound in self._bounds[:-1] if bound >= step), None)
            if coming is not None and step > coming - self._window:
                now = self.scores()
                self._sums = {name: total + now[name] for name, total in self._sums.items()}
            if coming == step:
                share = (self._bounds.index(step) + 1) / (len(self._bounds) - 1)
                self._choose(self.without_gone(self._sums), share)
                self._sums = self._nothing()

    def after_step(self, step: int, total: int) -> None:
        """Fade."""
        if self._cycles is not None and self._cycles.within(step):
            if self._cycles.after(step):
                self._choose(self._cycles.average(), 1.0)
                self._bounds = [step + 1, self._end]
                self._cycles, self._identified = None, True
            return
        for first, last in zip(self._bounds, self._bounds[1:], strict=False):
            if first <= step < last:
                self.fade(self._fading, step - first, last - first)
                if step == last - 1:
                    self.gone = {name: mask | self.gone[name] for name, mask in self._fading.items()}
        self.hold()

    def finish(self) -> None:
        """Let what is missing go by length, should the training have been too short for all periods."""
        if sum(int(mask.sum()) for mask in self.gone.values()) < self.goal.total:
            super().finish()

    def fade(self, units: Mapping[str, Tensor], step: int, steps: int) -> None:
        """Multiply ``units`` for step ``step`` of ``steps``."""
        factor = _fade(step, steps)
        whole = {name: torch.ones(len(mask), dtype=torch.float64) for name, mask in units.items()}
        self.vectors.multiply({name: whole[name].masked_fill(mask, factor) for name, mask in units.items()})

    def scores(self) -> dict[str, Tensor]:
        """Of all units, on the gradients that are there."""
        return unit_saliency(self.vectors.read(), self.vectors.gradients())

    def _nothing(self) -> dict[str, Tensor]:
        return {name: torch.zeros(len(mask), dtype=torch.float64) for name, mask in self.gone.items()}

    def _choose(self, scores: dict[str, Tensor], share: float) -> None:
        self._fading = {n: mask & ~self.gone[n] for n, mask in self.goal.lowest(scores, share).items()}


class _Cycles:
    """The corrective cycles: units fade out and are put back, and scores are taken on the way."""

    def __init__(self, hook: Fading, begin: int, length: int, count: int) -> None:
        self._hook, self._begin, self._length, self._count = hook, begin, length, count
        self._active: dict[str, Tensor] | None = None
        self._faded = {name: torch.zeros_like(mask) for name, mask in hook.gone.items()}
        self._next = dict(self._faded)
        self._sums = {name: torch.zeros(len(mask), dtype=torch.float64) for name, mask in hook.gone.items()}
        self._taken = 0
        self._state = [*hook.model.parameters(), *hook.model.buffers()]
        self._kept: list[Tensor] = []

    def within(self, step: int) -> bool:
        """Whether ``step`` belongs to a cycle."""
        return self._begin <= step < self._begin + self._count * self._length

    def score(self) -> None:
        """Take the scores of a step, and note units that come among the lowest."""
        scores = self._hook.scores()
        self._taken += 1
        self._sums = {name: total + scores[name] for name, total in self._sums.items()}
        lowest = self._hook.goal.lowest(scores)
        if self._active is None:  # the first step of all
            self._start(lowest)
            self._kept = [value.detach().clone() for value in self._state]
        self._next = {name: mask | (lowest[name] & ~self._faded[name]) for name, mask in self._next.items()}

    @torch.no_grad()
    def after(self, step: int) -> bool:
        """Fade; at the end of a cycle put the weights back. True when there is no further cycle."""
        assert self._active is not None
        cycle, passed = divmod(step - self._begin, self._length)
        self._hook.fade(self._active, passed, self._length)
        if passed < self._length - 1:
            return False
        for value, kept in zip(self._state, self._kept, strict=True):
            value.copy_(kept)
        self._start(self._next)
        return cycle == self._count - 1 or not any(bool(mask.any()) for mask in self._active.values())

    def average(self) -> dict[str, Tensor]:
        """The scores, on average over all steps of all cycles."""
        return {name: total / self._taken for name, total in self._sums.items()}

    def _start(self, units: dict[str, Tensor]) -> None:
        self._active = units
        self._faded = {name: mask | units[name] for name, mask in self._faded.items()}
        self._next = {name: torch.zeros_like(mask) for name, mask in units.items()}


def _split(begin: int, end: int, count: int) -> list[int]:
    """Bounds of at most ``count`` parts of about the same length, at least one step each.

    Example:
        >>> _split(2, 9, 3)
        [2, 4, 6, 9]
    """
    count = min(count, end - begin)
    return [begin + (end - begin) * part // count for part in range(count + 1)]
