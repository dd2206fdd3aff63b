"""Fewer ReLUs: whole stages of them go first, then every other layer, then channels."""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from netwright.compress._relu_removal import ReluRemoval
from netwright.compress._relus import find_relus
from netwright.compress._settings import check_number, check_ratio
from netwright.compress._trace import trace
from netwright.core.errors import TransformError
from netwright.core.evaluate import evaluate
from netwright.core.front import Front
from netwright.core.randomness import isolated
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["DeepReDuce", "ReluPoint", "count_relus", "relu_front"]


@dataclass(frozen=True)
class ReluPoint:
    """One network of a front.

    Args:
        count: ReLUs that one item meets.
        score: on the validation split.
        steps: how it came about, as "cull 1, thin, reshape".
        model: the trained network.
    """

    count: int
    score: float
    steps: str
    model: nn.Module


def count_relus(model: nn.Module, task: Task) -> int:
    """ReLUs that one item meets in ``model``: the elements of the outputs of all ReLU layers.

    Raises:
        TraceError: a model that cannot be traced.

    Example:
        >>> from netwright.core.task import load_task
        >>> task = load_task("breast-cancer")
        >>> count_relus(nn.Sequential(nn.Linear(30, 7), nn.ReLU(), nn.Linear(7, 2)), task)
        7
    """
    return sum(layer.count for layer in find_relus(trace(model, task), task))


@dataclass(frozen=True)
class DeepReDuce:
    r"""Removes most of the ReLUs of a network and trains what is left towards the network it was.

    Reach for it where each ReLU is dear: inference on encrypted data, circuits, verification. The number of ReLUs is
    that of the elements which pass through one; convolutions and other linear layers count nothing.

    ReLU layers in a row at the same resolution are a stage. How critical stage :math:`k` is tells a network in which
    it alone has ReLUs,

    .. math:: C_k = \frac{\max(S_k - S_\emptyset, 0)}{N_k^{\,w}}

    with :math:`S_k` its validation score after a little distillation, :math:`S_\emptyset` that of the network without
    ReLUs and :math:`N_k` the number of ReLUs in the stage. Then, in this order and as far as needed:

    1. culling: the ReLUs of the least critical stages go;
    2. thinning: of the layers in the stages that are left, every other one goes, the last of each stage stays;
    3. reshaping: half of the channels go.

    Of all networks so described, the one with most ReLUs within the limit is trained, ``model`` being its teacher;
    one with its channels left is preferred. Where the most critical stage alone is too large for the limit, the most
    critical one that is not stays in its place. :func:`relu_front` trains all of them.

    Args:
        ratio: the share of ReLUs that may be left, in (0, 1).
        exponent: :math:`w` of the number of ReLUs.
        probe: share of the budget that finds :math:`C_k`; 0 takes scores without training.

    Raises:
        TransformError: a setting outside its range; on a call, a ratio below what can be reached, a model without
            ReLUs, weights that are not finite, a task without a loss, or, to be trained, one that trains by its own
            ``fit``.
        TraceError: on a call, a model that cannot be traced.

    Example:
        >>> from netwright.core.task import load_task
        >>> task = load_task("breast-cancer")
        >>> model = nn.Sequential(nn.Linear(30, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2))
        >>> count_relus(model, task), count_relus(DeepReDuce(0.5)(model, task, budget=1), task)
        (18, 9)

    Source: 167. N. K. Jha, Z. Ghodsi, S. Garg, B. Reagen. DeepReDuce: ReLU Reduction for Fast Private Inference. 2021.
        arXiv:2103.01396.

    Differs: networks go on from the given weights, where the paper trains each from scratch. Criticality counts the
    score gained over the network without any ReLU, so that it also serves for scores that are negative. Reshaping
    removes the channels of least magnitude; the paper's other reshaping, of the resolution, is the data's business.
    Dropout within attention and recurrent layers is gone, also in training; any other stays.

    Cost: ``probe`` of the budget is shared by one more fit than there are stages, the rest trains the result;
    :func:`relu_front` trains up to three networks for each stage. Memory: two copies of the model.
    """

    trains: ClassVar[bool] = True

    ratio: float = 0.33
    exponent: float = 0.07
    probe: float = 0.3

    def __post_init__(self) -> None:
        check_ratio(self, "ratio", self.ratio, what="leaves half of the ReLUs")
        check_number(self, "exponent", self.exponent)
        check_number(self, "probe", self.probe, high=0.9)

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """A trained network with fewer ReLUs as a traced graph, in eval mode; ``model`` is its teacher.

        Args:
            model: any module that ``torch.export`` traces, with ReLUs in it.
            task: its training split trains, its validation split ranks the stages.
            budget: epochs in all; None is the recipe's, 0 trains nothing.
            seed: draws batches.
            progress: told how far it is.
        """
        report = progress or (lambda fraction, what: None)
        epochs = (task.recipe or Recipe()).epochs if budget is None else budget
        with isolated(seed):
            return self._reduced(ReluRemoval(self, model, task, seed), epochs, report)

    def _reduced(self, maker: ReluRemoval, epochs: float, report: Progress) -> nn.Module:
        total = sum(layer.count for layer in maker.layers)
        limit = self.ratio * total + 1e-9
        if maker.least(reshape=False) > limit and (least := maker.least(reshape=True)) > limit:
            raise TransformError(
                f"DeepReDuce: a ratio of {self.ratio:g} is out of reach for {type(maker.model).__name__}; the smallest "
                f"share of its {total} ReLUs that can be left is {math.ceil(1000 * least / total) / 1000:.3f}. Raise "
                "ratio."
            )
        critical, spent = maker.criticality(
            self.exponent, self.probe * epochs, lambda f, what: report(self.probe * f, what)
        )
        allowed = maker.within(critical, limit)
        chosen = max(allowed, key=lambda plan: (not plan.reshaped, plan.count))
        what = f"{chosen.count} of {total} ReLUs are left: {chosen.steps}"
        report(self.probe, what)
        result = maker.trained(
            chosen, epochs - spent, lambda f, word: report(self.probe + (0.99 - self.probe) * f, word)
        )
        report(1.0, what)
        return result


def relu_front(
    model: nn.Module,
    task: Task,
    *,
    budget: float | None = None,
    seed: int = 0,
    settings: DeepReDuce | None = None,
    progress: Progress | None = None,
) -> Front[ReluPoint]:
    """The front of ReLU count against score that culling, thinning and reshaping reach, ``model`` included.

    Args:
        model: as for :class:`DeepReDuce`.
        task: likewise; scores are those on its validation split.
        budget: epochs for each network; None is the recipe's. ``settings.probe`` of one network's goes to the ranking.
        seed: draws batches.
        settings: exponent and probe; its ratio is not looked at.
        progress: told how far it is.

    Raises:
        TransformError, TraceError: as :class:`DeepReDuce`.

    Example:
        >>> from netwright.core.task import load_task
        >>> task = load_task("breast-cancer")
        >>> model = nn.Sequential(nn.Linear(30, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2))
        >>> counts = [point.count for point in relu_front(model, task, budget=1)]
        >>> counts == sorted(set(counts)) and max(counts) <= 18
        True
    """
    chosen = settings or DeepReDuce()
    report = progress or (lambda fraction, what: None)
    epochs = (task.recipe or Recipe()).epochs if budget is None else budget
    with isolated(seed):
        maker = ReluRemoval(chosen, model, task, seed)
        critical, _ = maker.criticality(chosen.exponent, chosen.probe * epochs, lambda f, what: report(0.1 * f, what))
        plans = maker.plans(critical)
        whole = sum(layer.count for layer in maker.layers)
        points = [ReluPoint(whole, evaluate(model, task, "val"), "whole", copy.deepcopy(model).eval())]
        for number, plan in enumerate(plans):
            report(0.1 + 0.9 * number / len(plans), f"{plan.count} of {whole} ReLUs: {plan.steps}")
            trained = maker.trained(plan, epochs, lambda fraction, what: None)
            points.append(ReluPoint(plan.count, evaluate(trained, task, "val"), plan.steps, trained))
    report(1.0, f"{len(points)} networks")
    return Front(points, [lambda point: float(point.count), lambda point: -point.score])
