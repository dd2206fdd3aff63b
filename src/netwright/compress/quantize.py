"""Integer inference: weights and activations rounded to 8 bits, simulated in torch and exported as integers."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import fx, nn

from netwright.compress._fold import attribute, fold_batch_norms, op_name
from netwright.compress._layer_inputs import calibration
from netwright.compress._observe import Observer, grid
from netwright.compress._placement import Plan, plan
from netwright.compress._quantizers import ActivationQuantizer, Integers, WeightQuantizer
from netwright.compress._rounded import is_rounded
from netwright.compress._settings import check_choice, check_count, check_flag, check_weights, checked_paths
from netwright.compress._trace import trace
from netwright.core.data import Dataset, call, to_device
from netwright.core.errors import TransformError
from netwright.core.evaluate import device_of
from netwright.core.task import Task
from netwright.core.transform import Progress

__all__ = ["Int8", "insert", "observe", "prepare", "round_outputs", "trace"]

Kind = Literal["uint8", "int8"]
Calibration = Literal["minmax", "percentile", "mse"]

_WHOLE, _REDUCED = 8, 7  # bits of a weight


@dataclass(frozen=True)
class Int8:
    r"""Rounds weights and activations to 8-bit integers, after training.

    Reach for it when a model runs on a CPU: convolutions and linear layers then multiply integers, several times
    faster, and weights take a quarter of the space. The accuracy usually stays; where it does not, train the returned
    module a little with the ordinary :func:`netwright.core.fit.fit` (quantization-aware training), for it is an
    ordinary trainable module whose gradients pass straight through the rounding.

    A tensor ``x`` becomes

    .. math:: \hat x = s \, (\mathrm{clip}(\mathrm{round}(x / s) + z, l, h) - z)

    with integers from ``l`` to ``h``, step ``s`` and zero point ``z``. For a weight, ``z`` is the middle of the range
    and ``s_c = max|w_c| / (2**(weight_bits - 1) - 1)`` for each output channel ``c``; for an activation, ``s`` and
    ``z`` span the range that ``calibration`` finds in what calibration data makes of it; the range always holds zero.
    Batch norms are folded into the layers before them first. What is rounded: inputs and weights of convolutions and
    linear layers, outputs of convolutions after their ReLU, and sums, products, concatenations and average pools
    between them. Transposed convolutions, layer norms, softmax, attention and other element-wise functions stay in
    float, as do weights that an embedding shares and those that are rounded or held in codebooks already.

    The result is a traced ``torch.fx.GraphModule`` in evaluation form (dropout is gone, the remaining batch norms
    keep their statistics). It computes in float what integer inference computes, to rounding ties. Exported with
    :func:`netwright.core.artifact.export_onnx` it stores integers and runs on integer kernels.

    Args:
        activation: integers of activations. Which pair is fast depends on the machine:
            :func:`netwright.compress.int8_types.fastest_int8` measures it.
        weight: integers of weights.
        per_channel: one weight scale for each output channel rather than one for the whole weight.
        reduce_range: weights of 7 bits. For x86 machines without VNNI, where products of uint8 and int8 are added in
            16 bits and would saturate.
        weight_bits: of each weight, 2 to 8. Fewer take less space in the file and are computed with as 8 all the same;
            with 4, train a little afterwards, and expect trouble below.
        calibration: "minmax" spans all values seen; "percentile" leaves out the outermost 0.01%, "mse" takes the
            fraction of the range with the least mean squared error: for activations with rare large values.
        calibration_items: training items that calibration sees, drawn at random.
        skip: modules, by name, that stay in float with all that is in them: a first or last layer that the score
            depends on.

    Raises:
        TransformError: an unknown setting; on a call, a model with no convolution or linear layer left to round, a name
            in ``skip`` that it does not have, weights or activations that are not finite.
        TraceError: on a call, a model that cannot be traced.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> from netwright.core.data import Data
        >>> split = lambda: TensorDataset(torch.ones(8, 4), torch.zeros(8).long())
        >>> data = Data(split(), split(), split())
        >>> task = Task("tiny", nn.Linear(4, 2), data, nn.functional.cross_entropy, lambda o, t: 0.0)
        >>> small = Int8()(task.build(), task)
        >>> bool(torch.allclose(small(torch.ones(1, 4)), task.build()(torch.ones(1, 4)), atol=0.02))
        True

    Cost: a trace and one evaluation of ``calibration_items`` items (two for "percentile" and "mse"); memory of one
    copy of the model.
    """

    low_precision: ClassVar[bool] = True

    activation: Kind = "uint8"
    weight: Kind = "int8"
    per_channel: bool = True
    reduce_range: bool = False
    weight_bits: int = 8
    calibration: Calibration = "minmax"
    calibration_items: int = 256
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, kinds in (("activation", Kind), ("weight", Kind), ("calibration", Calibration)):
            check_choice(self, name, getattr(self, name), get_args(kinds))
        check_count(self, "calibration_items", self.calibration_items)
        check_count(self, "weight_bits", self.weight_bits, least=2)
        if self.weight_bits > _WHOLE:
            raise TransformError(f"Int8.weight_bits must be 2 to 8, got {self.weight_bits!r}.")
        check_flag(self, "per_channel", self.per_channel)
        check_flag(self, "reduce_range", self.reduce_range)
        object.__setattr__(self, "skip", checked_paths(self, "skip", self.skip))

    @property
    def reach(self) -> int:
        """The largest integer that stands for a weight, less the one that stands for zero."""
        bits = min(self.weight_bits, _REDUCED) if self.reduce_range else self.weight_bits
        return int(2 ** (bits - 1)) - 1

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        *,
        budget: float | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> nn.Module:
        """The quantized model, in evaluation mode; ``model`` is untouched and no training is done.

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
        module, where = prepare(self, model, task, self.skip)
        module, observers = insert(self, module, where, self)
        report(0.3, "calibrating")
        observe(module, observers, task.data.train, self, seed)
        round_outputs(module, observers, self.calibration, Integers.activation(self.activation))
        report(1.0, "quantized")
        return module.eval()


def prepare(
    owner: object, model: nn.Module, task: Task, skip: Sequence[str] = (), *, fold: bool = True
) -> tuple[fx.GraphModule, Plan]:
    """A traced copy of ``model``, with batch norms folded if ``fold``, and where its quantizers go.

    Raises:
        TransformError: no layer to quantize, or no module of a name that is skipped.
    """
    known = dict(model.named_modules())
    unknown = [name for name in skip if not name or name not in known]
    if unknown:
        raise TransformError(
            f"{type(owner).__name__}: skip names {unknown[0]!r}, which {type(model).__name__} does not have. Its "
            f"modules are {', '.join(list(known)[1:9])}{', ...' if len(known) > 9 else ''}."
        )
    module = trace(model, task)
    if fold:
        fold_batch_norms(module)
    _split_silu(module)
    where = plan(module, skip)
    if not where.weights:
        raise TransformError(
            f"{type(owner).__name__}: {type(model).__name__} has no convolution or linear layer with a weight of its "
            f"own{' outside of skip' if skip else ''}, so there is nothing to quantize. {_advice(model, module)}"
        )
    return module, where


def _advice(model: nn.Module, traced: fx.GraphModule) -> str:
    """What to do with a model in which nothing can be rounded."""
    if is_rounded(model):
        return "Its weights are rounded or held in codebooks already: leave one of the two steps out."
    transposed = any(op_name(node).startswith("conv_transpose") for node in traced.graph.nodes)
    return f"{'Transposed convolutions are not rounded. ' if transposed else ''}Leave this step out."


def _split_silu(module: fx.GraphModule) -> None:
    """Write ``silu(x)`` as ``x * sigmoid(x)``, for both of which there are integer kernels."""
    aten = torch.ops.aten
    for node in list(module.graph.nodes):
        if op_name(node) == "silu":
            with module.graph.inserting_before(node):
                gate = module.graph.call_function(aten.sigmoid.default, (node.args[0],))
                product = module.graph.call_function(aten.mul.Tensor, (node.args[0], gate))
            product.meta = dict(node.meta)
            node.replace_all_uses_with(product)
            module.graph.erase_node(node)


def insert(
    owner: object, module: fx.GraphModule, where: Plan, settings: Int8, integers: Integers | None = None
) -> tuple[fx.GraphModule, dict[str, Observer]]:
    """Put a weight quantizer before every weight of the plan, and an observer after every output.

    Weights become ``integers`` where given, else those of ``settings``. Messages name the transform ``owner``.
    """
    graph = module.graph
    integers = integers or Integers.weight(settings.weight, settings.reach)
    for node, rule in where.weights.items():
        source = node.args[rule.weight]
        assert isinstance(source, fx.Node)
        weight = attribute(module, source)
        assert weight is not None
        path = f"{source.target}_quantizer"
        if not _has(module, path):
            module.add_submodule(path, WeightQuantizer(weight, rule.axis, integers, settings.per_channel))
        with graph.inserting_before(node):
            rounded = graph.call_module(path, (source,))
        node.update_arg(rule.weight, rounded)
    observers = {}
    paths: dict[fx.Node, str] = {}
    for node in (*where.outputs, *where.shared):
        if node in where.shared:
            path = paths[where.shared[node]]
        else:
            path = paths[node] = f"{node.name}_quantizer"
            observers[path] = Observer(node.name, type(owner).__name__)
            module.add_submodule(path, observers[path])
        with graph.inserting_after(node):
            rounded = graph.call_module(path, (node,))
        node.replace_all_uses_with(rounded, delete_user_cb=_reads_values)
        rounded.args = (node,)
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph, type(module).__name__), observers


def _reads_values(user: fx.Node) -> bool:
    """Whether a node reads more than the shape."""
    return op_name(user) != "sym_size"


def _has(module: nn.Module, path: str) -> bool:
    return any(name == path for name, _ in module.named_modules())


def round_outputs(
    module: fx.GraphModule,
    observers: Mapping[str, Observer],
    calibration: str,
    integers: Integers,
    kind: type[ActivationQuantizer] = ActivationQuantizer,
) -> dict[str, tuple[float, float]]:
    """Put quantizers in the place of observers, over the ranges that these have seen; the ranges by path."""
    ranges = {path: observer.range(calibration, integers) for path, observer in observers.items()}
    for path, (low, high) in ranges.items():
        module.set_submodule(path, kind(*grid(low, high, integers), integers).to(device_of(module)))
    return ranges


def observe(module: fx.GraphModule, observers: dict[str, Observer], data: Dataset, settings: Int8, seed: int) -> None:
    """Run calibration data through the model; a second time for histograms."""
    held = list(calibration(data, settings.calibration_items, seed, torch.device("cpu")))
    module.eval()
    device = device_of(module)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for passage in range(1 if settings.calibration == "minmax" else 2):
            if passage:
                for observer in observers.values():
                    observer.start_histogram()
            for inputs in held:
                call(module, to_device(inputs, device))
