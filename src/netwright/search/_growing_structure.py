"""What a network consists of that can grow: units, layers, what they cost, and smaller networks made of them."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from math import prod

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from netwright.core.data import Inputs, beside
from netwright.core.errors import NetwrightError, NothingToPruneError, SettingError
from netwright.core.graph import Graph, Group, Place, trace
from netwright.core.graph.agreement import difference
from netwright.core.graph.export import arguments
from netwright.core.graph.inference import inference
from netwright.search._growing_masks import LAYERS
from netwright.search._growing_operations import works

__all__ = ["Kept", "Structure"]

Kept = dict[str, dict[int, Tensor]]
"""For the names of parameters and buffers, by dimension, the entries that a smaller network has."""

_AGREES = 1e-3


class Structure:
    """A traced model, its groups of units and the layers that can be left out.

    Args:
        model: the full-size network.
        inputs: a batch for it.
        layers: names of modules that may be replaced by the identity; None for all blocks of a sequence that can.

    Raises:
        TraceError: a model that cannot be traced.
        NothingToPruneError: a model without a group of units.
        SettingError: a name in ``layers`` that is no module, or one that is not interchangeable with the identity.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, layers: Sequence[str] | None) -> None:
        self.inputs = inputs
        self._graphs: dict[tuple[str, ...], Graph] = {}
        graph = self._graph(model, ())
        self.groups: tuple[Group, ...] = tuple(group for group in graph.require_groups() if group.exact)
        if not self.groups:
            raise NothingToPruneError("Every group of this model changes statistics when it shrinks; none can grow.")
        self._shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self.layers = self._chosen(model, layers)
        self._work = [
            (work, tuple(layer for layer in self.layers if _inside(work.module, layer)))
            for work in works(graph.program, model, self.groups)
        ]
        self.total = sum(work.macs for work, _ in self._work)
        self.readers = {group.name: self._readers(graph, model, group) for group in self.groups}

    def macs(self, masks: Mapping[str, Tensor]) -> float:
        """Multiply-accumulates of one item in a network with these masks; where they are 0 or 1, core's count.

        An operation goes with the lengths of the dimensions that it loops over, so an attention with its heads.
        """
        lost = {name: float((1.0 - mask.double()).sum()) for name, mask in masks.items() if name != LAYERS}
        open_: dict[str, float] = dict(zip(self.layers, masks.get(LAYERS, torch.empty(0)).tolist(), strict=True))
        return sum(work.left(lost) * prod(open_[name] for name in layers) for work, layers in self._work)

    def share(self, masks: Mapping[str, Tensor]) -> float:
        """:meth:`macs` as a share of the full network's."""
        return self.macs(masks) / self.total

    def kept(self, masks: Mapping[str, Tensor]) -> Kept:
        """Which entries of each parameter and buffer the masks leave."""
        lines: dict[str, dict[int, Tensor]] = {}
        for group in self.groups:
            closed = masks[group.name] == 0
            for place in group.places:
                line = lines.setdefault(place.parameter, {}).setdefault(
                    place.dim, torch.ones(self._shapes[place.parameter][place.dim], dtype=torch.bool)
                )
                line[torch.as_tensor(place.index)[closed].flatten()] = False
        return {
            name: {dim: line.nonzero().flatten() for dim, line in dims.items() if not bool(line.all())}
            for name, dims in lines.items()
        }

    def build(self, model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
        """An ordinary module of the open units and layers, with the weights of ``model``.

        Raises:
            SettingError: layers in a model that has to be rebuilt to be smaller.
        """
        open_ = masks.get(LAYERS, torch.empty(0)).tolist()
        off = tuple(name for name, mask in zip(self.layers, open_, strict=True) if mask == 0)
        graph = self._graph(model, off)
        known = {group.name for group in graph.groups}
        closed = {
            group.name: (masks[group.name] == 0).nonzero().flatten().tolist()
            for group in self.groups
            if group.name in known
        }
        base, units = _without(model, off), {name: gone for name, gone in closed.items() if gone}
        small = graph.shrink(base, units) if units else base
        if self.layers and isinstance(small, fx.GraphModule) and not isinstance(model, fx.GraphModule):
            raise SettingError(
                f"{type(model).__name__} cannot be made smaller as its own class, so its layers cannot be left out. "
                "Set layers=()."
            )
        return small

    def _graph(self, model: nn.Module, off: tuple[str, ...]) -> Graph:
        if off not in self._graphs:
            self._graphs[off] = trace(_without(model, off), self.inputs)
        return self._graphs[off]

    def _chosen(self, model: nn.Module, layers: Sequence[str] | None) -> tuple[str, ...]:
        modules = dict(model.named_modules())
        for name in layers or ():
            if name not in modules:
                raise SettingError(f"layers names no module {name!r} of {type(model).__name__}.")
        found: list[str] = []
        for name in _blocks(model) if layers is None else layers:
            reason = self._fixed(model, name)
            if not reason and not any(_inside(name, other) for other in found):
                found.append(name)
            elif reason and layers is not None:
                raise SettingError(f"Layer {name!r} cannot be left out: {reason}")
        return tuple(found)

    def _fixed(self, model: nn.Module, name: str) -> str:
        """Why a module cannot be replaced by the identity; empty where it can."""
        if not _keeps_shape(model, name, self.inputs):
            return "it does not map one tensor to one of the same shape."
        try:
            graph = self._graph(model, (name,))
        except NetwrightError as error:
            return str(error)
        known = {group.name: group.size for group in graph.groups}
        for group in self.groups:
            elsewhere = any(not _inside(place.parameter, name) for place in group.places)
            if elsewhere and known.get(group.name) != group.size:
                return f"the channels that go in are not those that come out (group {group.name!r})."
        return ""

    def _readers(self, graph: Graph, model: nn.Module, group: Group) -> tuple[Place, ...]:
        """The places whose scale is the scale of what a group's units put out; all where that is not the same."""
        known = dict(model.named_parameters(remove_duplicate=False))
        places = [place for place in group.places if place.parameter in known]
        reads = [place for place in places if known[place.parameter].ndim > 1 and place.dim == _input(model, place)]
        units = list(range(group.size // 2))
        copy = deepcopy(model)
        with torch.no_grad():
            for place in reads:
                value = copy.get_parameter(place.parameter)
                value.index_fill_(place.dim, torch.as_tensor(place.index[units], device=value.device).flatten(), 0.0)
        same = reads and not difference(graph.zero(model, {group.name: units}), copy, self.inputs, _AGREES)
        return tuple(reads if same else places)


def _blocks(model: nn.Module) -> list[str]:
    """Members of sequences and lists that are made of layers themselves, outer ones first."""
    return [
        f"{name}.{part}".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
        for part, member in module.named_children()
        if any(True for _ in member.children()) and any(True for _ in member.parameters())
    ]


def _keeps_shape(model: nn.Module, name: str, inputs: Inputs) -> bool:
    seen: list[bool] = []

    def look(module: nn.Module, given: tuple[object, ...], result: object) -> None:
        first = given[0] if len(given) == 1 else None
        seen.append(isinstance(first, Tensor) and isinstance(result, Tensor) and first.shape == result.shape)

    handle = model.get_submodule(name).register_forward_hook(look)
    args, kwargs = arguments(beside(inputs, model))
    try:
        with inference(model):
            model(*args, **kwargs)
    finally:
        handle.remove()
    return seen == [True]


def _without(model: nn.Module, off: Sequence[str]) -> nn.Module:
    copy = deepcopy(model)
    for name in off:
        copy.set_submodule(name, nn.Identity())
    return copy


def _inside(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")


def _input(model: nn.Module, place: Place) -> int:
    """The dimension of a matrix or kernel along which it reads its input; -1 for a table, which reads none."""
    module = model.get_submodule(place.parameter.rpartition(".")[0])
    if isinstance(module, nn.Embedding):
        return -1
    return 0 if isinstance(module, _ConvTransposeNd) else 1
