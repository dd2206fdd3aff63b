"""Activating while pruning: some negative weights go too, so that more units behind a ReLU stay awake."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from netwright.compress._settings import check_count, check_flag, check_ratio, check_weights, checked_paths
from netwright.compress._sparse_recipe_masks import HeldMask, largest, shared_epochs
from netwright.compress._training import train
from netwright.compress._weights import FlatWeights
from netwright.core.parametrized import fold_parametrizations
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["ActivatingPruner"]


@dataclass(frozen=True)
class ActivatingPruner:
    r"""Prunes single weights in rounds, by magnitude and a small part by a rule that keeps ReLU units active.

    Reach for it where most weights of a network of ReLUs shall go, and several rounds of training are affordable.
    Behind a ReLU inputs are not negative, so a negative weight that goes raises what its unit receives; of the
    negative weights those go that training has hardly moved, because the loss asks little of them.

    In round :math:`k` of :math:`K` the network is trained with the mask :math:`m` it has, from :math:`w^-` to
    :math:`w^+`. Of the :math:`r_k` weights to remove, :math:`r_k - a_k` are those of smallest :math:`|w^+|` in
    the whole network, and :math:`a_k = \mathrm{round}(\mathrm{share} \cdot r_k)` of the others the ones of

    .. math:: w^+_i < 0 \quad\text{with the smallest}\quad |w^+_i - w^-_i|

    Weights that stay are then set back to those of the given model (``rewind``), without which the few removed
    weights are soon made up for by others. Densities fall geometrically, :math:`d_k = (1 - \mathrm{ratio})^{k/K}`. A
    last training follows. ``share=0`` is pruning by magnitude in rounds, with or without rewinding.

    Args:
        ratio: share of the weights to remove, in (0, 1).
        share: part of each round's weights that goes by the rule for activation, in [0, 1).
        rounds: :math:`K`, times that weights are removed.
        rewind: set the weights back after every round. The paper rewinds to the initialization: give the network
            before it is trained, or early in its training, to do so.
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
        >>> sparse = ActivatingPruner(0.9, rounds=2)(model, task, budget=3)
        >>> sum(int((value != 0).sum()) for value in sparse.parameters() if value.ndim > 1)
        9

    Source: 213. S. Liu, R. Ghosh, D. Tan, M. Motani. AP: Selective Activation for De-sparsifying Pruned Neural
        Networks. 2022. arXiv:2212.06145.

    Differs: the paper removes 20% of the remaining weights in each round, 2% of them by its rule; here the number of
        rounds is a setting, with the same tenth by the rule. Where fewer negative weights are left than the rule asks
        for, or nothing was trained, magnitude takes the rest. Biases are not pruned. The optimizer and its schedule
        are those of the task's recipe, started anew in each round, without its moving average and its
        parameterization; weights that the model has parametrized are folded.

    Cost: the training that ``budget`` allows (None: the recipe's epochs in every round and at the end, ``rounds + 1``
        times as much as a dense network), and three vectors of all weights.
    """

    trains: ClassVar[bool] = True

    ratio: float = 0.9
    share: float = 0.1
    rounds: int = 5
    rewind: bool = True
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", checked_paths(self, "exclude", self.exclude))
        check_ratio(self, "ratio", self.ratio, what="removes half of the weights")
        check_ratio(self, "share", self.share, what="lets the rule for activation choose half of them", zero=True)
        check_count(self, "rounds", self.rounds)
        check_flag(self, "rewind", self.rewind)

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
            model: any module; the weights to rewind to are its own.
            task: data, loss and recipe.
            budget: epochs to train in all, shared out equally; None is ``rounds + 1`` times the recipe's, 0 prunes by
                magnitude alone.
            seed: round ``k`` draws its batches from ``seed + k``.
            progress: told how far it is.
        """
        check_weights(self, model)
        report = progress or (lambda fraction, what: None)
        result = deepcopy(model)
        fold_parametrizations(result)
        weights = FlatWeights(result, self.exclude)
        weights.require_left(self, self.ratio)
        first = weights.read()
        state = deepcopy(result.state_dict())
        alive = torch.ones(weights.size, dtype=torch.bool, device=first.device)
        parts = self.rounds + 1
        total = parts * (task.recipe or Recipe()).epochs if budget is None else budget
        for number, epochs in enumerate(shared_epochs(task, total, [1.0] * parts)):
            before = weights.read()
            train(
                self,
                result,
                task,
                epochs=epochs,
                seed=seed + number,
                hook=HeldMask(weights, alive if number else None),
                progress=_round(report, number, parts),
                average=None,
                keep_zeros=False,
            )
            if number == self.rounds:
                break
            after = weights.read()
            left = weights.dense((1.0 - self.ratio) ** ((number + 1) / self.rounds))
            alive = _survivors(before, after, alive, left, self.share)
            if self.rewind:
                result.load_state_dict(state)
            weights.write((first if self.rewind else after) * alive)
        weights.write(weights.read() * alive)
        report(1.0, f"kept {int(alive.sum())} of {weights.size} weights")
        return result.eval()


def _survivors(before: Tensor, after: Tensor, alive: Tensor, left: int, share: float) -> Tensor:
    """``(n,)`` which weights stay after a round.

    Args:
        before: ``(n,)`` weights when the round began.
        after: ``(n,)`` weights when it ended.
        alive: ``(n,)`` which were there.
        left: how many are to stay.
        share: part of the removed ones that goes by the rule for activation.
    """
    removed = int(alive.sum()) - left
    moved = (after - before).abs()
    wanted = round(share * removed) if bool(moved[alive].any()) else 0
    stays = largest(_ranked(after.abs(), alive), left + wanted)
    negative = stays & (after < 0)
    wanted = min(wanted, int(negative.sum()))
    stays &= ~largest(_ranked(-moved, negative), wanted)
    return stays & largest(_ranked(after.abs(), stays), left)


def _ranked(values: Tensor, eligible: Tensor) -> Tensor:
    """``values`` where eligible, and below all of them elsewhere."""
    return values.masked_fill(~eligible, -torch.inf)


def _round(report: Progress, number: int, parts: int) -> Progress:
    return lambda fraction, what: report((number + fraction) / parts, f"round {number}: {what}")
