"""Group envelope: training drives all but a given number of units to zero, by a proximal step after every step."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor, nn

from netwright.compress._group_envelope_prox import envelope_prox
from netwright.compress._groups import chosen_groups
from netwright.compress._settings import (
    check_choice,
    check_flag,
    check_number,
    check_ratio,
    check_weights,
    checked_paths,
)
from netwright.compress._sparse_recipe_masks import shared_epochs
from netwright.compress._trainable_gate_hook import gated_places
from netwright.compress._training import train
from netwright.compress._unit_plan import Goal, Scope, goal_of
from netwright.core.fit import StepHook
from netwright.core.graph import Place, trace
from netwright.core.randomness import isolated
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["GroupEnvelope"]


@dataclass(frozen=True)
class GroupEnvelope:
    r"""Removes all but a given number of units; training pushes the others to zero before they are cut out.

    Reach for it when the number of channels, heads or hidden units that may stay is given. Where a penalty on lengths
    (group lasso) shrinks every unit and its strength has to be searched for the number wanted, here the number is a
    setting, and units that win see no more than weight decay.

    Unit :math:`g` of :math:`n`, those of one layer or of all layers, has the entries :math:`x_g` of the weights that
    read it, divided by their mean length over its layer at the start. With the loss :math:`L` of a batch, training
    descends on :math:`L + \lambda s_k`, summed over layers where each has its own :math:`k`,

    .. math:: s_k(x) = \min_{0 \le u \le 1,\ \sum_g u_g \le k} \tfrac12 \sum_g \frac{\lVert x_g \rVert^2}{u_g},
              \qquad k = n - \lfloor \mathrm{ratio} \cdot n \rfloor

    by a step of the recipe's optimizer followed by the proximal operator:

    .. math:: x_g \leftarrow \frac{u_g}{u_g + \lambda_t}\, x_g, \qquad
              u_g = \min\big(1, \max(0, \eta \lVert x_g \rVert - \lambda_t)\big), \qquad \sum_g u_g = k

    with :math:`\lambda_t = \mathrm{strength} / T` over the :math:`T` steps of the search: a unit with :math:`u_g = 1`
    would shrink by :math:`e^{-\mathrm{strength}}` in all if the loss did not hold it. A unit at zero keeps its
    gradient and may come back. After ``search`` of the training the :math:`k` longest units stay, at least one of
    every layer; the others are cut out, and the rest of the training goes to the smaller network.

    Args:
        ratio: share of the units to remove, in (0, 1); exactly :math:`k` of them stay.
        strength: :math:`\lambda` summed over the search, above 0.
        search: fraction of the training with the penalty, in (0, 1).
        scope: "layer" leaves :math:`k` of each layer, "global" of all layers together: it decides how many of each, and
            can leave narrow first layers a single unit.
        inexact: also remove units whose removal changes statistics, as of a residual stream under layer normalization.
        exclude: names of groups to leave whole.

    Raises:
        TransformError: a setting outside its range; on a call, a ratio that would leave a layer no unit or remove none,
            a name in ``exclude`` that no group has, weights that are not finite, or, to be trained, a task without a
            loss or one that trains by its own ``fit``.
        NothingToPruneError: on a call, no group is left to prune.
        TraceError: on a call, a model that cannot be traced.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.rand(64, 4), torch.zeros(64).long())
        >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> task = Task("tiny", model, Data(split(), split(), split()), nn.functional.cross_entropy, lambda o, t: 0.0)
        >>> GroupEnvelope(0.75)(model, task, budget=2)
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )

    Source: 181. Y. Refael, I. Arbel, W. Huleihel. Learning k-Level Structured Sparse Neural Networks Using Group
        Envelope Regularization. 2022. arXiv:2212.12921.

    Differs: all groups weigh the same, so that :math:`k` counts units, by default of each layer; lengths are relative
        to their layer's, a fixed change of scale that the proximal step is taken in. The recipe's optimizer takes the
        place of plain gradient steps, with one strength for all of them. The final cut by rank and the training after
        it make the number exact however far the search has come. Where scaling the weights that read a unit does not
        silence it, all of its weights are scaled, and an entry of two units by both. A moving average and a
        parameterization of the recipe have their place in the training after the cut alone.

    Cost: the training that ``budget`` allows (None: the recipe's epochs), of which ``search`` runs at full size with
        two passes over the weights and a sort of :math:`n` numbers more in each step; one trace, and two passes of two
        items for each group.
    """

    trains: ClassVar[bool] = True

    ratio: float = 0.5
    strength: float = 5.0
    search: float = 0.5
    scope: Scope = "layer"
    inexact: bool = False
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", checked_paths(self, "exclude", self.exclude))
        check_ratio(self, "ratio", self.ratio, what="removes half of the units")
        check_number(self, "strength", self.strength, above=True)
        check_ratio(self, "search", self.search, what="spends half of the training on the search")
        check_choice(self, "scope", self.scope, get_args(Scope))
        check_flag(self, "inexact", self.inexact)

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
            budget: epochs to train, both phases together; None is the recipe's, 0 cuts by length alone.
            seed: draws the batches.
            progress: told how far it is.
        """
        check_weights(self, model)
        report = progress or (lambda fraction, what: None)
        report(0.0, "tracing")
        with isolated(seed):
            inputs = task.example()
        graph = trace(model, inputs)
        groups = chosen_groups(self, graph, self.exclude, self.inexact, "prune")
        goal = goal_of(self, groups)
        result = deepcopy(model)
        places = gated_places(graph, model, groups, inputs)
        hook = _Proximal(self, result, places, goal)
        epochs = (task.recipe or Recipe()).epochs if budget is None else budget
        search, rest = shared_epochs(task, epochs, [self.search, 1.0 - self.search])
        train(
            self,
            result,
            task,
            epochs=search,
            seed=seed,
            hook=hook,
            progress=lambda fraction, what: report(0.05 + 0.5 * fraction, f"search: {what}"),
            average=None,
        )
        report(0.56, f"cutting {goal.total} units out")
        smaller = graph.shrink(result, hook.shortest())
        train(
            self,
            smaller,
            task,
            epochs=rest,
            seed=seed + 1,
            progress=lambda fraction, what: report(0.6 + 0.4 * fraction, what),
        )
        report(1.0, f"removed {goal.total} of {sum(group.size for group in groups)} units")
        return smaller.eval()

    def factors(self, norms: Tensor, k: int, share: float) -> Tensor:
        """What a step multiplies units of lengths ``norms`` ``(n,)`` by, where ``share`` of the strength is spent."""
        return envelope_prox(norms, k, self.strength * share)


class _Proximal(StepHook):
    """Takes the proximal step after every step of the optimizer."""

    def __init__(
        self, method: GroupEnvelope, model: nn.Module, places: Mapping[str, Sequence[Place]], goal: Goal
    ) -> None:
        self._method, self._places, self._goal = method, places, goal
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._scale = dict.fromkeys(places, 1.0)
        self._scale = {name: float(values.mean()) or 1.0 for name, values in self.norms().items()}

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """``(size,)`` for each group in float64, the lengths of its units over their mean at the start."""
        found = {}
        for name, places in self._places.items():
            squares = []
            for place in places:
                value = self._parameters[place.parameter].double() ** 2
                line = value.sum([dim for dim in range(value.ndim) if dim != place.dim]) if value.ndim > 1 else value
                squares.append(line.cpu()[torch.as_tensor(place.index)].sum(1))
            found[name] = torch.stack(squares).sum(0).sqrt() / self._scale[name]
        return found

    def shortest(self) -> dict[str, list[int]]:
        """The units that are to go, of each group that loses any."""
        gone = self._goal.lowest(self.norms())
        return {name: mask.nonzero().flatten().tolist() for name, mask in gone.items() if bool(mask.any())}

    def _factors(self, share: float) -> dict[str, Tensor]:
        norms, counts = self.norms(), self._goal.counts
        if counts is not None:
            return {name: self._method.factors(each, len(each) - counts[name], share) for name, each in norms.items()}
        sizes = [len(each) for each in norms.values()]
        factors = self._method.factors(torch.cat(list(norms.values())), sum(sizes) - self._goal.total, share)
        return dict(zip(norms, torch.split(factors, sizes), strict=True))

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        for name, part in self._factors(1.0 / total).items():
            for place in self._places[name]:
                value = self._parameters[place.parameter]
                line = torch.ones(value.shape[place.dim], dtype=value.dtype)
                line[torch.as_tensor(place.index)] = part.to(value.dtype)[:, None]
                value.mul_(line.view([-1 if dim == place.dim else 1 for dim in range(value.ndim)]).to(value.device))
