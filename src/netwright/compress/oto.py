"""Only train once: a network is trained and pruned in one go, by half-space projection of its zero-invariant groups."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from netwright.compress._held_items import refresh_norms
from netwright.compress._settings import check_choice, check_number, check_ratio
from netwright.compress._sparse_recipe_masks import shared_epochs, steps_per_epoch
from netwright.compress._training import train
from netwright.compress._unit_plan import Plan, Scope, UnitHook, check_structured, plan, step_sizes
from netwright.compress._unit_vectors import UnitVectors
from netwright.core.randomness import isolated
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["OTO"]

Projection = Literal["half-space", "proximal"]


def _leaves(before: Tensor, trial: Tensor, epsilon: float) -> Tensor:
    r"""``(units,)`` whether the trial iterate left the half-space: :math:`\hat x_g^\top x_g < \epsilon \|x_g\|^2`."""
    return (trial * before).sum(1) < epsilon * before.square().sum(1)


def _shrunk(trial: Tensor, amount: float) -> Tensor:
    r"""``(units,)`` factors of the proximal step: :math:`\max(0, 1 - \alpha\lambda / \|\hat x_g\|)`."""
    factors: Tensor = (1.0 - amount / trial.norm(dim=1).clamp_min(1e-30)).clamp_min(0.0)
    return factors


@dataclass(frozen=True)
class OTO:
    r"""Trains a network and removes units in the same run, with no fine-tuning after it.

    Reach for it to train from scratch, or further, towards a smaller network: units are driven to zero by a penalty,
    set to exactly zero by half-space projection, and cut out at the end without changing what the network computes.

    Let :math:`x_g` be all parameters that produce unit :math:`g` (its rows of weights, its bias, its entries of a
    batch norm): a zero-invariant group, for with :math:`x_g = 0` the unit puts out nothing. Training minimizes
    :math:`f(x) + \lambda \sum_g \|x_g\|`. With :math:`\bar x` what the recipe's optimizer makes of iterate :math:`x`,
    and :math:`\alpha` the learning rate, a step is

    .. math:: \hat x_g = \bar x_g - \alpha \lambda \frac{x_g}{\|x_g\|}, \qquad
              x_g^+ = \begin{cases} 0 & \hat x_g^\top x_g < \epsilon \|x_g\|^2 \\ \hat x_g & \text{else} \end{cases}

    A group at zero stays there. Before ``start`` and after ``stop`` of the training there is no penalty; at ``stop``
    the shortest groups go, should fewer than ``ratio`` be zero, and no projection takes more than that.
    :math:`\lambda = \text{strength} \cdot \overline{\|x_g\|} / \sum_t \alpha_t`, mean and sum over that time: with
    ``strength=1`` the penalty alone would take a group of mean length to zero.

    Args:
        ratio: share of the units to remove, in (0, 1).
        scope: "layer" takes the share of each group; "global" counts units in all groups together, and may leave a
            group a single unit, as it did on digits (0.88 correct after 4 epochs, 0.96 by layers).
        strength: how hard the penalty pulls; 0 leaves the choice to ``stop``.
        epsilon: :math:`\epsilon` in [0, 1); larger projects earlier.
        start: fraction of the training after which the penalty sets in.
        stop: fraction after which all units that are to go are gone, above ``start``.
        projection: "half-space", or "proximal" for group lasso by proximal gradient,
            :math:`x_g^+ = \max(0, 1 - \alpha\lambda/\|\bar x_g\|)\, \bar x_g`, from which groups can come back.
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
        >>> OTO(0.75)(model, task, budget=4)
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )

    Source: 142. T. Chen, B. Ji, T. Ding, B. Fang, G. Wang, Z. Zhu, L. Liang, Y. Shi, S. Yi, X. Tu. Only Train Once: A
        One-Shot Neural Network Training And Pruning Framework. NeurIPS 2021. arXiv:2107.07375.

    Differs: the paper fixes :math:`\lambda` and takes whatever sparsity comes; here the ratio is met exactly, so
        projections stop there, the shortest groups fill up what is missing, and the penalty ends with it. The scale of
        :math:`\lambda` is ours. Any optimizer may take the gradient's step. A moving average and a parameterization of
        the recipe are left out of this training.

    Cost: the training that ``budget`` allows (None: the recipe's epochs); between ``start`` and ``stop`` each step
        reads and writes the pruned layers' weights a few times more, and keeps a copy of them. One trace, and a copy
        of the model for each group.
    """

    trains: ClassVar[bool] = True

    ratio: float = 0.5
    scope: Scope = "layer"
    strength: float = 1.0
    epsilon: float = 0.95
    start: float = 0.1
    stop: float = 0.6
    projection: Projection = "half-space"
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_structured(self)
        check_number(self, "strength", self.strength)
        check_ratio(self, "epsilon", self.epsilon, what="projects what has lost half of its length", zero=True)
        check_choice(self, "projection", self.projection, get_args(Projection))

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
        recipe = task.recipe or Recipe()
        [epochs] = shared_epochs(task, recipe.epochs if budget is None else budget, [1.0])
        result = deepcopy(model)
        hook = HalfSpace(self, UnitVectors(result, found.places), found, recipe, round(epochs * steps_per_epoch(task)))
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
        if epochs > 0:
            refresh_norms(smaller, task, seed)
        report(1.0, f"removed {found.goal.total} units, of which {hook.projected} by projection")
        return smaller


class HalfSpace(UnitHook):
    """The penalty and the projection, after every step of the optimizer.

    Args:
        method: the settings.
        vectors: of the model that is trained.
        plan: its groups, and how many units are to go.
        recipe: whose learning rates scale the penalty.
        total: iterations of the training.
    """

    def __init__(self, method: OTO, vectors: UnitVectors, plan: Plan, recipe: Recipe, total: int) -> None:
        super().__init__(vectors, plan)
        self._method = method
        self._begin = int(method.start * total)
        self._end = max(self._begin + 1, int(method.stop * total))
        self._sizes = step_sizes(recipe, total) if total else []
        self._before: dict[str, Tensor] = {}
        self._penalty = 0.0
        self.projected = 0

    def before_step(self, step: int, total: int) -> None:
        """Remember the iterate."""
        super().before_step(step, total)
        if self._begin <= step < self._end:
            self._before = self.vectors.snapshot()
        if step == self._begin:
            norms = torch.cat([vector.norm(dim=1) for vector in self.vectors.read().values()])
            length = sum(self._sizes[self._begin : self._end])
            self._penalty = self._method.strength * float(norms.mean()) / length if length > 0 else 0.0

    def after_step(self, step: int, total: int) -> None:
        """Penalty and projection."""
        if self._begin <= step < self._end:
            amount = self._sizes[step] * self._penalty
            if self._method.projection == "proximal":
                self.vectors.multiply({name: _shrunk(x, amount) for name, x in self.vectors.read().items()})
            else:
                self._half_space(amount)
        self.hold()
        if step == self._end - 1:
            self.projected = sum(int((x == 0).all(1).sum()) for x in self.vectors.read().values())
            self._before = {}
            self.finish()

    def _half_space(self, amount: float) -> None:
        before = self.vectors.read(self._before)
        lengths = {name: x.norm(dim=1) for name, x in before.items()}
        self.vectors.add(self._before, {n: torch.where(s > 0, -amount / s, 0.0) for n, s in lengths.items()})
        trial = self.vectors.read()
        leaves = {name: _leaves(before[name], trial[name], self._method.epsilon).cpu() for name in before}
        if any(bool((leaves[name] & ~self.gone[name]).any()) for name in leaves):
            products = {name: (trial[name] * x).sum(1) / lengths[name].square() for name, x in before.items()}
            held = {name: p.double().cpu().masked_fill(~leaves[name], torch.inf) for name, p in products.items()}
            lowest = self.goal.lowest(self.without_gone(held))
            self.gone = {name: self.gone[name] | (mask & leaves[name]) for name, mask in lowest.items()}
