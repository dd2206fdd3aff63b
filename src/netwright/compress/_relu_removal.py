"""Networks with fewer ReLUs than a given one: which stages matter, what can go, and what is left, trained."""

import copy
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx, nn

from netwright.compress._batch_norms import thaw
from netwright.compress._relus import ReluLayer, find_relus, thinned, without_relus
from netwright.compress._settings import check_weights, require_loss
from netwright.compress._trace import trace
from netwright.compress._training import train
from netwright.compress.prune import Prune
from netwright.core.batch_statistics import reestimate
from netwright.core.data import Inputs, batches
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.evaluate import evaluate
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["ReluPlan", "ReluRemoval", "criticality"]

_BATCH = 128
_ITEMS = 512  # on which batch norms take their statistics anew
_SCALE = 0.5  # share of the channels that reshaping removes


@dataclass(frozen=True)
class ReluPlan:
    """Names of the ReLU layers that go, whether channels go too, and what is left."""

    gone: tuple[str, ...]
    reshaped: bool
    count: int
    steps: str


def criticality(score: float, linear: float, count: int, exponent: float) -> float:
    r""":math:`\max(S_k - S_\emptyset, 0) / N_k^w`."""
    return float(max(score - linear, 0.0) / count**exponent)


class ReluRemoval:
    """Networks with fewer ReLUs, made from one.

    Args:
        owner: the method, for messages and as the one that trains.
        model: what they are made from, and their teacher.
        task: data, loss, score and recipe.
        seed: draws batches.

    Raises:
        TransformError: a model without ReLUs, weights that are not finite, or a task without a loss.
    """

    def __init__(self, owner: object, model: nn.Module, task: Task, seed: int) -> None:
        check_weights(owner, model)
        require_loss(owner, task)
        self.owner, self.model, self.task, self.seed = owner, model, task, seed
        self.whole = self.traced(model)
        self.layers = find_relus(self.whole, task)
        if not self.layers:
            raise TransformError(
                f"DeepReDuce: {type(model).__name__} has no ReLU, so there is nothing to remove. Leave this step out; "
                "other activations are not counted."
            )
        self.teacher = copy.deepcopy(model).eval()
        every = batches(task.data.train, _BATCH, generator=torch.Generator().manual_seed(seed), drop_last=True)
        self.held: list[Inputs] = [inputs for inputs, _ in itertools.islice(every, _ITEMS // _BATCH)]

    def traced(self, model: nn.Module) -> fx.GraphModule:
        """The graph of a model with its batch norms and dropout alive."""
        module = trace(model, self.task, dropouts=True)
        thaw(module)
        module.eval()
        return module

    def criticality(self, exponent: float, epochs: float, report: Progress) -> tuple[Mapping[int, float], float]:
        """How critical each stage is, and the epochs that it took to know."""
        stages = sorted({layer.stage for layer in self.layers})
        if len(stages) == 1:
            return {stages[0]: 1.0}, 0.0
        steps = max(1, len(self.task.data.train) // (self.task.recipe or Recipe()).batch_size)
        share = math.floor(epochs * steps / (len(stages) + 1) + 1e-9) / steps
        scores = []
        for number, stage in enumerate([None, *stages]):
            report(number / (len(stages) + 1), "no ReLUs" if stage is None else f"ReLUs in stage {stage + 1} alone")
            gone = [layer.name for layer in self.layers if layer.stage != stage]
            scores.append(evaluate(self.fitted(without_relus(self.whole, gone), share), self.task, "val"))
        found = {}
        for stage, score in zip(stages, scores[1:], strict=True):
            count = sum(layer.count for layer in self.layers if layer.stage == stage)
            found[stage] = criticality(score, scores[0], count, exponent)
        return found, share * (len(stages) + 1)

    def plans(self, critical: Mapping[int, float], *, reshape: bool = True) -> list[ReluPlan]:
        """Every network within reach: stages culled one by one, each as it is, thinned, and reshaped too."""
        sizes = self.reshaped_sizes if reshape else {}
        order = self.order(critical)
        found: list[ReluPlan] = []
        for culled in range(len(order)):
            left = [layer for layer in self.layers if layer.stage not in order[:culled]]
            thin = thinned(left)
            first = [f"cull {culled}"] if culled else []
            for kept, reshaped, steps in (
                (left, False, first),
                (thin, False, [*first, "thin"]),
                (thin, True, [*first, "thin", "reshape"] if len(thin) < len(left) else [*first, "reshape"]),
            ):
                names = {layer.name for layer in kept}
                gone = tuple(layer.name for layer in self.layers if layer.name not in names)
                if (not gone and not reshaped) or (reshaped and not sizes):
                    continue
                count = sum(sizes[layer.name] if reshaped else layer.count for layer in kept)
                if all((plan.gone, plan.reshaped) != (gone, reshaped) for plan in found):
                    found.append(ReluPlan(gone, reshaped, count, ", ".join(steps)))
        if not found and reshape:
            raise TransformError(
                f"DeepReDuce: {type(self.model).__name__} has a single ReLU layer, and no channels that could go."
            )
        return found

    def within(self, critical: Mapping[int, float], limit: float) -> list[ReluPlan]:
        """The plans of at most ``limit`` ReLUs, reshaped ones where there are no others; nothing where there is none.

        The most critical stage is not culled, or, where it cannot be made small enough, the most critical that can.
        """
        for last in reversed(self.order(critical)):
            for reshape in (False, True):
                plans = self.plans({**critical, last: math.inf}, reshape=reshape)
                if found := [plan for plan in plans if plan.count <= limit]:
                    return found
        return []

    def least(self, *, reshape: bool) -> float:
        """The fewest ReLUs that any plan leaves, whichever stages turn out to be critical."""
        stages = dict.fromkeys((layer.stage for layer in self.layers), 0.0)
        plans = (self.plans({**stages, last: math.inf}, reshape=reshape) for last in stages)
        return min((plan.count for plan in itertools.chain(*plans)), default=math.inf)

    def order(self, critical: Mapping[int, float]) -> list[int]:
        """The stages as they are culled."""
        return sorted(critical, key=lambda stage: (critical[stage], -self.stage_count(stage)))

    def stage_count(self, stage: int) -> int:
        return sum(layer.count for layer in self.layers if layer.stage == stage)

    @cached_property
    def reshaped_sizes(self) -> Mapping[str, int]:
        """ReLUs of every layer when half of the channels are gone; nothing where none can go."""
        try:
            narrow = find_relus(self.traced(self.narrow()), self.task)
        except NothingToPruneError:
            return {}
        if len(narrow) != len(self.layers):
            return {}
        return {layer.name: other.count for layer, other in zip(self.layers, narrow, strict=True)}

    def narrow(self) -> nn.Module:
        """The model without half of its channels."""
        return Prune(_SCALE)(self.model, self.task, seed=self.seed)

    def trained(self, plan: ReluPlan, epochs: float, report: Progress) -> nn.Module:
        """The network of a plan, trained."""
        module, layers = self.whole, self.layers
        names = set(plan.gone)
        if plan.reshaped:
            module = self.traced(self.narrow())
            pairs: list[tuple[ReluLayer, ReluLayer]] = list(zip(layers, find_relus(module, self.task), strict=True))
            names = {other.name for layer, other in pairs if layer.name in names}
        return self.fitted(without_relus(module, names), epochs, report)

    def fitted(self, module: nn.Module, epochs: float, report: Progress | None = None) -> nn.Module:
        """A network after distillation from the given one."""
        reestimate(module, self.held)
        if epochs <= 0:
            return module.eval()
        return train(
            self.owner, module, self.task, epochs=epochs, seed=self.seed, teacher=self.teacher, progress=report
        )
