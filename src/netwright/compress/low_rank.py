"""Low-rank factorization of linear layers and convolutions, with ranks shared out by effective rank."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from netwright.compress._layer_inputs import Moments, output_moments
from netwright.compress._low_rank_factors import Count, Option, Way, cost_of, factorized, option_of
from netwright.compress._low_rank_layers import Layer, exchanged, layers_of
from netwright.compress._rounded import is_rounded
from netwright.compress._settings import (
    check_choice,
    check_count,
    check_number,
    check_ratio,
    check_weights,
    checked_paths,
)
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["LowRank"]

Rule = Literal["effective", "uniform"]
Scheme = Literal["auto", "channel", "spatial"]
Metric = Literal["outputs", "weights"]

_HALVINGS = 60
_FIRST = ": its weights are rounded or held in codebooks already. Take this step before that one."


@dataclass(frozen=True)
class LowRank:
    r"""Factorizes linear layers and convolutions into two thin ones, each at a rank of its own.

    Reach for it where layers are wide and what they give is redundant: multilayer perceptrons, transformers, late
    convolutions. The result is an ordinary dense module of smaller layers, faster where matrices are large. It is
    linear algebra, nothing is trained, whatever the budget: let :func:`netwright.core.fit.fit` recover the accuracy
    afterwards.

    The weight :math:`W` of layer :math:`l`, read as a matrix, is projected onto :math:`r_l` directions :math:`U`,
    which give two layers,

    .. math:: W x + b \approx U_{r_l} (U_{r_l}^\top W) x + b_l, \qquad r_l = \mathrm{round}(t\, e_l), \qquad
              e_l = \exp\Big( -\sum_i p_i \log p_i \Big), \quad p_i = \sigma_i / \sum_j \sigma_j

    with :math:`e_l` the effective rank, between 1 and the rank, and :math:`t` the largest factor, common to all layers,
    at which the whole meets the budget. Layers that would not become cheaper stay whole. With ``metric="outputs"``
    :math:`\sigma_i^2` and :math:`U` are the eigenvalues and eigenvectors of the covariance of :math:`W x` on
    calibration data: no other two layers of this rank come closer to the outputs in the mean square; the new bias
    :math:`b_l` keeps their mean. With ``metric="weights"`` they are the singular values
    and left singular vectors of :math:`W`, and :math:`b_l = b`.

    Of a linear layer the matrix is the weight. Of a convolution with :math:`c` inputs, :math:`n` outputs and a kernel
    of :math:`h \times w` it is :math:`n \times chw` ("channel": the kernel with :math:`r` outputs, then 1 x 1) or
    :math:`ch \times nw` ("spatial": :math:`h \times 1`, then :math:`1 \times w`). Grouped and transposed
    convolutions, recurrent and attention modules with packed weights, and weights that are shared or read elsewhere
    stay whole.

    Args:
        ratio: share to remove of the multiply-accumulate operations (or parameters) that all layers of these kinds
            have together, in (0, 1).
        rule: "effective" as above; "uniform" shares ranks out by the full ranks instead.
        metric: what the first directions keep most of.
        scheme: how convolutions are read. "auto" is "channel" where outputs are to be kept, which "spatial" leaves out
            of account; else for each the one whose effective rank costs less.
        count: what ``ratio`` is a share of.
        exclude: paths of modules that stay whole, with all they hold.
        least_share: layers that cost less than this share of the costliest one stay whole: they save next to nothing,
            and a classifier's last layer needs its few outputs.
        calibration_items: training items that ``metric="outputs"`` reads, drawn at random.

    Raises:
        TransformError: a setting outside its range; on a call, an unknown path, weights or activations that are not
            finite, or a ratio that even rank one does not reach.
        NothingToPruneError: on a call, a model without a layer to factorize.
        TraceError: on a call, a model that cannot be traced.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.eye(12), torch.zeros(12).long())
        >>> model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 2))
        >>> task = Task("tiny", model, Data(split(), split(), split()), nn.functional.cross_entropy, lambda o, t: 0.0)
        >>> LowRank(0.5, exclude=["2"])(model, task)
        Sequential(
          (0): Sequential(
            (0): Linear(in_features=12, out_features=3, bias=False)
            (1): Linear(in_features=3, out_features=12, bias=True)
          )
          (1): ReLU()
          (2): Linear(in_features=12, out_features=2, bias=True)
        )

    Source: paper 64, X. Ou, Z. Chen, C. Zhu, Y. Liu, "Low Rank Optimization for Efficient Deep Learning: Making A
    Balance between Compact Architecture and Fast Training", 2023, arXiv 2303.13635; effective rank after O. Roy and
    M. Vetterli, 2007; the spatial scheme after M. Jaderberg, A. Vedaldi and A. Zisserman, 2014, arXiv 1405.3866.

    Differs: the paper uses the effective rank among other measures of sparsity, as a penalty while a factorized
    network is trained; here it shares ranks out over the layers of a network that is already trained. The common
    factor, the projection of outputs rather than weights, and the choice between schemes are ours; without
    calibration data a trained network's weights have nearly flat spectra, and truncating them costs far more.

    Cost: a trace, an evaluation of the calibration items, and for each layer a decomposition in float64: of an
    ``n x n`` matrix for ``n`` outputs (with the sums before it, ``n^2`` for every position of every item), or of the
    weight itself. Memory of a copy of the model and, for each layer, of an ``n x n`` matrix in float64.
    """

    ratio: float = 0.5
    rule: Rule = "effective"
    metric: Metric = "outputs"
    scheme: Scheme = "auto"
    count: Count = "macs"
    exclude: Sequence[str] = ()
    least_share: float = 0.01
    calibration_items: int = 256

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", checked_paths(self, "exclude", self.exclude))
        check_ratio(self, "ratio", self.ratio, what="removes half of the operations")
        for name, kinds in (("rule", Rule), ("metric", Metric), ("scheme", Scheme), ("count", Count)):
            check_choice(self, name, getattr(self, name), get_args(kinds))
        check_number(self, "least_share", self.least_share, high=1.0)
        check_count(self, "calibration_items", self.calibration_items)

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """A copy of ``model`` with factorized layers, in eval mode.

        Args:
            model: any module that ``torch.export`` traces.
            task: its training split calibrates.
            budget: not needed, nothing is trained.
            seed: draws the calibration items.
            progress: told how far it is.
        """
        report = progress or (lambda fraction, what: None)
        check_weights(self, model)
        report(0.0, "tracing")
        smaller = copy.deepcopy(model).eval()
        layers = layers_of(self, smaller, task.example(), self.exclude)
        options = self._options(layers, smaller, task, seed, report)
        if not options:
            raise NothingToPruneError(
                f"{type(model).__name__} has no linear layer or convolution that a lower rank makes cheaper"
                + (f" outside exclude={list(self.exclude)!r}" if self.exclude else "")
                + (_FIRST if is_rounded(model) else ". Leave this step out.")
            )
        ranks = self._ranks(options, layers)
        made = {
            option.layer.name: factorized(option.layer.module, option.way, option.basis, option.mean, rank)
            for option, rank in zip(options, ranks, strict=True)
            if rank * option.unit < option.dense
        }
        report(0.9, f"factorizing {len(made)} layers")
        result = exchanged(smaller, made).eval()
        report(1.0, f"factorized {len(made)} of {len(layers)} layers")
        return result

    def _options(
        self, layers: Sequence[Layer], model: nn.Module, task: Task, seed: int, report: Progress
    ) -> list[Option]:
        """For each layer that can become cheaper the way to factorize it."""
        costs = [cost_of(layer, self.count) for layer in layers]
        layers = [layer for layer, cost in zip(layers, costs, strict=True) if cost >= self.least_share * max(costs)]
        seen = self._seen(layers, model, task, seed)
        found = []
        for position, layer in enumerate(layers):
            report(0.3 + 0.6 * position / len(layers), f"decomposing {layer.name or 'the layer'}")
            ways: tuple[Way, ...] = ("channel",)
            if isinstance(layer.module, nn.Conv2d) and min(layer.module.kernel_size) > 1 and self.scheme != "channel":
                ways = ("spatial",) if self.scheme == "spatial" else ways if seen else ("channel", "spatial")
            options = [
                option_of(layer, way, self.count, seen.get(layer.name) if way == "channel" else None) for way in ways
            ]
            cheaper = [option for option in options if option.unit < option.dense]
            if cheaper:
                found.append(min(cheaper, key=lambda option: option.effective * option.unit))
        return found

    def _seen(self, layers: Sequence[Layer], model: nn.Module, task: Task, seed: int) -> dict[str, Moments]:
        """Moments of what layers give, where outputs are to be kept."""
        if self.metric == "weights":
            return {}
        wanted = {layer.name: layer.module for layer in layers}
        return output_moments(self, model, wanted, task.data.train, self.calibration_items, seed)

    def _ranks(self, options: Sequence[Option], layers: Sequence[Layer]) -> list[int]:
        """The rank of each option at the budget.

        Raises:
            TransformError: a budget below that of rank one everywhere.
        """
        total = sum(cost_of(layer, self.count) for layer in layers)
        fixed = total - sum(option.dense for option in options)
        target = (1 - self.ratio) * total - fixed
        weights = [option.effective if self.rule == "effective" else float(option.full) for option in options]
        least = sum(option.cost(1) for option in options)
        if least > target:
            reachable = 1 - (least + fixed) / total
            raise TransformError(
                f"LowRank.ratio={self.ratio:g} is out of reach: with rank one everywhere {reachable:.3f} of all "
                f"{'operations' if self.count == 'macs' else 'parameters'} would go. Lower the ratio."
            )

        def at(factor: float) -> list[int]:
            return [
                max(1, min(option.full, round(factor * weight)))
                for option, weight in zip(options, weights, strict=True)
            ]

        def cost(factor: float) -> float:
            return sum(option.cost(rank) for option, rank in zip(options, at(factor), strict=True))

        everything = max(option.full / weight for option, weight in zip(options, weights, strict=True))
        return at(_largest(cost, target, everything))


def _largest(cost: Callable[[float], float], target: float, high: float) -> float:
    """The largest argument in ``[0, high]``, to rounding, at which a growing function is at most ``target``."""
    if cost(high) <= target:
        return high
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= target else (low, middle)
    return low
