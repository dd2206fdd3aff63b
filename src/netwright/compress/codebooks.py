"""Weights in a few bits each: codebooks for groups of similar neurons, learned together with the mapping to them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from netwright.compress._codebook_learning import LearnedCodebooks, MappingSteps
from netwright.compress._codebook_start import alike, kmeans
from netwright.compress._codebook_storage import StoredCodebooks, attach, codebook_bytes
from netwright.compress._low_rank_layers import layers_of
from netwright.compress._rounded import is_rounded
from netwright.compress._settings import check_count, check_flag, check_number, check_weights, checked_paths
from netwright.compress._training import train
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.recipe import Recipe
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["Codebooks"]

_PER_WORD = 128  # weights for each codeword of a layer, at least, before a layer gets another codebook
_TWICE = ": its weights are rounded already. Leave one of the two steps out."


@dataclass(frozen=True)
class Codebooks:
    r"""Writes the weights of linear layers and convolutions in ``bits`` bits each, with learned values.

    Reach for it where the size of a network counts: 2 to 4 bits a weight make it 16 to 8 times smaller, on disk and in
    the weights file. It is not faster: weights are put together when the file is loaded (in ONNX) or at every
    call (in torch).

    Rows of a weight (output neurons) of similar distribution share a codebook of :math:`K = 2^b` words. A weight of row
    :math:`i` is

    .. math:: w_{ij} = C_{g(i), m_{ij}}, \qquad m_{ij} = \arg\max_k \ell_{ijk}

    with :math:`g(i)` the group of the row, :math:`C` the codebooks and :math:`\ell` the logits of the mapping, which
    start at minus the squared distance between the weight and each word, in units of the mean distance :math:`\Delta`
    between neighbouring words; codebooks start from k-means in each group. Then both are learned, the codebooks by the
    gradient of the loss, and the mapping along :math:`-\partial L / \partial \ell`. Straight through the argmax,
    relative to the present word and in that unit, that is
    :math:`\frac{\partial L}{\partial w_{ij}} (C_k - w_{ij}) / \Delta`, largest for the words farthest away. The
    proximal search takes instead

    .. math:: \frac{\partial L}{\partial \ell_{ijk}} := \frac{\partial L}{\partial w_{ij}} \,
              \frac{\mathrm{sign}(C_k - w_{ij})}{\lvert C_k - w_{ij} \rvert / \Delta}

    so that a weight moves to a neighbour first.

    Layers whose weights are shared or read elsewhere, grouped and transposed convolutions, embeddings, and layers that
    would not become smaller stay whole, and are trained along.

    Args:
        bits: of one index, from 1 to 8.
        groups: codebooks of one layer, at most; fewer where a codeword would stand for fewer than 128 weights.
        reach: how far the mapping may move: about how many times the distance from a word to the edge of its cell
            a weight covers whose gradient is typical of its layer and never changes sign; 0 keeps that of k-means.
        proximal: the proximal search, or the straight-through gradient.
        rate: factor on the learning rates of the recipe.
        distill: match the outputs of the given model too.
        exclude: paths of modules that stay whole, with all they hold.

    Raises:
        TransformError: a setting outside its range; on a call, an unknown path, weights that are not finite, or a
            task without a loss, or that trains by its own ``fit``, where anything is to be trained.
        NothingToPruneError: on a call, a model without a layer that becomes smaller.
        TraceError: on a call, a model that cannot be traced.

    Example:
        >>> from netwright.core.task import load_task
        >>> task = load_task("breast-cancer")
        >>> model = task.build(seed=0)
        >>> smaller = Codebooks(bits=2, groups=1)(model, task, budget=0)
        >>> sorted({len(layer.weight.unique()) for layer in smaller.modules() if isinstance(layer, nn.Linear)})[0]
        4

    Source: paper 47, E. Yvinec, A. Dapogny, K. Bailly, "Network Memory Footprint Compression Through Jointly Learnable
    Codebooks and Mappings", 2023, arXiv 2309.17361.

    Differs: learned end to end, with the given model as teacher, where the paper reconstructs layer after layer. Rows
    are not re-ordered: a byte for each names its codebook, which needs no neighbour to be permuted and costs less than
    a hundredth of a bit for each weight in layers of some width. The proximal gradient is one over the distance (the
    paper asks for a decreasing function of it), and logits move by slopes averaged over some steps and divided by the
    largest root mean square of the layer so far. A parameterization of the recipe is left out.

    Cost: k-means, linear in the weights but for a sort; in training ``2^bits`` operations a step for each weight beside
    the pass itself, and a logit for each of its words in memory. Stored: ``bits / 8`` bytes for each weight, one for
    each row, and the codebooks.
    """

    bits: int = 3
    groups: int = 4
    reach: float = 2.0
    proximal: bool = True
    rate: float = 0.3
    distill: bool = True
    exclude: Sequence[str] = ()

    trains: ClassVar[bool] = True
    low_precision: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", checked_paths(self, "exclude", self.exclude))
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise TransformError(
                f"Codebooks.bits must be an integer from 1 to 8, got {self.bits!r}. Indices of 2 to 4 bits keep most "
                "of the accuracy."
            )
        check_count(self, "groups", self.groups)
        if self.groups > 256:
            raise TransformError(f"Codebooks.groups must be at most 256, got {self.groups}: a row names its in a byte.")
        check_number(self, "reach", self.reach)
        check_number(self, "rate", self.rate, above=True)
        for name in ("proximal", "distill"):
            check_flag(self, name, getattr(self, name))

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """A copy of ``model`` that reads weights out of codebooks, in eval mode; these train as parameters.

        Args:
            model: any module that ``torch.export`` traces.
            task: its training split trains.
            budget: epochs; None is the recipe's, 0 leaves codebooks and mappings at k-means.
            seed: draws the first centres of the groups, and the batches.
            progress: told how far it is.
        """
        report = progress or (lambda fraction, what: None)
        check_weights(self, model)
        report(0.0, "tracing")
        smaller = copy.deepcopy(model).eval()
        layers = [layer.module for layer in layers_of(self, smaller, task.example(), self.exclude)]
        layers = [layer for layer in layers if self._smaller(layer)]
        if not layers:
            raise NothingToPruneError(
                f"{type(model).__name__} has no linear layer or ungrouped convolution that codebooks of {self.bits} "
                "bits make smaller"
                + (f" outside exclude={list(self.exclude)!r}" if self.exclude else "")
                + (_TWICE if is_rounded(model) else ". Lower bits, or leave this step out.")
            )
        parts = []
        for position, layer in enumerate(layers):
            report(0.05 + 0.15 * position / len(layers), f"k-means over {layer.weight.numel()} weights")
            parts.append(self._learning(layer, torch.Generator().manual_seed(seed + position)))
        epochs = (task.recipe or Recipe()).epochs if budget is None else budget
        if epochs > 0:
            recipe = (task.recipe or Recipe()).scaled(self.rate)
            train(
                self,
                smaller,
                task,
                epochs=epochs,
                seed=seed,
                hook=MappingSteps(parts, self.reach, self.proximal),
                teacher=copy.deepcopy(model).eval() if self.distill else None,
                progress=lambda fraction, what: report(0.2 + 0.75 * fraction, what),
                optimizer_settings=recipe.optimizer_settings,
                schedule_settings=recipe.schedule_settings,
            )
        for layer, (mapping, _) in zip(layers, parts, strict=True):
            held: Any = layer.parametrizations
            held["weight"][0] = StoredCodebooks(mapping.index, mapping.groups, self.bits, mapping.shape)
        report(1.0, f"{len(layers)} layers in {self.bits} bits a weight")
        return smaller.eval()

    def _count(self, weight: Tensor) -> int:
        """How many codebooks a layer may have."""
        most = weight.numel() // int(_PER_WORD * 2**self.bits)
        return max(1, min(self.groups, weight.shape[0], most))

    def _smaller(self, layer: nn.Module) -> bool:
        weight = layer.get_parameter("weight")
        width = weight.element_size()
        size = codebook_bytes(len(weight), weight.numel(), self._count(weight), self.bits, width)
        return size < weight.numel() * width

    def _learning(self, layer: nn.Module, generator: torch.Generator) -> tuple[LearnedCodebooks, Tensor]:
        """Put codebooks and a mapping in place of a layer's weight; returns the mapping, and the codebooks."""
        weight = layer.get_parameter("weight").detach().clone()
        rows = weight.flatten(1)
        groups = alike(rows, self._count(weight), generator)
        codebooks = torch.stack(
            [kmeans(rows[groups == group].flatten(), 2**self.bits) for group in range(int(groups.max()) + 1)]
        )
        mapping = LearnedCodebooks(rows, codebooks, groups, tuple(weight.shape))
        attach(layer, codebooks, mapping)
        held: Any = layer.parametrizations
        parameter: Tensor = held["weight"].original
        return mapping, parameter
