"""Convolutions as 1 x 1, depthwise, 1 x 1, from a canonical polyadic decomposition whose components do not cancel."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from netwright.compress._low_rank_factors import factorized, option_of
from netwright.compress._low_rank_layers import Convolution, Layer, exchanged, layers_of, pointwise
from netwright.compress._rounded import is_rounded
from netwright.compress._settings import (
    check_choice,
    check_count,
    check_number,
    check_ratio,
    check_weights,
    checked_paths,
)
from netwright.compress._tensor_decomposition import Objective, compose, corrected, cp_als, tucker2
from netwright.core.errors import NothingToPruneError, TransformError
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["StableCP"]

Decomposition = Literal["stable", "als", "tucker", "svd"]

_FIRST = ": its weights are rounded or held in codebooks already. Take this step before that one."


@dataclass(frozen=True)
class StableCP:
    r"""Writes convolutions with kernels as 1 x 1, depthwise and 1 x 1 convolutions that are stable to train.

    Reach for it for networks of 3 x 3 convolutions (ResNets, VGGs) that a dense kernel makes slow: the layers become
    those of a MobileNet, without changing widths anywhere else. It is algebra on the weights, nothing is trained,
    whatever the budget, and the accuracy drops: let :func:`netwright.core.fit.fit` recover it afterwards.

    The kernel of :math:`S` inputs, :math:`T` outputs and :math:`k` positions is a tensor :math:`X` of
    :math:`k \times S \times T`, and becomes a sum of :math:`R` rank-one tensors

    .. math:: X \approx P = \sum_{r=1}^R a_r \circ b_r \circ c_r

    of which :math:`b_r` are the weights of a 1 x 1 convolution to :math:`R` channels, :math:`a_r` those of a depthwise
    convolution, and :math:`c_r` those of a 1 x 1 convolution back. Alternating least squares (ALS) often ends in huge
    components that cancel each other. They are corrected while the error is preserved:

    .. math:: \min_{a, b, c} f \quad\text{subject to}\quad \lVert X - P \rVert_F \le \delta, \qquad
              f = \sum_r \lVert a_r \rVert^2 \lVert b_r \rVert^2 \lVert c_r \rVert^2 \quad\text{("norm")}

    or :math:`f = \sum_r T \lVert a_r \rVert^2 \lVert b_r \rVert^2 + k \lVert b_r \rVert^2 \lVert c_r \rVert^2
    + S \lVert a_r \rVert^2 \lVert c_r \rVert^2` ("sensitivity"), what noise of variance one in all factors does to
    :math:`P`; with :math:`\delta` the error of ALS times ``tolerance``. For one factor at a time this is a least
    norm problem with one quadratic constraint, solved exactly.

    Only ungrouped convolutions with kernels are written so; 1 x 1 convolutions and linear layers are matrices:
    :class:`netwright.compress.LowRank` is for them.

    Args:
        ratio: share of the multiply-accumulate operations of each such convolution to remove, in (0, 1); it gives the
            rank. Convolutions that not even rank one makes so cheap stay whole.
        decomposition: "stable" as above; "als" without the correction; "tucker" (1 x 1, full kernel, 1 x 1); "svd"
            (full kernel with fewer outputs, 1 x 1).
        objective: what the correction makes small.
        tolerance: how much larger than that of ALS the error may become, at least 1.
        sweeps: at most so many rounds of ALS, and of the correction.
        exclude: paths of modules that stay whole, with all they hold. A first convolution with few inputs gains little.

    Raises:
        TransformError: a setting outside its range; on a call, an unknown path, weights that are not finite, or a ratio
            that no convolution reaches.
        NothingToPruneError: on a call, a model without a convolution of this kind.
        TraceError: on a call, a model that cannot be traced.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.rand(8, 8, 3, 3), torch.zeros(8).long())
        >>> model = nn.Sequential(nn.Conv2d(8, 8, 3, padding="same"), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(8, 2))
        >>> task = Task("tiny", model, Data(split(), split(), split()), nn.functional.cross_entropy, lambda o, t: 0.0)
        >>> StableCP(0.5)(model, task)[0]
        Sequential(
          (0): Conv2d(8, 11, kernel_size=(1, 1), stride=(1, 1), bias=False)
          (1): Conv2d(11, 11, kernel_size=(3, 3), stride=(1, 1), padding=same, groups=11, bias=False)
          (2): Conv2d(11, 8, kernel_size=(1, 1), stride=(1, 1))
        )

    Source: paper 128, A.-H. Phan, K. Sobolev, K. Sozykin, D. Ermilov, J. Gusak, P. Tichavsky, V. Glukhov, I. Oseledets,
    A. Cichocki, "Stable Low-rank Tensor Decomposition for Compression of Convolutional Neural Network", 2020, arXiv
    2008.05441; the correction after Phan, Tichavsky and Cichocki, "Error Preserving Correction", 2019, arXiv
    1709.08349.

    Differs: one share of operations for all convolutions gives the ranks, where the paper searches for the smallest
    rank of each layer at which the accuracy stays; the decomposition starts from plain ALS and is corrected once. The
    paper's combination of Tucker and CP is left out. Factors are scaled to equal root mean squares, which minimizes the
    sensitivity over all scalings (derived).

    Cost: a trace, and for each convolution at most ``2 sweeps`` rounds of ``3 k S T R`` multiply-accumulates and three
    decompositions of ``R x R`` matrices, in float64. Memory of a copy of the model and a few kernels in float64.
    """

    ratio: float = 0.5
    decomposition: Decomposition = "stable"
    objective: Objective = "sensitivity"
    tolerance: float = 1.01
    sweeps: int = 300
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "exclude", checked_paths(self, "exclude", self.exclude))
        check_ratio(self, "ratio", self.ratio, what="removes half of the operations of each convolution")
        check_choice(self, "decomposition", self.decomposition, get_args(Decomposition))
        check_choice(self, "objective", self.objective, get_args(Objective))
        check_number(self, "tolerance", self.tolerance, low=1.0)
        check_count(self, "sweeps", self.sweeps)

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """A copy of ``model`` with decomposed convolutions, in eval mode.

        Args:
            model: any module that ``torch.export`` traces.
            task: gives example inputs.
            budget: not needed, nothing is trained.
            seed: draws the columns that ALS starts from where singular vectors are too few.
            progress: told how far it is.
        """
        report = progress or (lambda fraction, what: None)
        check_weights(self, model)
        report(0.0, "tracing")
        smaller = copy.deepcopy(model).eval()
        layers = [
            layer
            for layer in layers_of(self, smaller, task.example(), self.exclude)
            if not isinstance(layer.module, nn.Linear) and prod(layer.module.kernel_size) > 1
        ]
        if not layers:
            raise NothingToPruneError(
                f"{type(model).__name__} has no ungrouped convolution with a kernel of more than one position"
                + (f" outside exclude={list(self.exclude)!r}" if self.exclude else "")
                + (_FIRST if is_rounded(model) else ". Leave this step out.")
            )
        ranks = {layer.name: self._ranks(layer) for layer in layers}
        chosen = [layer for layer in layers if min(ranks[layer.name]) > 0]
        if not chosen:
            most = max(1 - self._cost(layer, (1, 1)) / layer.macs for layer in layers)
            raise TransformError(
                f"StableCP.ratio={self.ratio:g} is out of reach: at rank one at most {most:.3f} of the operations of "
                "any convolution would go. Lower the ratio."
            )
        made = {}
        for position, layer in enumerate(chosen):
            report(0.1 + 0.8 * position / len(chosen), f"decomposing {layer.name or 'the layer'}")
            made[layer.name] = self._decomposed(
                layer, ranks[layer.name], torch.Generator().manual_seed(seed + position)
            )
        result = exchanged(smaller, made).eval()
        report(1.0, f"decomposed {len(made)} convolutions")
        return result

    def _ranks(self, layer: Layer) -> tuple[int, int]:
        """The largest ranks, of inputs and outputs, at which the layer costs no more than it may; (0, 0) for none.

        Both are the same but for Tucker, where they are in proportion to the channels.
        """
        outputs, inputs = layer.module.weight.shape[:2]
        size = prod(layer.module.weight.shape[2:])
        most = min(outputs, inputs * size)
        if self.decomposition in ("stable", "als"):
            most = min(size * inputs, size * outputs, inputs * outputs)
        best = (0, 0)
        for rank in range(1, max(inputs, outputs, most) + 1):
            ranks = (rank, rank)
            if self.decomposition == "tucker":
                share = rank / max(inputs, outputs)
                ranks = (max(1, int(share * inputs)), max(1, int(share * outputs)))
            elif rank > most:
                break
            if self._cost(layer, ranks) > (1 - self.ratio) * layer.macs:
                break
            best = ranks
        return best

    def _cost(self, layer: Layer, ranks: tuple[int, int]) -> float:
        """Multiply-accumulate operations of one item."""
        outputs, inputs = layer.module.weight.shape[:2]
        size = prod(layer.module.weight.shape[2:])
        first, second = ranks
        if self.decomposition == "svd":
            return layer.after * first * (inputs * size + outputs)
        kernel = size * first * second if self.decomposition == "tucker" else size * first
        return layer.before * inputs * first + layer.after * (kernel + second * outputs)

    def _decomposed(self, layer: Layer, ranks: tuple[int, int], generator: torch.Generator) -> nn.Sequential:
        module = layer.module
        assert not isinstance(module, nn.Linear)
        if self.decomposition == "svd":
            whole = option_of(layer, "channel", "macs", None)
            return factorized(module, "channel", whole.basis, whole.mean, ranks[0])
        tensor = kernel_tensor(module)
        if self.decomposition == "tucker":
            core, left, right = tucker2(tensor, ranks)
            return _chain(module, left.t(), core.permute(2, 1, 0), right, groups=1)
        factors = cp_als(tensor, ranks[0], self.sweeps, generator)
        if self.decomposition == "stable":
            bound = self.tolerance * float((tensor - compose(factors)).norm())
            factors = corrected(tensor, factors, bound, self.sweeps, self.objective)
        space, inward, outward = factors
        return _chain(module, inward.t(), space.t()[:, None], outward, groups=ranks[0])


def kernel_tensor(module: Convolution) -> Tensor:
    """The kernel as a tensor ``(positions, inputs, outputs)`` in float64."""
    return module.weight.detach().double().flatten(2).permute(2, 1, 0)


def _chain(module: Convolution, inward: Tensor, kernel: Tensor, outward: Tensor, groups: int) -> nn.Sequential:
    """Three convolutions with weights ``(p, S)``, ``(q, p / groups, positions)`` and ``(T, q)``."""
    middle = type(module)(
        len(inward),
        len(kernel),
        _any(module.kernel_size),
        stride=_any(module.stride),
        padding=_any(module.padding),
        dilation=_any(module.dilation),
        groups=groups,
        bias=False,
        padding_mode=_any(module.padding_mode),
        device="meta",
    )
    layers = [
        pointwise(module, module.in_channels, len(inward)),
        middle,
        pointwise(module, len(kernel), module.out_channels, module.bias),
    ]
    for layer, weight in zip(layers, (inward, kernel, outward), strict=True):
        value = weight.reshape(layer.weight.shape).to(module.weight.dtype).contiguous()
        layer.weight = nn.Parameter(value, requires_grad=module.weight.requires_grad)
    return nn.Sequential(*layers)


def _any(value: Any) -> Any:
    return value
