"""A model with fake quantizers of any width, its ranges taken from calibration data, and runs of it without them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from netwright.compress._placement import Plan
from netwright.compress._quantizers import ActivationQuantizer, Integers, WeightQuantizer
from netwright.compress.quantize import Calibration, Int8, insert, observe, prepare, round_outputs
from netwright.core.data import Inputs
from netwright.core.task import Task

__all__ = ["Calibrated", "NarrowQuantizer", "Recorder", "calibrated", "levels"]


class NarrowQuantizer(ActivationQuantizer):
    """An activation quantizer of fewer levels than its storage has, which therefore clips by itself when exported."""

    def rounded(self, x: Tensor) -> Tensor:
        """``x``, of 32-bit floats, clipped and rounded."""
        low = (self.integers.low - self.zero_point) * self.scale
        high = (self.integers.high - self.zero_point) * self.scale
        return super().rounded(torch.minimum(torch.maximum(x, low), high))


class Calibrated:
    """What :func:`calibrated` makes.

    Args:
        module: the traced model with its quantizers.
        where: which operations read quantized weights; names of nodes survive the insertion.
        ranges: of every activation quantizer, by path.
    """

    def __init__(self, module: fx.GraphModule, where: Plan, ranges: dict[str, tuple[float, float]]) -> None:
        self.module, self.where, self.ranges = module, where, ranges


def levels(bits: int) -> tuple[Integers, Integers]:
    """Integers of weights, symmetric about zero, and of activations, from zero on.

    Example:
        >>> levels(4)
        (Integers(low=-7, high=7), Integers(low=0, high=15))
    """
    reach = 2 ** (bits - 1) - 1
    return Integers(-reach, reach), Integers(0, 2**bits - 1)


def calibrated(
    owner: object,
    model: nn.Module,
    task: Task,
    *,
    weights: Integers,
    activations: Integers,
    items: int,
    seed: int,
    calibration: Calibration = "minmax",
) -> Calibrated:
    """``model`` traced, batch norms folded, with quantizers whose ranges come from training items.

    Args:
        owner: the transform, for messages.
        model: any module that can be traced; it is left as it is.
        task: its training split calibrates.
        weights: integers of weights, a scale for each output channel.
        activations: integers of activations.
        items: how many training items are seen.
        seed: which.
        calibration: as :class:`netwright.compress.quantize.Int8` has it.

    Raises:
        TransformError: no layer to quantize, or activations that are not finite.
    """
    settings = Int8(calibration_items=items, calibration=calibration)
    module, where = prepare(owner, model, task)
    module, observers = insert(owner, module, where, settings, weights)
    observe(module, observers, task.data.train, settings, seed)
    kind = NarrowQuantizer if activations.high - activations.low < 255 else ActivationQuantizer
    ranges = round_outputs(module, observers, calibration, activations, kind)
    return Calibrated(module.eval(), where, ranges)


class Recorder(fx.Interpreter):
    """Runs a graph without its quantizers and remembers what given nodes read.

    Args:
        module: a graph with quantizers.
        wanted: names of the nodes.
    """

    def __init__(self, module: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.seen: dict[str, list[Any]] = {}

    def record(self, inputs: Inputs) -> None:
        """Run one batch."""
        if isinstance(inputs, Mapping):
            graph = self.module.graph
            assert isinstance(graph, fx.Graph)
            names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
            same = set(names) == set(inputs)
            values = tuple(inputs[name] for name in names) if same else tuple(inputs.values())
        else:
            values = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        with torch.no_grad():
            self.run(*values)

    def run_node(self, n: fx.Node) -> Any:
        """The result of a node; a quantizer passes its input on."""
        args, _ = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_module" and isinstance(
            self.module.get_submodule(str(n.target)), ActivationQuantizer | WeightQuantizer
        ):
            return args[0]
        if n.name in self.wanted:
            self.seen[n.name] = list(args)
        return super().run_node(n)
