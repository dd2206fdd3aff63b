"""Shallower convolutional networks: some layers and activations go, what then follows each other becomes one layer."""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

from torch import fx, nn

from netwright.compress._batch_norms import thaw
from netwright.compress._held_items import held_items, loss_of
from netwright.compress._merge_chains import find_chains
from netwright.compress._merge_plan import Actions, Choice, Entry, best_path, choices, least, merge_all
from netwright.compress._merge_tables import CostKind, choice_costs, importance, with_choices
from netwright.compress._settings import (
    check_choice,
    check_count,
    check_number,
    check_ratio,
    check_weights,
    require_loss,
)
from netwright.compress._trace import trace
from netwright.compress._training import train
from netwright.core.batch_statistics import reestimate
from netwright.core.errors import TransformError
from netwright.core.randomness import isolated
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["LayerMerge"]

_LEVELS = 500  # ticks into which the time limit is cut


@dataclass(frozen=True)
class LayerMerge:
    r"""Makes a convolutional network shallower: leaves out layers and activations together, and merges what remains.

    Reach for it where depth costs time: many small convolutions in a row, inverted residuals, bottlenecks. Two
    convolutions without an activation between them are one, with a kernel of :math:`k_1 + s_1 (k_2 - 1)`; that larger
    kernel can eat up what the merge gains, which is why layers between are left out at the same time.

    The layers of all chains (convolution, batch norm, at most one sum with a skip, at most one activation) are numbered
    :math:`1, \dots, n`. A choice :math:`(i, j, k)` lets no activation survive strictly between positions :math:`i` and
    :math:`j` and makes one convolution with kernel :math:`k` of the layers between; a layer that goes becomes the
    identity. Of all sets of layers with that kernel, the one with the largest :math:`\sum |w|` stays. With the measured
    time :math:`T_{ijk}` and the importance

    .. math:: I_{ijk} = \exp(L_0 - L_{ijk})

    where :math:`L_0` is the loss of the network and :math:`L_{ijk}` that of the network with this choice alone, the
    path from 0 to :math:`n` is taken that maximizes

    .. math:: \sum (j - i)\, I_{ijk} \quad \text{subject to} \quad \sum T_{ijk} \le r \sum T_{\text{now}}

    by dynamic programming over :math:`(j, t)`: the best of all such paths for times in 500 ticks. The layers of each
    choice then see their input padded once, for all of them; the network is trained in that form, batch norms and
    dropout alive and ``model`` its teacher, and only then merged, which is exact. A skip that begins and ends within a
    choice becomes part of its kernel, with the identity or its own convolution as weights.

    Args:
        ratio: :math:`r`, what the chains may cost, as a share of what they cost now, in (0, 1).
        cost: "latency" measures every convolution that occurs in ONNX Runtime, batch size 1 on one thread, once in a
            process; "macs" counts multiply-accumulates, the same on every machine.
        actions: "both", "merge" (no layer goes) or "prune" (nothing is merged: layers go with their activations).
        span: the most layers that a choice may hold.
        probe: share of the budget that is spent on training every choice a little before its loss is taken; 0 takes
            the loss as it is.
        items: training items on which losses are taken and batch norms set.

    Raises:
        TransformError: a setting outside its range; on a call, a ratio below what can be reached, a model in which
            nothing can be merged or left out, weights that are not finite, a task without a loss or, to be trained,
            one that trains by its own ``fit``.
        TraceError: on a call, a model that cannot be traced.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.rand(16, 1, 6, 6), torch.zeros(16).long())
        >>> conv = lambda i, o, k: nn.Conv2d(i, o, k, padding=k // 2)
        >>> model = nn.Sequential(conv(1, 8, 1), nn.ReLU(), conv(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> task = Task("tiny", model, Data(split(), split(), split()), nn.functional.cross_entropy, lambda o, t: 0.0)
        >>> smaller = LayerMerge(0.5, cost="macs")(model, task, budget=1)
        >>> [tuple(value.shape) for value in smaller.parameters() if value.ndim == 4]
        [(4, 1, 3, 3)]

    Source: 100. J. Kim, M. El Halabi, M. Ji, H. O. Song. LayerMerge: Neural Network Depth Compression through Layer
        Pruning and Merging. 2024. arXiv:2406.12837.

    Differs: zeros padded between two layers have no counterpart in a merged one, so that a choice pads once, before its
        first layer; its border pixels differ from the given network's, which training makes up for, and merging adds
        no error. A skip whose branch loses all of its layers stays alone (the branch counts as zero, not as the
        identity), which also lets branches go whose layers change the number of channels. Losses stand in for
        accuracies, without training where ``probe`` is 0, with batch norms set anew. The factor :math:`j - i`, by which
        each layer counts with the importance of what it is part of, is not the paper's: without it a path has more the
        more choices it consists of, and leaving out three layers one by one counted for more than merging them. Times
        are tenth percentiles, less that of a call that does nothing. Convolutions that read a concatenation, a pooled
        image, an explicitly padded one or a norm that is not folded begin a chain of their own, as do those that share
        their weights. Dropout within attention and recurrent layers is gone, also in training; any other stays.

    Cost: a trace; one evaluation of ``items`` items for each choice, of which there are at most ``span`` times a few
        for each layer; 0.06 s for each different convolution; then the budget's training. Sets of layers are
        enumerated, :math:`2^{span}` of them at most. Memory: a copy of the model for the choice at hand.
    """

    trains: ClassVar[bool] = True

    ratio: float = 0.6
    cost: CostKind = "latency"
    actions: Actions = "both"
    span: int = 6
    probe: float = 0.0
    items: int = 512

    def __post_init__(self) -> None:
        check_ratio(self, "ratio", self.ratio, what="halves the time of the convolutions")
        check_choice(self, "cost", self.cost, get_args(CostKind))
        check_choice(self, "actions", self.actions, get_args(Actions))
        check_count(self, "span", self.span)
        check_number(self, "probe", self.probe, high=0.9)
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
        """A shallower network as a traced graph, in eval mode; ``model`` is its teacher and stays as it is.

        Args:
            model: any module that ``torch.export`` traces, with convolutions of images in it.
            task: its training split gives losses and trains.
            budget: epochs in all; None is the recipe's, 0 trains nothing.
            seed: draws calibration items and batches.
            progress: told how far it is.
        """
        report = progress or (lambda fraction, what: None)
        epochs = (task.recipe or Recipe()).epochs if budget is None else budget
        with isolated(seed):
            module, chosen, spent = self._planned(model, task, epochs, seed, report)
        layers = sum(each.stop - each.start for each in chosen)
        report(0.4, f"{layers} layers become {sum(not each.empty for each in chosen)}")
        result: nn.Module = with_choices(module, chosen)
        held = held_items(task, self.items, seed)
        reestimate(result, [inputs for inputs, _ in held])
        if epochs - spent > 0:
            teacher = copy.deepcopy(model).eval()
            result = train(
                self,
                result,
                task,
                epochs=epochs - spent,
                seed=seed,
                teacher=teacher,
                progress=lambda fraction, what: report(0.4 + 0.59 * fraction, what),
            )
        assert isinstance(result, fx.GraphModule)
        merge_all(result.eval())
        report(1.0, "merged")
        return result.eval()

    def plan(self, model: nn.Module, task: Task, *, budget: float | None = None, seed: int = 0) -> list[Choice]:
        """The choices that a call takes, in the order of the layers."""
        epochs = (task.recipe or Recipe()).epochs if budget is None else budget
        with isolated(seed):
            return self._planned(model, task, epochs, seed, lambda fraction, what: None)[1]

    def _planned(
        self, model: nn.Module, task: Task, epochs: float, seed: int, report: Progress
    ) -> tuple[fx.GraphModule, list[Choice], float]:
        """The traced model, the choices to take, and the epochs that were spent on finding them."""
        check_weights(self, model)
        require_loss(self, task)
        report(0.0, "tracing")
        module = trace(model, task, dropouts=True)
        thaw(module)
        module.eval()
        chains = find_chains(module)
        found = choices(module, chains, self.span, self.actions)
        if all(choice.original for choice in found):
            raise TransformError(
                f"LayerMerge: {type(model).__name__} has no two convolutions that follow each other and none that "
                f"could go (actions={self.actions!r}), so there is nothing to merge. Leave this step out."
            )
        report(0.02, f"measuring {len(found)} choices")
        offsets = [0, *itertools.accumulate(len(chain.layers) for chain in chains)]
        entries = [
            Entry(offsets[choice.chain] + choice.start, offsets[choice.chain] + choice.stop, time, 1.0)
            for choice, time in zip(found, choice_costs(module, chains, found, self.cost), strict=True)
        ]
        now = math.fsum(entry.time for choice, entry in zip(found, entries, strict=True) if choice.original)
        shortest = least(entries, offsets[-1])
        reached = math.fsum(entries[number].time for number in shortest)
        if reached > self.ratio * now:
            raise TransformError(
                f"LayerMerge: a ratio of {self.ratio:g} is out of reach for {type(model).__name__}; the smallest that "
                f"any choice of layers reaches is {math.ceil(1000 * reached / now) / 1000:.3f}. Raise ratio, or allow "
                "more with actions='both' and a larger span."
            )
        worth, spent = self._importances(module, found, task, epochs, seed, report)
        entries = [
            entry._replace(importance=(entry.stop - entry.start) * each)
            for entry, each in zip(entries, worth, strict=True)
        ]
        path = best_path(entries, offsets[-1], self.ratio * now, _LEVELS) or shortest
        return module, [found[number] for number in path], spent

    def _importances(
        self, module: fx.GraphModule, found: Sequence[Choice], task: Task, epochs: float, seed: int, report: Progress
    ) -> tuple[list[float], float]:
        """The importance of each choice, and the epochs spent on them."""
        held = held_items(task, self.items, seed)
        base = loss_of(copy.deepcopy(module), task, held)
        share = self._share(task, epochs, sum(not choice.original for choice in found))
        worth, spent = [], 0.0
        for number, choice in enumerate(found):
            if choice.original:
                worth.append(1.0)
                continue
            report(0.05 + 0.35 * number / len(found), f"importance of choice {number + 1} of {len(found)}")
            changed: nn.Module = with_choices(module, [choice])
            if share > 0:
                reestimate(changed, [inputs for inputs, _ in held])
                changed = train(self, changed, task, epochs=share, seed=seed)
                spent += share
            worth.append(importance(loss_of(changed, task, held), base))
        return worth, spent

    def _share(self, task: Task, epochs: float, count: int) -> float:
        """Epochs for each choice, in whole iterations; 0 where not one is affordable."""
        recipe = task.recipe or Recipe()
        steps = max(1, len(task.data.train) // recipe.batch_size)
        return math.floor(self.probe * epochs * steps / count + 1e-9) / steps
