"""Global sparse momentum: weights without importance fade by weight decay alone while the network trains."""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from netwright.compress._held_items import refresh_norms
from netwright.compress._settings import check_number, check_ratio, check_weights, checked_paths
from netwright.compress._sparse_recipe_masks import largest, shared_epochs, steps_per_epoch
from netwright.compress._training import train
from netwright.compress._weights import FlatWeights
from netwright.core.fit import StepHook
from netwright.core.parametrized import fold_parametrizations
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["GlobalSparseMomentum"]

_EXTENSION = 2.0  # of the recipe's epochs, without a budget
_MEAN_RATE = 0.5  # of the largest learning rate, over a one-cycle schedule


@dataclass(frozen=True)
class GlobalSparseMomentum:
    r"""Prunes single weights during training: those of little importance see weight decay only, until they are gone.

    Reach for it when few weights shall remain, how many of each layer is not known, and the result is to be used as
    it comes, without retraining. The result is a dense module with exact zeros: it is smaller on disk, not faster.

    With all weights :math:`w` of matrices and kernels as one vector, :math:`g` their gradient on a batch and
    :math:`T = |g \odot w|` (the loss would change by about :math:`T_i` if weight :math:`i` went), every step is

    .. math:: b_i = \mathbf 1[T_i \ge T_{(Q)}] \qquad z \leftarrow \beta z + \eta w + b \odot g \qquad
              w \leftarrow w - \alpha z

    with :math:`T_{(Q)}` the :math:`Q`-th largest entry, :math:`Q = \mathrm{round}((1 - \mathrm{ratio})\, n)`,
    :math:`\beta` the momentum, :math:`\eta` the weight decay and :math:`\alpha` the learning rate. A weight that is
    never chosen shrinks by :math:`\exp(-\eta \sum\alpha / (1 - \beta))`; one that was chosen again in time grows
    back, which a high momentum helps. Biases and normalizations learn as usual and do not decay. At the end all but
    the :math:`Q` largest weights are set to zero.

    Args:
        ratio: share of the weights to remove, in (0, 1). 59/60 leaves a sixtieth.
        learning_rate: the largest :math:`\alpha` of a one-cycle schedule.
        momentum: :math:`\beta`, in [0, 1).
        weight_decay: :math:`\eta`; None chooses it so that a weight never chosen shrinks to ``leftover`` of itself.
        leftover: share of a weight never chosen that is left at the end, in (0, 1). Trainings of dozens of epochs bear
            less, 1e-6, and end better with it: what is to go is gone early.
        exclude: names of parameters or modules whose weights stay dense.

    Raises:
        TransformError: a setting outside its range; on a call, a ratio that would leave no weight, weights that are not
            finite, a name in ``exclude`` that the model does not have, or a training on a task without a loss, or on
            one that trains by its own ``fit``.
        NothingToPruneError: on a call, a model without matrices or kernels.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.rand(64, 4), torch.zeros(64).long())
        >>> model = nn.Sequential(nn.Linear(4, 15), nn.ReLU(), nn.Linear(15, 2))
        >>> task = Task("tiny", model, Data(split(), split(), split()), nn.functional.cross_entropy, lambda o, t: 0.0)
        >>> sparse = GlobalSparseMomentum(0.9)(model, task, budget=2)
        >>> sum(int((value != 0).sum()) for value in sparse.parameters() if value.ndim > 1)
        9

    Source: 164. X. Ding, G. Ding, X. Zhou, Y. Guo, J. Han, J. Liu. Global Sparse Momentum SGD for Pruning Very Deep
        Neural Networks. 2019. arXiv:1909.12778.

    Differs: the schedule is one cycle instead of steps; where no weight decay is given it is derived from the length
        of the training, because the paper's 5e-4 needs tens of thousands of steps to take effect; biases and
        normalizations do not decay. A moving average and a parameterization of the recipe are left out; weights that
        the model has parametrized are folded.

    Cost: the training that ``budget`` allows (None: twice the recipe's epochs), by SGD in place of the recipe's
        optimizer, with one selection of the :math:`Q` largest of :math:`n` entries in each step; memory for three
        vectors of :math:`n`.
    """

    trains: ClassVar[bool] = True

    ratio: float = 0.95
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float | None = None
    leftover: float = 1e-3
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", checked_paths(self, "exclude", self.exclude))
        check_ratio(self, "ratio", self.ratio, what="removes half of the weights")
        check_number(self, "learning_rate", self.learning_rate, above=True)
        check_ratio(self, "momentum", self.momentum, what="halves the past in every step", zero=True)
        if self.weight_decay is not None:
            check_number(self, "weight_decay", self.weight_decay)
        check_ratio(self, "leftover", self.leftover, what="leaves half of a weight that is never chosen")

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """A trained copy of ``model`` with ``ratio`` of its weights zero, in eval mode.

        Args:
            model: any module.
            task: data, loss and recipe, of which batch size, clipping and precision are used.
            budget: epochs to train; None is twice the recipe's, 0 prunes by magnitude alone.
            seed: draws the batches.
            progress: told how far it is.
        """
        check_weights(self, model)
        report = progress or (lambda fraction, what: None)
        result = deepcopy(model)
        fold_parametrizations(result)
        weights = FlatWeights(result, self.exclude)
        weights.require_left(self, self.ratio)
        recipe = task.recipe or Recipe()
        [epochs] = shared_epochs(task, _EXTENSION * recipe.epochs if budget is None else budget, [1.0])
        report(0.0, f"training {weights.size} weights, {weights.dense(1 - self.ratio)} with gradients")
        decay = self._decay(epochs * steps_per_epoch(task))
        hook = _Selection(result, weights, weights.dense(1.0 - self.ratio), decay)
        train(
            self,
            result,
            task,
            epochs=epochs,
            seed=seed,
            hook=hook,
            progress=lambda fraction, what: report(0.98 * fraction, what),
            optimizer="torch.optim:SGD",
            optimizer_settings={"lr": self.learning_rate, "momentum": self.momentum, "weight_decay": decay},
            schedule="torch.optim.lr_scheduler:OneCycleLR",
            schedule_settings={"max_lr": self.learning_rate, "cycle_momentum": False},
            average=None,
            keep_zeros=False,
        )
        values = weights.read()
        weights.write(values * largest(values.abs(), weights.dense(1.0 - self.ratio)))
        if epochs > 0:
            refresh_norms(result, task, seed)
        report(1.0, f"kept {weights.dense(1 - self.ratio)} of {weights.size} weights")
        return result.eval()

    def _decay(self, steps: float) -> float:
        if self.weight_decay is not None:
            return self.weight_decay
        return math.log(1 / self.leftover) * (1 - self.momentum) / (_MEAN_RATE * self.learning_rate * max(steps, 1.0))


def _active(gradients: Tensor, weights: Tensor, count: int) -> Tensor:
    r"""``(n,)`` which weights keep their gradient: :math:`|g w|` is at least its ``count``-th largest value."""
    saliency = (gradients * weights).abs()
    if count >= len(saliency):
        return torch.ones_like(saliency, dtype=torch.bool)
    return saliency >= torch.topk(saliency, count, sorted=False).values.min()


class _Selection(StepHook):
    """Takes the gradients of all but the most salient weights away, and weight decay from everything else."""

    def __init__(self, model: nn.Module, weights: FlatWeights, count: int, decay: float) -> None:
        self._weights, self._count, self._decay = weights, count, decay
        pruned = {id(value) for value in weights.parameters.values()}
        self._rest = [value for value in model.parameters() if id(value) not in pruned]

    @torch.no_grad()
    def before_step(self, step: int, total: int) -> None:
        gradients = self._weights.gather([value.grad for value in self._weights.parameters.values()])
        active = _active(gradients, self._weights.read(), self._count)
        for _, place, value in self._weights:
            if value.grad is not None:
                value.grad.mul_(active[place].view_as(value))
        for value in self._rest:
            if value.grad is not None:
                value.grad.sub_(value, alpha=self._decay)  # which the optimizer adds
