"""A training recipe for sparse networks: longer, with masks that tighten gradually or come and go."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import nn

from netwright.compress._settings import (
    check_choice,
    check_count,
    check_number,
    check_ratio,
    check_weights,
    checked_paths,
)
from netwright.compress._sparse_recipe_masks import (
    SCOPES,
    HeldMask,
    Scope,
    magnitude_mask,
    shared_epochs,
    steps_per_epoch,
)
from netwright.compress._training import train
from netwright.compress._weights import FlatWeights
from netwright.core.errors import TransformError
from netwright.core.parametrized import fold_parametrizations
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["SparseRecipe"]

Schedule = Literal["gradual", "alternating"]


@dataclass(frozen=True)
class SparseRecipe:
    r"""Trains a network sparse, for longer than a dense one needs, and removes weights on the way.

    Reach for it at 90% of zeros and more: a network with few weights left learns slowly, and the dense recipe's length
    stops it under-trained. ``extension`` says how much training is spent, in lengths of the task's recipe; the
    learning rate goes through its whole schedule once, stretched over that length.

    Let :math:`\tau \in [0, 1]` be the finished fraction of training, :math:`\tau_0` = ``start``, :math:`\tau_1` =
    ``stop``, :math:`s` = ``ratio``. A mask keeps the weights of largest magnitude, of all together or of each layer;
    the others are zero and receive no gradient.

    .. math:: \text{gradual:}\quad s(\tau) = s \Big(1 - \big(1 - \tfrac{\tau - \tau_0}{\tau_1 - \tau_0}\big)^3\Big),
              \quad \text{0 before } \tau_0,\ s \text{ from } \tau_1 \text{ on}

    With ``schedule="gradual"`` the mask is tightened at ``updates`` evenly spaced times between :math:`\tau_0` and
    :math:`\tau_1`. With ``schedule="alternating"`` (AC/DC) training is dense up to :math:`\tau_0`, then ``updates``
    pairs of a sparse phase, at :math:`s` with a mask taken at its beginning, and a dense phase without one share the
    time up to :math:`\tau_1`, and the rest is sparse. Weights that a mask has removed come back from zero.

    Args:
        ratio: share of the weights to remove, in (0, 1).
        schedule: "gradual" or "alternating".
        scope: "global" ranks all weights together, "layer" those of each parameter.
        extension: length of the training in the recipe's, where no budget is given; 1 is the dense recipe's length.
        start: :math:`\tau_0`.
        stop: :math:`\tau_1`, above ``start`` and below 1.
        updates: times the mask tightens, or pairs of phases.
        learning_rate: of the recipe's; sparse networks often want more.
        exclude: names of parameters or modules whose weights stay dense.

    Raises:
        TransformError: a setting outside its range; on a call, a ratio that would leave no weight (with
            ``scope="layer"``, of some parameter), weights that are not finite, a name in ``exclude`` that the model
            does not have, or a training on a task without a loss, or on one that trains by its own ``fit``.
        NothingToPruneError: on a call, a model without matrices or kernels.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.rand(64, 4), torch.zeros(64).long())
        >>> model = nn.Sequential(nn.Linear(4, 15), nn.ReLU(), nn.Linear(15, 2))
        >>> task = Task("tiny", model, Data(split(), split(), split()), nn.functional.cross_entropy, lambda o, t: 0.0)
        >>> method = SparseRecipe(0.9, extension=2)
        >>> method.epochs(task)
        20.0
        >>> sparse = method(model, task, budget=3)
        >>> sum(int((value != 0).sum()) for value in sparse.parameters() if value.ndim > 1)
        9

    Source: 37. D. Kuznedelev, E. Kurtic, E. Iofinova, E. Frantar, A. Peste, D. Alistarh. Accurate Neural Network
        Pruning Requires Rethinking Sparse Optimization. 2023. arXiv:2308.02060. The cubic rise is M. Zhu's and S.
        Gupta's (arXiv:1710.01878), the alternation A. Peste's and others' (arXiv:2106.12379).

    Differs: of the paper's recipe the extended schedule and the masks are here; label smoothing, averaging and
        resizing of images belong to the task's loss, recipe and data. The optimizer's state is kept when a dense phase
        begins. The paper's search for layers of their own learning rate in language models is left out, as are a
        moving average and a parameterization of the recipe; weights that the model has parametrized are folded.

    Cost: the epochs that are spent, as :meth:`epochs` says, plus a copy of the weights and of the mask; every change of
        the mask takes one selection of the largest of all weights.
    """

    trains: ClassVar[bool] = True

    ratio: float = 0.95
    schedule: Schedule = "gradual"
    scope: Scope = "global"
    extension: float = 3.0
    start: float = 0.0
    stop: float = 0.6
    updates: int = 20
    learning_rate: float = 1.0
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", checked_paths(self, "exclude", self.exclude))
        check_ratio(self, "ratio", self.ratio, what="removes half of the weights")
        check_choice(self, "schedule", self.schedule, get_args(Schedule))
        check_choice(self, "scope", self.scope, SCOPES)
        check_number(self, "extension", self.extension, above=True)
        check_ratio(self, "start", self.start, what="begins to prune after half of the training", zero=True)
        check_ratio(self, "stop", self.stop, what="has pruned after half of the training")
        check_count(self, "updates", self.updates)
        check_number(self, "learning_rate", self.learning_rate, above=True)
        if self.stop <= self.start:
            raise TransformError(f"SparseRecipe.stop must be above start={self.start!r}, got {self.stop!r}.")

    def epochs(self, task: Task) -> float:
        """The training that a call without a budget spends; the dense recipe spends ``1 / extension`` of it."""
        return self.extension * (task.recipe or Recipe()).epochs

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
            model: any module, trained or not.
            task: data, loss and recipe.
            budget: epochs to train; None is :meth:`epochs`, 0 prunes by magnitude alone.
            seed: draws the batches.
            progress: told how far it is.
        """
        check_weights(self, model)
        report = progress or (lambda fraction, what: None)
        result = deepcopy(model)
        fold_parametrizations(result)
        weights = FlatWeights(result, self.exclude)
        weights.require_left(self, self.ratio, each=self.scope == "layer")
        recipe = task.recipe or Recipe()
        [epochs] = shared_epochs(task, self.epochs(task) if budget is None else budget, [1.0])
        report(0.0, f"training {epochs:.3g} epochs, {epochs / recipe.epochs:.3g} times the dense recipe's")
        changed = recipe.scaled(self.learning_rate)
        hook = _Masks(self, weights, round(epochs * steps_per_epoch(task)))
        train(
            self,
            result,
            task,
            epochs=epochs,
            seed=seed,
            hook=hook,
            progress=lambda fraction, what: report(0.98 * fraction, what),
            optimizer_settings=changed.optimizer_settings,
            schedule_settings=changed.schedule_settings,
            average=None,
            keep_zeros=False,
        )
        weights.write(weights.read() * magnitude_mask(weights, self.ratio, self.scope))
        report(1.0, f"{self.ratio:.4g} of {weights.size} weights are zero, after {epochs:.3g} epochs")
        return result.eval()

    def sparsity(self, step: int, total: int) -> float:
        """The share of zeros that the schedule asks for in iteration ``step`` of ``total``.

        Example:
            >>> method = SparseRecipe(0.8, start=0.0, stop=0.5, updates=2)
            >>> [round(method.sparsity(step, 8), 3) for step in range(8)]
            [0.0, 0.0, 0.7, 0.7, 0.8, 0.8, 0.8, 0.8]
            >>> method = SparseRecipe(0.8, "alternating", start=0.2, stop=0.6, updates=2)
            >>> [method.sparsity(step, 10) for step in range(10)]
            [0.0, 0.0, 0.8, 0.0, 0.8, 0.0, 0.8, 0.8, 0.8, 0.8]
        """
        begin, end = round(self.start * total), round(self.stop * total)
        if step >= end:
            return self.ratio
        if step < begin:
            return 0.0
        passed = (step - begin) / (end - begin)
        if self.schedule == "gradual":
            return _cubic(int(passed * self.updates + 1e-9) / self.updates, self.ratio)
        return 0.0 if int(passed * 2 * self.updates + 1e-9) % 2 else self.ratio


def _cubic(passed: float, ratio: float) -> float:
    r""":math:`s (1 - (1 - x)^3)`."""
    return ratio * (1.0 - (1.0 - passed) ** 3)


class _Masks(HeldMask):
    """Changes the mask when the schedule says so."""

    def __init__(self, method: SparseRecipe, weights: FlatWeights, total: int) -> None:
        super().__init__(weights)
        self._method = method
        self._sparsity = 0.0
        self._change(0, total)

    def after_step(self, step: int, total: int) -> None:
        self._change(step + 1, total)

    def _change(self, step: int, total: int) -> None:
        wanted = self._method.sparsity(step, total)
        if wanted != self._sparsity:
            self._sparsity = wanted
            self.mask = magnitude_mask(self.weights, wanted, self._method.scope) if wanted > 0 else None
        self.apply()
