"""Which layers a method works on, and their weights as rows."""

import difflib
import fnmatch
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from netwright.core.errors import SettingError

__all__ = ["check_number", "find_layers", "free_weight", "from_rows", "row_groups", "to_rows"]


def find_layers(
    owner: str, model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """The linear and convolution layers of ``model`` by name, in the order of their registration.

    Args:
        owner: who asks, for messages.
        model: a layer (its name is then empty) or any module around layers.
        include: patterns of names (``"blocks.*.conv?"``) of which a layer matches one, or None for all.
        exclude: patterns of names to leave out.

    Raises:
        SettingError: not a module, no layer, a pattern that matches none, or a layer whose weight has no shape yet.
    """
    if not isinstance(model, nn.Module):
        raise SettingError(f"{owner} needs an nn.Module, got {type(model).__name__}.")
    known: dict[str, nn.Module] = {
        name: part for name, part in model.named_modules() if isinstance(part, nn.Linear | _ConvNd)
    }
    if not known:
        raise SettingError(
            f"{owner}: {type(model).__name__} has no linear or convolution layer, so nothing can be done."
        )
    chosen = _matching(owner, "include", include, known) if include is not None else set(known)
    chosen -= _matching(owner, "exclude", exclude, known)
    if not chosen:
        raise SettingError(
            f"{owner}: include={include!r} and exclude={exclude!r} leave none of the layers {', '.join(known)}."
        )
    found = {name: part for name, part in known.items() if name in chosen}
    for name, part in found.items():
        if any(is_lazy(value) for value in part.parameters(recurse=False)):
            raise SettingError(
                f"{owner}: layer {name!r} is lazy and has no weight yet. Run the model once on an example input first."
            )
    return found


def _matching(owner: str, field: str, patterns: Sequence[str], known: dict[str, nn.Module]) -> set[str]:
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise SettingError(f"{owner}: {field} must be a sequence of names or patterns, got {patterns!r}.")
    found: set[str] = set()
    for pattern in patterns:
        matches = set(fnmatch.filter(known, pattern))
        if not matches:
            close = difflib.get_close_matches(pattern, known, n=1, cutoff=0.0)
            raise SettingError(f"{owner}: {field} names no layer {pattern!r}; the closest is {close[0]!r}.")
        found |= matches
    return found


def free_weight(owner: str, model: nn.Module, layer: nn.Module, where: str, name: str) -> Tensor:
    """The parameter ``name`` of ``layer``, checked to be one that can be written anew.

    Args:
        owner: who asks, for messages.
        model: the module in which the parameter must not be shared.
        layer: whose parameter it is.
        where: the layer's name in ``model``.
        name: the parameter.

    Raises:
        SettingError: no such parameter, fewer than two dimensions, or one that several modules share.
    """
    weight = layer._parameters.get(name)
    label = f"{where}.{name}" if where else name
    if weight is None:
        raise SettingError(
            f"{owner}: {label} is not a plain parameter of {type(layer).__name__}. Undo what computes it first "
            "(torch.nn.utils.parametrize.remove_parametrizations, or the older torch.nn.utils.remove_weight_norm)."
        )
    if weight.dim() < 2 or weight.numel() == 0:
        raise SettingError(f"{owner}: {label} has shape {tuple(weight.shape)}; a weight with rows is needed.")
    sharing = [
        f"{path}.{key}" if path else key
        for path, part in model.named_modules()
        for key, value in part._parameters.items()
        if value is weight
    ]
    if len(sharing) > 1:
        raise SettingError(
            f"{owner}: {label} is shared by {', '.join(sharing)}, which would come apart. Leave it out with exclude."
        )
    return weight


def row_groups(layer: nn.Module) -> int:
    """0 where the first dimension of the layer's weight counts outputs; the groups of a transposed convolution."""
    return layer.groups if isinstance(layer, _ConvTransposeNd) else 0


def to_rows(weight: Tensor, groups: int = 0) -> Tensor:
    """A weight as a matrix with one row for each output, ``(outputs, inputs * kernel)``.

    Args:
        weight: ``(outputs, inputs, *kernel)``, or with ``groups`` ``(inputs, outputs / groups, *kernel)``.
        groups: of a transposed convolution, 0 for all other layers.
    """
    if groups:
        weight = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def from_rows(rows: Tensor, shape: torch.Size, groups: int = 0) -> Tensor:
    """The weight of ``shape`` whose :func:`to_rows` is ``rows``."""
    if not groups:
        return rows.view(shape)
    return rows.view(groups, shape[1], shape[0] // groups, *shape[2:]).transpose(1, 2).reshape(shape)


def check_number(owner: str, name: str, value: Any, *, low: float = 0.0, above: bool = False) -> float:
    """``value`` as a float, checked to be finite and at least (or ``above``) ``low``.

    Raises:
        SettingError: anything else.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if math.isfinite(number) and (number > low or (number == low and not above)):
        return number
    raise SettingError(
        f"{owner}: {name} must be a number {'greater than' if above else 'at least'} {low:g}, got {value!r}."
    )
