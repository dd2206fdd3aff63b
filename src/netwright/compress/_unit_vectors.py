"""The parameters that belong to each unit of a network, as one vector a unit."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from netwright.core.graph import Place

__all__ = ["Places", "UnitVectors"]

Places = Mapping[str, Sequence[Place]]


class UnitVectors:
    """Rows of parameters, one for each unit, read from and written to a model.

    Args:
        model: whose parameters they are.
        places: for each group the entries that make up a unit's vector.
    """

    def __init__(self, model: nn.Module, places: Places) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._places = {name: list(found) for name, found in places.items()}
        self._index = {
            (name, at): torch.as_tensor(place.index)
            for name, found in self._places.items()
            for at, place in enumerate(found)
        }
        self._used = {place.parameter for found in self._places.values() for place in found}

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the parameters that hold the vectors."""
        return {name: self._parameters[name].detach().clone() for name in sorted(self._used)}

    def read(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """For each group ``(units, entries)``, of the model or of a :meth:`snapshot`."""
        return self._gather(self._parameters if values is None else values)

    def gradients(self) -> dict[str, Tensor]:
        """For each group ``(units, entries)`` of the gradients; zero where there is none."""
        parameters = {name: self._parameters[name] for name in self._used}
        return self._gather({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()})

    @torch.no_grad()
    def multiply(self, factors: Mapping[str, Tensor]) -> None:
        """Multiply the vector of each unit by ``(units,)`` factors, in place."""
        for name, at, place in self._each(factors):
            value = self._parameters[place.parameter]
            value.mul_(self._line(factors[name], name, at, place, value, 1.0))

    @torch.no_grad()
    def multiply_gradients(self, factors: Mapping[str, Tensor]) -> None:
        """Multiply the gradient of each unit by ``(units,)`` factors, in place."""
        for name, at, place in self._each(factors):
            gradient = self._parameters[place.parameter].grad
            if gradient is not None:
                gradient.mul_(self._line(factors[name], name, at, place, gradient, 1.0))

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
        """Add ``(units,)`` factors times the vectors of a :meth:`snapshot`, in place."""
        for name, at, place in self._each(factors):
            value = self._parameters[place.parameter]
            value.add_(values[place.parameter] * self._line(factors[name], name, at, place, value, 0.0))

    def _each(self, factors: Mapping[str, Tensor]) -> list[tuple[str, int, Place]]:
        return [(name, at, place) for name in factors for at, place in enumerate(self._places[name])]

    @torch.no_grad()
    def _gather(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, places in self._places.items():
            parts = []
            for at, place in enumerate(places):
                index = self._index[name, at]
                value = values[place.parameter].detach().movedim(place.dim, 0)
                parts.append(value[index.flatten().to(value.device)].reshape(len(index), -1))
            found[name] = torch.cat(parts, 1)
        return found

    def _line(self, factors: Tensor, name: str, at: int, place: Place, value: Tensor, rest: float) -> Tensor:
        """Factors spread over the entries of a parameter, ``rest`` at those of no unit, in a shape that multiplies."""
        line = torch.full((value.shape[place.dim],), rest, dtype=value.dtype)
        line[self._index[name, at]] = factors.to("cpu", value.dtype)[:, None]
        shape = [1] * value.ndim
        shape[place.dim] = -1
        return line.view(shape).to(value.device)
