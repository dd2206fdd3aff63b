"""Layers that can be replaced by a chain of smaller ones: which they are, how often they compute, and the exchange."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from netwright.core.data import Inputs, call, to_device
from netwright.core.errors import TransformError
from netwright.core.graph.export import export_model
from netwright.core.graph.inference import inference
from netwright.core.parametrized import fold_parametrizations

__all__ = ["Convolution", "Layer", "exchanged", "layers_of", "pointwise"]

Convolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OPERATIONS = {"linear", "conv1d", "conv2d", "conv3d", "convolution"}


@dataclass(frozen=True)
class Layer:
    """A linear layer or an ungrouped convolution.

    Args:
        name: its path in the model.
        module: the layer itself.
        calls: for each call, the spatial extents of one item before and after it: ``((h, w), (h', w'))`` for a
            convolution, ``((n,), (n,))`` for a linear layer that is applied ``n`` times.
    """

    name: str
    module: nn.Linear | Convolution
    calls: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]

    @property
    def before(self) -> float:
        """Positions of one item in what the layer reads, over all calls."""
        return sum(prod(first) for first, _ in self.calls)

    @property
    def after(self) -> float:
        """Positions of one item in what the layer gives, over all calls."""
        return sum(prod(second) for _, second in self.calls)

    @property
    def macs(self) -> float:
        """Multiply-accumulate operations of one item."""
        return self.after * self.module.weight.numel()


def layers_of(owner: object, model: nn.Module, inputs: Inputs, exclude: Sequence[str] = ()) -> list[Layer]:
    """The linear layers and ungrouped convolutions of ``model`` that can be exchanged, in their order.

    The transposed linear layers of Transformers' GPT-2 (``Conv1D``) are written as linear layers first.

    A layer whose weight is shared, or read by anything but the layer itself, is none of them.

    Args:
        owner: the transform, for messages.
        model: a copy of the user's; its parametrized tensors are folded.
        inputs: a batch to run.
        exclude: paths of modules that stay whole, with all they hold.

    Raises:
        TransformError: a path in ``exclude`` that is none of the model's.
        TraceError: a model that cannot be traced.
    """
    known = dict(model.named_modules())
    for name in exclude:
        if name not in known or not name:
            raise TransformError(
                f"{type(owner).__name__}.exclude names {name!r}, which {type(model).__name__} does not have. Its "
                f"modules are {', '.join([path for path in known if path][:8])}."
            )
    fold_parametrizations(model)
    for name, module in list(model.named_modules()):
        if name and type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
            exchanged(model, {name: _as_linear(module)})
    free = _exchangeable(export_model(model, inputs))
    found = {
        name: module
        for name, module in model.named_modules()
        if name in free
        and type(module) in (nn.Linear, *_CONVOLUTIONS)
        and getattr(module, "groups", 1) == 1
        and min(module.weight.shape) > 0
        and not any(name == stays or name.startswith(f"{stays}.") for stays in exclude)
    }
    calls, read = _calls(model, inputs, found)
    return [
        Layer(name, module, tuple(calls[name])) for name, module in found.items() if calls[name] and name not in read
    ]


def exchanged(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """``model`` with other modules in place of some of its own, wherever these are held; changed in place."""
    if "" in replacements:
        return replacements[""]
    known = dict(model.named_modules())
    new = {id(known[name]): replacement for name, replacement in replacements.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in new:
            model.set_submodule(name, new[id(module)])
    return model


def pointwise(like: Convolution, inputs: int, outputs: int, bias: Tensor | None = None) -> Convolution:
    """A convolution with kernels of one position, of the kind of ``like``."""
    made = type(like)(inputs, outputs, 1, bias=bias is not None, device="meta")
    if bias is not None:
        made.bias = copy.deepcopy(bias)
    return made


def _as_linear(module: nn.Module) -> nn.Linear:
    """A layer that holds its weight as ``(inputs, outputs)``, as one that holds it the other way round."""
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    inputs, outputs = weight.shape
    made = nn.Linear(inputs, outputs, device="meta")
    made.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    made.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return made


def _exchangeable(program: ExportedProgram) -> set[str]:
    """Paths of modules whose weight is read by their own operation alone."""
    names = program.graph_signature.inputs_to_parameters
    found = set()
    for node in program.graph.nodes:
        path, _, last = names.get(node.name, "").rpartition(".")
        if last == "weight" and node.users and all(_is_own(user, path) for user in node.users):
            found.add(path)
    return found


def _is_own(user: Any, path: str) -> bool:
    if not isinstance(user.target, torch._ops.OpOverload) or user.target.overloadpacket.__name__ not in _OPERATIONS:
        return False
    stack = user.meta.get("nn_module_stack") or {}
    return bool(stack) and str(list(stack.values())[-1][0]).partition("@")[0] == path


def _calls(model: nn.Module, inputs: Inputs, layers: Mapping[str, Any]) -> tuple[dict[str, list[Any]], set[str]]:
    """Spatial extents before and after each call of each layer, for one item; and layers whose weight others look at.

    Some modules ask their layers for a weight (``nn.TransformerEncoderLayer`` for its fused operation), and would not
    find any in a chain.
    """
    found: dict[str, list[Any]] = {name: [] for name in layers}
    example = next((value for value in _tensors(inputs) if value.ndim), None)
    items = 1 if example is None else example.shape[0]

    def seen(name: str, before: Tensor, after: Tensor) -> None:
        if isinstance(layers[name], nn.Linear):
            extent = (after.numel() / after.shape[-1] / items,)
            found[name].append((extent, extent))
        else:
            dims = layers[name].get_parameter("weight").ndim - 2
            found[name].append((tuple(before.shape[-dims:]), tuple(after.shape[-dims:])))

    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), inference(model), _watched(layers, seen) as read:
        call(model, to_device(inputs, device))
    return found, read


@contextlib.contextmanager
def _watched(layers: Mapping[str, Any], seen: Callable[[str, Tensor, Tensor], None]) -> Iterator[set[str]]:
    """Tell of each call of each layer; gives the names of those whose weight is read outside their own call.

    By classes rather than hooks, for modules with hooks in them may take another path.
    """
    read: set[str] = set()
    inside: set[str] = set()
    kinds = {name: type(module) for name, module in layers.items()}

    def watched(name: str, kind: type[nn.Module]) -> type[nn.Module]:
        def weight(module: nn.Module) -> nn.Parameter | None:
            if name not in inside:
                read.add(name)
            return module._parameters["weight"]

        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            inside.add(name)
            try:
                output = kind.__call__(module, *args, **kwargs)
                seen(name, args[0] if args else next(iter(kwargs.values())), output)
                return output
            finally:
                inside.discard(name)

        return type(kind.__name__, (kind,), {"weight": property(weight), "__call__": called})

    try:
        for name, module in layers.items():
            module.__class__ = watched(name, kinds[name])
        yield read
    finally:
        for name, module in layers.items():
            module.__class__ = kinds[name]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]
