"""Trainable gates: which units go is learned together with the weights, under a budget of operations."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from netwright.compress._groups import chosen_groups
from netwright.compress._saliency import saliency_magnitude
from netwright.compress._settings import (
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_ratio,
    check_weights,
    checked_paths,
)
from netwright.compress._sparse_recipe_masks import shared_epochs
from netwright.compress._trainable_gate_hook import GateTraining, gated_places
from netwright.compress._trainable_gate_macs import MacModel, Units, closed_units, opened
from netwright.compress._training import train
from netwright.core.data import Inputs
from netwright.core.errors import TransformError
from netwright.core.graph import Graph, export_model, trace
from netwright.core.graph.macs import total_macs
from netwright.core.randomness import isolated
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["TrainableGate"]

Shape = Literal["constant", "sigmoid"]
_ATTEMPTS = 24
_EXACT, _CLOSE = 1e-9, 0.003


@dataclass(frozen=True)
class TrainableGate:
    r"""Removes units to a budget of multiply-accumulates; which ones is learned by gates while the weights train.

    Reach for it when a network has to meet a number of operations and how wide each layer should stay is not known.
    The result is an ordinary, smaller module.

    Every channel, head or hidden unit :math:`u` has a gate that multiplies what the unit puts out:

    .. math:: G(w_u) = \mathbf 1[w_u > 0] + s_M(w_u)\, g(w_u), \qquad
              s_M(w) = \frac{Mw - \lfloor Mw \rfloor}{M}

    with a weight :math:`w_u` of its own. For large :math:`M` its value is that of the step and its derivative is
    :math:`g`: 1 with ``shape="constant"``, :math:`4\sigma(w)(1 - \sigma(w))` with "sigmoid". With :math:`L` the loss
    of a batch, :math:`c(G)` the share of operations left and :math:`\rho(t)` a target that falls from 1 to ``macs``,
    the gates descend on :math:`L + \lambda\,|c(G) - \rho(t)|`:

    .. math:: w_u \leftarrow w_u - \tfrac{r}{T}\, g(w_u) \Big( \tfrac{1}{\nu}\tfrac{\partial L}{\partial G_u}
              + \lambda\, \mathrm{sign}(c - \rho)\, \tfrac{1}{\bar c'} \tfrac{\partial c}{\partial G_u} \Big)

    over :math:`T` steps, with :math:`\nu` the root mean square of the first term over all units (its running
    maximum) and :math:`\bar c'` the mean of the second, :math:`\lambda` = ``strength``, :math:`r` = ``reach``. A
    closed gate keeps its gradient, so units come back. Gates start at the magnitude of their unit over the mean of
    its group. After ``search`` of the training the units of lowest :math:`w_u` are cut out, as few as the budget
    asks for and in blocks of ``round_to``, and the rest of the training goes to the smaller network.

    Args:
        macs: share of the model's multiply-accumulates that may remain, in (0, 1).
        search: fraction of the training in which gates are learned, in (0, 1).
        strength: :math:`\lambda`.
        reach: :math:`r`; gates start around 1.
        shape: "constant" or "sigmoid".
        distill: train with the given model as teacher.
        inexact: also gate groups whose removal changes statistics, as a residual stream under layer normalization.
        exclude: names of groups to leave whole.
        round_to: units that go together, such that a multiple of it stays in every group: kernels work on blocks of
            channels, and 15 can take twice as long as 16. None is 8 in groups of 64 units and more, 4 in those of 16
            and more, and 1 in smaller ones, as attention heads are.

    Raises:
        TransformError: a setting outside its range; on a call, a budget that one unit in each group (with ``round_to``,
            one block) exceeds, a name in ``exclude`` that no group has, weights that are not finite, or, to be trained,
            a task without a loss or one that trains by its own ``fit``.
        NothingToPruneError: on a call, no group is left to gate.
        TraceError: on a call, a model that cannot be traced.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.rand(64, 4), torch.zeros(64).long())
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> task = Task("tiny", model, Data(split(), split(), split()), nn.functional.cross_entropy, lambda o, t: 0.0)
        >>> TrainableGate(0.5)(model, task, budget=2)
        Sequential(
          (0): Linear(in_features=4, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        )

    Source: 162. J. Kim, C. Park, H.-J. Jung, Y. Choe. Plug-in, Trainable Gate for Streamlining Arbitrary Neural
        Networks. 2019. arXiv:1904.10921.

    Differs: the paper appends layers of gates; here gates multiply the weights that read a unit, which is the same
        and needs no change of the model. Derived for this code: the scaling of both terms, which makes settings carry
        over between tasks, the falling target, the start by magnitude, the final cut by rank, which meets the budget
        whatever the gates did, its blocks, and the last phase without gates, the only one with a moving average and a
        parameterization of the recipe.

    Cost: the training that ``budget`` allows (None: the recipe's epochs), of which ``search`` runs at full size with
        two passes over the weights more in each step; one trace, and two passes of two items for each group. Smaller
        models are made and traced once or up to three times before, to see whether the budget can be met, and once
        after the search, or a few times where an operation's cost cannot be told from its weights.
    """

    trains: ClassVar[bool] = True

    macs: float = 0.5
    search: float = 0.4
    strength: float = 1.0
    reach: float = 4.0
    shape: Shape = "constant"
    distill: bool = True
    inexact: bool = False
    exclude: Sequence[str] = ()
    round_to: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", checked_paths(self, "exclude", self.exclude))
        check_ratio(self, "macs", self.macs, what="leaves half of the multiply-accumulates")
        check_ratio(self, "search", self.search, what="learns gates for half of the training")
        check_number(self, "strength", self.strength, above=True)
        check_number(self, "reach", self.reach, above=True)
        check_choice(self, "shape", self.shape, get_args(Shape))
        for name in ("distill", "inexact"):
            check_flag(self, name, getattr(self, name))
        if self.round_to is not None:
            check_count(self, "round_to", self.round_to)

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
            model: any module that ``torch.export`` traces.
            task: data, loss and recipe.
            budget: epochs to train, both phases together; None is the recipe's, 0 cuts by magnitude alone.
            seed: draws the batches.
            progress: told how far it is.
        """
        check_weights(self, model)
        report = progress or (lambda fraction, what: None)
        report(0.0, "tracing")
        with isolated(seed):
            inputs = task.example()
        graph = trace(model, inputs)
        groups = chosen_groups(self, graph, self.exclude, self.inexact, "gate")
        macs = MacModel(graph, groups)
        result = deepcopy(model)
        values = {group.name: _start(saliency_magnitude(model, group).cpu()) for group in groups}
        blocks = self._blocks(graph, result, macs, values, inputs)  # an error before anything is trained
        total = (task.recipe or Recipe()).epochs if budget is None else budget
        search, rest = shared_epochs(task, total, [self.search, 1.0 - self.search])
        places = gated_places(graph, model, groups, inputs) if search > 0 else {}
        hook = GateTraining(
            result,
            places,
            values,
            macs,
            target=self.macs,
            strength=self.strength,
            reach=self.reach,
            shape=self.shape,
            ramp=0.5,
        )
        teacher = deepcopy(model).eval() if self.distill else None
        train(
            self,
            result,
            task,
            epochs=search,
            seed=seed,
            hook=hook,
            teacher=teacher,
            progress=lambda fraction, what: report(0.05 + 0.5 * fraction, f"gates: {what}"),
            average=None,
        )
        hook.finish()
        report(0.56, "cutting closed units out")
        smaller = self._cut(graph, result, macs, values, blocks, inputs)
        report(0.6, "training what is left")
        train(
            self,
            smaller,
            task,
            epochs=rest,
            seed=seed + 1,
            teacher=teacher,
            progress=lambda fraction, what: report(0.6 + 0.4 * fraction, what),
        )
        report(1.0, f"met {self.macs:.3g} of the multiply-accumulates")
        return smaller.eval()

    def _blocks(
        self, graph: Graph, model: nn.Module, macs: MacModel, values: dict[str, Tensor], inputs: Inputs
    ) -> dict[str, int]:
        """Units of each group that go together; by default fewer where the budget is too small for full blocks.

        The least that can be left is counted on that model itself, and ``macs`` is calibrated to it.

        Raises:
            TransformError: it is more than the budget.
        """
        for most in (8, 4, 1):
            blocks = {name: self.round_to or min(most, _block(len(value))) for name, value in values.items()}
            units = closed_units(macs, values, 0.0, blocks)
            least = _share(graph.shrink(model, units), inputs, macs.total)
            if least <= self.macs:
                macs.calibrate(opened(values, units), least)
                return blocks
            if max(blocks.values()) == 1 or self.round_to is not None:
                break
        what = "block" if max(blocks.values()) > 1 else "unit"
        raise TransformError(
            f"TrainableGate.macs={self.macs:g} is out of reach: with one {what} left in every group {least:.4f} of the "
            "multiply-accumulates remain. Raise macs."
        )

    def _cut(
        self,
        graph: Graph,
        model: nn.Module,
        macs: MacModel,
        values: dict[str, Tensor],
        blocks: dict[str, int],
        inputs: Inputs,
    ) -> nn.Module:
        """The smaller model, within the budget as counted on itself.

        Where ``macs`` is not exact, the target given to it is sought between ``low``, which meets the budget, and
        ``high``, which does not.
        """
        target, low, high, excess = self.macs, 0.0, 1.0, 0.0
        fits, exceeds, found = closed_units(macs, values, low, blocks), Units(), None
        for _ in range(_ATTEMPTS):
            units = closed_units(macs, values, target, blocks)
            if units not in (fits, exceeds):
                smaller = graph.shrink(model, units)
                share = _share(smaller, inputs, macs.total)
                excess = macs.share(opened(values, units)).item() - share  # of the count over what is true
                if share > self.macs:
                    exceeds = units
                else:
                    fits, found = units, smaller
                    if self.macs - share < _CLOSE or (target == self.macs and abs(excess) < _EXACT):
                        break
            low, high = (target, high) if units == fits else (low, target)
            target = self.macs + excess if low < self.macs + excess < high else (low + high) / 2
        return (graph.shrink(model, fits) if found is None else found).eval()


def _share(model: nn.Module, inputs: Inputs, total: float) -> float:
    return total_macs(export_model(model, inputs)) / total


def _block(size: int) -> int:
    """Units of a group that go together by default."""
    return 8 if size >= 64 else 4 if size >= 16 else 1


def _start(magnitude: Tensor) -> Tensor:
    """Positive, with mean 1."""
    mean = magnitude.mean()
    return (magnitude / mean if float(mean) > 0 else torch.ones_like(magnitude)).clamp_min(1e-3)
