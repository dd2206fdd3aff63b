"""Quantization scales that keep the direction of every layer's output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from netwright.compress._calibrated import Recorder, calibrated, levels
from netwright.compress._observe import grid
from netwright.compress._placement import Weighted
from netwright.compress._quantizers import ActivationQuantizer, WeightQuantizer
from netwright.compress._settings import check_count, check_flag, check_weights
from netwright.core.data import batches, to_device
from netwright.core.errors import TransformError
from netwright.core.evaluate import device_of
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["EasyQuant"]

_LOW, _HIGH = 0.4, 1.2
_TIE = 1e-9  # cosines nearer than that are equal


def _factors(count: int) -> list[float]:
    """Multiples of the min-max step, the nearest to 1 first: it wins where the cosine is blind, as to a common factor.

    Example:
        >>> _factors(2)
        [1.0, 1.2, 0.4]
    """
    return sorted({1.0, *np.linspace(_LOW, _HIGH, count).tolist()}, key=lambda factor: abs(factor - 1))


def _cosine(exact: Tensor, rounded: Tensor, axis: int | None) -> Tensor:
    """Cosine similarity of two outputs, of all entries or for each index along ``axis``."""
    if axis is None:
        left, right = exact.double().reshape(1, -1), rounded.double().reshape(1, -1)
    else:
        left, right = (value.double().movedim(axis, 0).flatten(1) for value in (exact, rounded))
    lengths: Tensor = left.norm(dim=1) * right.norm(dim=1)
    found: Tensor = (left * right).sum(1) / lengths.clamp_min(1e-30)
    return found


@dataclass(frozen=True)
class EasyQuant:
    r"""Rounds weights and activations to 8, 7 or 6 bits with scales searched for, without training.

    Reach for it where :class:`Int8` loses accuracy, above all with fewer than 8 bits. Placement, tracing and storage
    are those of :class:`Int8`. In training afterwards scales of weights follow these, as many times the min-max ones as
    the search has found. Fewer bits are stored as 8-bit integers of which fewer levels are used. ONNX Runtime has no
    kernels for these: it clips activations in float between its integers; with 7 bits a network for digits was 2.5
    times slower than in float, with 8 bits four times faster. They are for hardware that has such kernels.

    For a layer with input ``X``, weight ``W`` and output ``O = W * X``, scales ``s_w`` and ``s_x`` maximize

    .. math:: \cos(O, \hat O) = \frac{\langle O, \hat O\rangle}{\|O\| \|\hat O\|}, \quad
        \hat O = Q_{s_w}(W) * Q_{s_x}(X)

    where ``Q`` rounds to the grid of a scale: first ``s_w``, for each output channel by that channel's output, then
    ``s_x`` by the whole output, in ``rounds`` rounds. Candidates are multiples from 0.4 to 1.2 of the min-max scales.

    Args:
        bits: 8, 7 or 6, of weights and of activations.
        candidates: scales tried in each search.
        rounds: alternations between weights and activations.
        calibration_items: training items that ranges and outputs are taken from.
        reduce_range: weights of 7 bits where ``bits`` is 8, for x86 machines without VNNI, see :class:`Int8`.

    Raises:
        TransformError: an unknown setting; on a call, a model with no layer to quantize or values that are not finite.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.ones(8, 4), torch.zeros(8).long())
        >>> data = Data(split(), split(), split())
        >>> task = Task("tiny", nn.Linear(4, 2), data, nn.functional.cross_entropy, lambda o, t: 0.0)
        >>> small = EasyQuant(bits=8)(task.build(), task)
        >>> bool(torch.allclose(small(torch.ones(1, 4)), task.build()(torch.ones(1, 4)), atol=0.02))
        True

    Source: 89, Wu et al., "EasyQuant: Post-training Quantization via Scale Optimization", 2020, arXiv 2006.16669.

    Differs: steps from 0.4 to 1.2 of the min-max step are tried, where the paper has 0.5 to 2 times the reciprocal;
    layers see the unrounded activations of the layers before them; a weight or an activation that several layers read
    is fitted to the first of them; integer Winograd kernels are left out.

    Cost: ``2 rounds candidates`` runs of every layer on the calibration items, whose activations are held in memory:
    linear in the layers, in their operations and in ``calibration_items``.
    """

    low_precision: ClassVar[bool] = True

    bits: int = 8
    candidates: int = 33
    rounds: int = 2
    calibration_items: int = 64
    reduce_range: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in (6, 7, 8):
            raise TransformError(f"EasyQuant.bits must be 8, 7 or 6, got {self.bits!r}.")
        check_count(self, "candidates", self.candidates, least=2)
        check_count(self, "rounds", self.rounds)
        check_count(self, "calibration_items", self.calibration_items)
        check_flag(self, "reduce_range", self.reduce_range)

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """The quantized model in evaluation mode; ``model`` is untouched and nothing is trained.

        Args:
            model: any module that ``torch.export`` traces.
            task: its training split calibrates.
            budget: not needed, nothing is trained.
            seed: draws the calibration items.
            progress: told how far it is.
        """
        check_weights(self, model)
        report = progress or (lambda fraction, what: None)
        report(0.0, "tracing")
        weights, activations = levels(self.bits)
        if self.reduce_range and self.bits == 8:
            weights, _ = levels(7)
        made = calibrated(
            self,
            model,
            task,
            weights=weights,
            activations=activations,
            items=self.calibration_items,
            seed=seed,
        )
        module = made.module
        rules = {node.name: rule for node, rule in made.where.weights.items()}
        generator = torch.Generator().manual_seed(seed)
        inputs, _ = next(iter(batches(task.data.train, self.calibration_items, generator=generator)))
        recorder = Recorder(module, set(rules))
        recorder.record(to_device(inputs, device_of(module)))
        fitted: set[str] = set()
        layers = [node for node in module.graph.nodes if node.name in recorder.seen]
        for done, node in enumerate(layers):
            report(0.2 + 0.8 * done / len(layers), "searching scales")
            _fit_layer(self, module, node, rules[node.name], recorder.seen[node.name], made.ranges, fitted)
        report(1.0, "quantized")
        return module.eval()


def _fit_layer(
    settings: EasyQuant,
    module: fx.GraphModule,
    node: fx.Node,
    rule: Weighted,
    args: Sequence[Any],
    ranges: dict[str, tuple[float, float]],
    fitted: set[str],
) -> None:
    """Search the scales of one layer in place."""
    weights = _quantizer(module, node.args[rule.weight])
    inputs = _quantizer(module, node.args[rule.data])
    assert isinstance(weights, WeightQuantizer)
    source = node.args[rule.data]
    path = str(source.target) if isinstance(source, fx.Node) else ""
    kernel = node.args[rule.weight]
    assert isinstance(kernel, fx.Node)
    own = str(kernel.target)
    search_weight = own not in fitted
    search_input = isinstance(inputs, ActivationQuantizer) and path in ranges and path not in fitted
    operation: Any = node.target

    def output(weight: Tensor, data: Tensor) -> Tensor:
        given = list(args)
        given[rule.weight], given[rule.data] = weight, data
        result = operation(*given, **node.kwargs)
        assert isinstance(result, Tensor)
        return result

    with torch.no_grad():
        weight, data = args[rule.weight], args[rule.data]
        exact = output(weight, data)
        axis = 1 if "conv" in str(node.target) else exact.ndim - 1
        first = weights.scale.clone()
        factors = _factors(settings.candidates)
        weights.eval()
        for _ in range(settings.rounds):
            rounded = data if inputs is None else inputs(data)
            if search_weight:
                scores = []
                for factor in factors:
                    weights.scale.copy_(first * factor)
                    scores.append(_cosine(exact, output(weights(weight), rounded), axis))
                table = torch.stack(scores)
                best = (table >= table.amax(0) - _TIE).int().argmax(0)  # the first of the best
                weights.factor = torch.tensor(factors, device=first.device)[best]
                weights.scale.copy_(first * weights.factor)
            if search_input:
                assert isinstance(inputs, ActivationQuantizer)
                low, high = ranges[path]
                kept = weights(weight)
                best_score, chosen = -np.inf, 1.0
                for factor in factors:
                    _set_grid(inputs, low * factor, high * factor)
                    score = float(_cosine(exact, output(kept, inputs(data)), None))
                    if score > best_score + _TIE:
                        best_score, chosen = score, factor
                _set_grid(inputs, low * chosen, high * chosen)
        fitted.update((path, own))


def _set_grid(quantizer: ActivationQuantizer, low: float, high: float) -> None:
    scale, zero_point = grid(low, high, quantizer.integers)
    quantizer.scale.fill_(scale)
    quantizer.zero_point.fill_(zero_point)


def _quantizer(module: fx.GraphModule, node: object) -> nn.Module | None:
    if isinstance(node, fx.Node) and node.op == "call_module":
        return module.get_submodule(str(node.target))
    return None
