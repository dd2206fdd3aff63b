"""What K-FAC overhears: a forward hook that sums up second moments of a layer's inputs and output gradients."""

import functools
import weakref
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from netwright.optim._kronecker import Layer, Sharing, as_type, layer_gradients, layer_inputs

__all__ = ["Listener", "Place", "Tap", "average_factors", "forget_unfit", "own_layers"]

_FACTORS = ("updates", "a", "b", "inverse_a", "inverse_b")


class Place(NamedTuple):
    """A layer and its tap."""

    layer: Layer
    tap: "Tap"


class Tap:
    """A forward hook of one layer; copies of it, by ``copy`` or ``pickle``, do nothing.

    Nothing is kept between a forward pass and its backward pass but by the graph itself, so a forward pass without
    a backward pass leaves nothing behind.

    Args:
        bias: whether the inputs get a last 1 for the bias.
        sharing: what is made of several positions; see ``KFAC``.
    """

    def __init__(self, bias: bool = False, sharing: Sharing = "expand") -> None:
        self.bias, self.sharing = bias, sharing
        self.armed = False
        self.clear()

    def clear(self) -> None:
        """Forget what was heard."""
        self.inputs: Tensor | None = None
        self.grads: Tensor | None = None
        self.samples = 0

    def __call__(self, layer: Layer, args: tuple[Any, ...], output: Tensor) -> None:
        """Wait for the gradient of ``output``."""
        heard = self.armed and layer.weight.requires_grad and torch.is_grad_enabled()
        if heard and isinstance(output, Tensor) and output.requires_grad and args:
            hear: Any = output.register_hook  # torch leaves it without annotations
            hear(functools.partial(self._hear, layer, args[0].detach()))

    @torch.no_grad()
    def _hear(self, layer: Layer, inputs: Tensor, grads: Tensor) -> None:
        if not self.armed:
            return
        left = layer_inputs(layer, inputs, bias=self.bias, sharing=self.sharing)
        right = layer_gradients(layer, grads.detach(), sharing=self.sharing)
        self.samples += len(left)
        left, right = left.flatten(0, 1) / left.shape[1] ** 0.5, right.flatten(0, 1)
        a, b = left.mT @ left, right.mT @ right
        self.inputs = a if self.inputs is None else self.inputs.add_(a)
        self.grads = b if self.grads is None else self.grads.add_(b)

    def take(self) -> tuple[Tensor, Tensor] | None:
        """The factors of what was heard since the last time, or None where nothing was, or nothing finite."""
        inputs, grads, samples = self.inputs, self.grads, self.samples
        self.clear()
        if inputs is None or grads is None or samples == 0:
            return None
        a, b = inputs / samples, grads * samples
        return (a, b) if bool(a.isfinite().all()) and bool(b.isfinite().all()) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tap":
        return Tap()

    def __reduce__(self) -> tuple[type["Tap"], tuple[()]]:
        return Tap, ()


class Listener:
    """The taps on the layers of a model, under the ids of their weights.

    They go with it. A copy, by ``copy`` or ``pickle``, has taps of its own on the layers that were copied with it.

    Args:
        model: whose layers may be tapped.
        sharing: see :class:`Tap`.
    """

    def __init__(self, model: nn.Module, sharing: Sharing) -> None:
        self._layers, self._sharing = own_layers(model), sharing
        self._begin()

    def _begin(self) -> None:
        self.places: dict[int, Place] = {}
        self._handles: list[RemovableHandle] = []
        weakref.finalize(self, _remove, self._handles)

    def listen(self, owned: Collection[int]) -> None:
        """Tap layers whose weights are among ``owned``, ids of parameters, with their bias where it is there too."""
        for layer in self._layers:
            if id(layer.weight) in owned:
                bias = layer.bias is not None and id(layer.bias) in owned
                place = self.places.get(id(layer.weight))
                if place is None:
                    self._tap(layer, bias)
                elif place.tap.bias != bias:
                    place.tap.bias = bias
                    place.tap.clear()

    def _tap(self, layer: Layer, bias: bool) -> Tap:
        tap = Tap(bias, self._sharing)
        self.places[id(layer.weight)] = Place(layer, tap)
        self._handles.append(layer.register_forward_hook(tap))
        return tap

    def clear(self) -> None:
        """Forget what was heard."""
        for place in self.places.values():
            place.tap.clear()

    def remove(self) -> None:
        """Take the taps off; happens by itself at the end of life."""
        _remove(self._handles)

    def __getstate__(self) -> dict[str, Any]:
        tapped = [(place.layer, place.tap.bias, place.tap.armed) for place in self.places.values()]
        return {"layers": self._layers, "sharing": self._sharing, "tapped": tapped, "silent": not self._handles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._layers, self._sharing = state["layers"], state["sharing"]
        self._begin()
        for layer, bias, armed in state["tapped"]:
            self._tap(layer, bias).armed = armed
        if state["silent"]:
            self.remove()


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def forget_unfit(places: Iterable[Place], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Drop the factors of layers whose bias was not there when they were gathered; they begin anew."""
    for layer, tap in places:
        own = state.get(layer.weight, {})
        if "a" in own and len(own["a"]) != layer.weight.flatten(1).shape[1] + tap.bias:
            for name in _FACTORS:
                own.pop(name, None)


def average_factors(state: dict[str, Any], heard: tuple[Tensor, Tensor], decay: float, dtype: torch.dtype) -> None:
    """Take new factors into the moving averages of a layer's state, kept in ``dtype``."""
    count = state["updates"] = state.get("updates", 0) + 1
    for name, new in zip("ab", heard, strict=True):
        if name in state:
            state[name].lerp_(as_type(new, dtype), 1 - min(1 - 1 / count, decay))
        else:
            state[name] = as_type(new, dtype)


def own_layers(model: nn.Module) -> list[Layer]:
    """Layers whose parameters no other module has."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners[id(param)] = owners.get(id(param), 0) + 1
    found: list[Layer] = []
    for module in model.modules():
        plain = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        if plain and all(owners[id(param)] == 1 for param in module.parameters(recurse=False)):
            assert isinstance(module, Layer)
            found.append(module)
    return found
