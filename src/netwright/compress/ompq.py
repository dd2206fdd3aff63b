"""Bits for each layer from how little the layers' outputs resemble each other."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, fx, nn

from netwright.compress._calibrated import Recorder, levels
from netwright.compress._placement import Plan
from netwright.compress._quantizers import WeightQuantizer
from netwright.compress._settings import check_count, check_number, check_weights
from netwright.compress.quantize import Int8, insert, prepare
from netwright.core.data import batches, to_device
from netwright.core.errors import TransformError
from netwright.core.evaluate import device_of
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["OMPQ"]

Array = NDArray[np.float64]


def _orthogonality(outputs: Sequence[Array]) -> Array:
    """Linear CKA ``(layers, layers)`` of outputs ``(items, features)``, by the items' Gram matrices."""
    grams = []
    for output in outputs:
        centred = output - output.mean(0)
        gram = centred @ centred.T
        grams.append(gram.ravel() / max(float(np.linalg.norm(gram)), 1e-30))
    stacked = np.stack(grams)
    return np.asarray(stacked @ stacked.T)


def _importance(similarity: Array, beta: float) -> Array:
    """The mean of ``exp(-beta g)`` over a layer and those after it; ``g``: a layer's mean similarity to the others."""
    count = len(similarity)
    own = np.exp(-beta * (similarity.sum(1) - np.diag(similarity)) / max(count - 1, 1))
    return np.asarray(own[::-1].cumsum()[::-1] / np.arange(count, 0, -1))


def _allocate(importance: Array, sizes: Array, bits: Sequence[int], limit: float) -> list[int]:
    """The bits with the largest ``sum importance_i b_i`` such that ``sum sizes_i b_i <= limit``."""
    layers, choices = len(sizes), len(bits)
    levels = np.asarray(bits, dtype=float)
    gain = np.outer(importance / importance.sum(), levels).ravel()
    single = np.kron(np.eye(layers), np.ones(choices))
    constraints = [
        LinearConstraint(single, 1, 1),
        LinearConstraint(np.outer(sizes, levels).ravel()[None], -np.inf, limit),
    ]
    found = milp(-gain, constraints=constraints, bounds=Bounds(0, 1), integrality=np.ones(layers * choices, dtype=int))
    if found.x is None:
        raise TransformError(f"OMPQ: no allocation of bits was found: {found.message}")
    return [bits[index] for index in found.x.reshape(layers, choices).argmax(1)]


class _Layer(NamedTuple):
    """A weight, the dimension of its output channels, and what its layer gives, ``(items, features)``."""

    path: str
    axis: int
    weight: Tensor
    output: Array


@dataclass(frozen=True)
class OMPQ:
    r"""Rounds every layer's weight to bits of its own under a size budget, without training.

    Reach for it to make weights small where the fewest bits everywhere cost too much: nothing is trained, one batch is
    looked at, and the bits are found in a second. Activations stay float.

    With outputs :math:`Y_i \in \mathbb{R}^{N \times F_i}` of layer ``i`` of ``L`` on ``N`` items, centred, the
    similarity of two layers is their linear CKA (the paper's ORM), and a layer's importance

    .. math:: c_{ij} = \frac{\|Y_j^T Y_i\|_F^2}{\|Y_i^T Y_i\|_F \|Y_j^T Y_j\|_F}, \quad
        t_i = \exp\Big(-\frac{\beta}{L - 1} \sum_{j \ne i} c_{ij}\Big), \quad
        \theta_i = \frac{1}{L - i + 1} \sum_{j=i}^{L} t_j

    is the mean over the layer and those after it, all of which see its rounding. The bits :math:`b_i`, with
    :math:`n_i` weights in layer ``i``, maximize :math:`\sum_i \theta_i b_i` subject to
    :math:`\sum_i n_i b_i \le \mathtt{average\_bits} \sum_i n_i`. A weight of ``b`` bits is rounded to the
    :math:`2^b - 1` integers about zero, with a scale for each output channel.

    Args:
        average_bits: the size budget, bits per weight.
        bits: those that a layer may have, 2 to 8.
        beta: how strongly similarity lowers importance.
        items: training items in the batch.

    Raises:
        TransformError: an unknown setting, a budget below the fewest bits; on a call, a model with no layer to
            quantize or values that are not finite, fewer than two training items.

    Example:
        >>> _allocate(np.array([1.0, 0.5]), np.array([10.0, 10.0]), (2, 4, 8), 120.0)
        [8, 4]

    Source: 269, Ma et al., "OMPQ: Orthogonal Mixed Precision Quantization", 2023, arXiv 2109.07865.

    Differs: the exponent has the mean over the other layers, so that ``beta`` means the same at every depth; the
    integer programme is solved as such, where the paper rounds the solution of the linear one; activations are not
    rounded.

    Cost: a trace, one batch, ``L`` Gram matrices of ``items ** 2`` entries, and an integer programme of ``L`` layers:
    seconds. Memory: the layers' outputs on one batch.
    """

    low_precision: ClassVar[bool] = True

    average_bits: float = 4.0
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    beta: float = 1.0
    items: int = 64

    def __post_init__(self) -> None:
        bits = tuple(self.bits) if isinstance(self.bits, Iterable) else ()
        whole = all(isinstance(each, int) and not isinstance(each, bool) and 2 <= each <= 8 for each in bits)
        if not bits or not whole:
            raise TransformError(f"OMPQ.bits must be integers from 2 to 8, as (4, 8), got {self.bits!r}.")
        object.__setattr__(self, "bits", bits)
        check_number(self, "average_bits", self.average_bits, above=True)
        check_number(self, "beta", self.beta)
        check_count(self, "items", self.items, least=2)
        if self.average_bits < min(self.bits):
            raise TransformError(
                f"OMPQ.average_bits of {self.average_bits:g} cannot be met: the smallest reachable is {min(self.bits)}."
            )

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """The model with rounded weights, in evaluation mode; ``model`` is untouched and nothing is trained.

        Args:
            model: any module that ``torch.export`` traces.
            task: its training split gives the batch.
            budget: not needed, nothing is trained.
            seed: draws the batch.
            progress: told how far it is.
        """
        check_weights(self, model)
        report = progress or (lambda fraction, what: None)
        report(0.0, "tracing")
        module, where = prepare(self, model, task)
        layers = self._layers(module, where, task, seed)
        report(0.5, "allocating bits")
        importance = _importance(_orthogonality([layer.output for layer in layers]), self.beta)
        sizes = np.array([float(layer.weight.numel()) for layer in layers])
        chosen = _allocate(importance, sizes, self.bits, self.average_bits * sizes.sum())
        where.outputs.clear()
        where.shared.clear()
        module, _ = insert(self, module, where, Int8())
        for layer, bits in zip(layers, chosen, strict=True):
            quantizer = WeightQuantizer(layer.weight, layer.axis, levels(bits)[0], per_channel=True)
            module.set_submodule(f"{layer.path}_quantizer", quantizer)
        report(1.0, "quantized")
        return module.eval()

    def importance(self, model: nn.Module, task: Task, *, seed: int = 0) -> dict[str, float]:
        """The importance of every weight, by its name in the traced model, in the order of execution.

        Args:
            model: any module that ``torch.export`` traces.
            task: its training split gives the batch.
            seed: draws the batch.
        """
        check_weights(self, model)
        layers = self._layers(*prepare(self, model, task), task, seed)
        found = _importance(_orthogonality([layer.output for layer in layers]), self.beta)
        return {layer.path: float(value) for layer, value in zip(layers, found, strict=True)}

    def _layers(self, module: fx.GraphModule, where: Plan, task: Task, seed: int) -> list[_Layer]:
        """The layers of a traced model in the order of execution; of those that share a weight the first."""
        inputs, targets = next(
            iter(batches(task.data.train, self.items, generator=torch.Generator().manual_seed(seed)))
        )
        count = len(targets)
        if count < 2:
            raise TransformError(
                f"OMPQ needs at least 2 training items to compare layers on, got {count}. Put more into Data.train."
            )
        recorder = Recorder(module, {node.name for node in where.weights})
        recorder.record(to_device(inputs, device_of(module)))
        layers: dict[str, _Layer] = {}
        for node, rule in where.weights.items():
            source = node.args[rule.weight]
            assert isinstance(source, fx.Node)
            if node.name not in recorder.seen or str(source.target) in layers:
                continue
            operation: Any = node.target
            with torch.no_grad():
                output: Tensor = operation(*recorder.seen[node.name], **node.kwargs)
            if not bool(output.isfinite().all()):
                raise TransformError(
                    f"OMPQ: the activations at {node.name} are not finite on training data. Check the data, or train "
                    "the model again."
                )
            depends = output.ndim > 0 and len(output) % count == 0  # else it is the same for every item
            rows = output.reshape(count, -1) if depends else output.new_zeros(count, 1)
            weight = recorder.seen[node.name][rule.weight]
            layers[str(source.target)] = _Layer(str(source.target), rule.axis, weight, rows.double().cpu().numpy())
        return list(layers.values())
