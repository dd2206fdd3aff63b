"""Which dimensions of which parameters grow with a network's width, and by how much."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor, nn

from netwright.core.errors import SettingError

__all__ = ["Role", "Shapes", "Width", "shapes_of", "tied_outputs", "widths_of"]

Role: TypeAlias = Literal["input", "hidden", "output", "scalar"]
Ratios: TypeAlias = tuple[float | None, ...]
Shapes: TypeAlias = nn.Module | Mapping[str, Sequence[int]]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_MATRICES = (nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, *_CONVOLUTIONS)
_TABLES = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Width:
    """How a parameter grows with the width.

    Args:
        role: "input" grows at its output only (vectors too), "output" at its input only, "hidden" at both.
        fan_in: length of the input dimension, as a multiple of the base's; 1 where it does not grow.
        fan_out: the same of the output dimension.
        drawn: multiple of the base's of that dimension whose inverse is the variance of torch's initial values.
        layer_fan_in: for a bias, ``fan_in`` of its weight; else ``fan_in``.
        natural: whether it belongs to a layer that K-FAC preconditions.
    """

    role: Role
    fan_in: float = 1.0
    fan_out: float = 1.0
    drawn: float = 1.0
    layer_fan_in: float = 1.0
    natural: bool = False


@dataclass(frozen=True)
class _Axes:
    """Which dimensions of a parameter are input and output; None where it has none."""

    into: int | None
    out: int | None


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """The shapes of a model's parameters by name, as plain lists that go into a file.

    Args:
        model: the base or delta model of :func:`netwright.param.mup.mup`.

    Example:
        >>> shapes_of(nn.Linear(3, 2))
        {'weight': [2, 3], 'bias': [2]}
    """
    return {name: list(param.shape) for name, param in model.named_parameters()}


def widths_of(model: nn.Module, base: Shapes, delta: Shapes | None, roles: Mapping[str, Role]) -> dict[str, Width]:
    """How every parameter of ``model`` grows, by name; see ``mup`` for the arguments.

    Raises:
        SettingError: models of different make, or a parameter whose role cannot be told.
    """
    small = _plain(base, "base")
    other = small if delta is None else _plain(delta, "delta")
    params = dict(model.named_parameters())
    for what, shapes in (("base", small), ("delta", other)):
        _require_alike(params, shapes, what)
    for name, role in roles.items():
        if name not in params or role not in get_args(Role):
            raise SettingError(f"mup: roles has {name!r}: {role!r}; it takes names of parameters and {get_args(Role)}.")
    owners = _owners(model)
    grown = {id(param): _grown(tuple(param.shape), small[name], other[name]) for name, param in params.items()}
    return {name: _width(name, param, grown, owners[id(param)], roles.get(name)) for name, param in params.items()}


def _grown(shape: Sequence[int], base: Sequence[int], delta: Sequence[int]) -> Ratios:
    lengths = zip(shape, base, delta, strict=True)
    return tuple(length / small if len({length, small, other}) > 1 else None for length, small, other in lengths)


def _plain(shapes: Shapes, what: str) -> dict[str, tuple[int, ...]]:
    if isinstance(shapes, nn.Module):
        return {name: tuple(param.shape) for name, param in shapes.named_parameters()}
    if not isinstance(shapes, Mapping):
        raise SettingError(f"mup: {what} must be a model, or the shapes of one by name, got {type(shapes).__name__}.")
    return {name: tuple(shape) for name, shape in shapes.items()}


def _require_alike(params: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    if params.keys() != shapes.keys():
        odd = ", ".join(sorted(params.keys() ^ shapes.keys())[:4])
        raise SettingError(f"mup: the model and {what} differ in more than width: only one of them has {odd}.")
    for name, param in params.items():
        if param.dim() != len(shapes[name]) or (0 in shapes[name]) != (param.numel() == 0):
            raise SettingError(
                f"mup: {name} has shape {tuple(param.shape)} in the model and {shapes[name]} in {what}; "
                "only lengths may differ."
            )


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that hold each parameter."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), []).append(module)
    return owners


def _width(
    name: str, param: Tensor, all_grown: Mapping[int, Ratios], owners: Sequence[nn.Module], role: Role | None
) -> Width:
    grown = all_grown[id(param)]
    module = next((owner for owner in owners if isinstance(owner, _TABLES)), owners[0])
    axes = _axes(name, module, grown, role)
    odd = [dim for dim, ratio in enumerate(grown) if ratio is not None and dim not in (axes.into, axes.out)]
    if odd:
        raise SettingError(
            f"mup: dimension {odd[0]} of {name}, shape {tuple(param.shape)}, differs from the base but is no width. "
            f"Say what the parameter is: roles={{{name!r}: 'input'}}, or 'hidden', or 'output'."
        )
    into = None if axes.into is None else grown[axes.into]
    out = None if axes.out is None else grown[axes.out]
    fan_in, fan_out = into or 1.0, out or 1.0
    found: Role = "input" if out is not None else "scalar" if into is None else "output"
    weight = all_grown.get(id(getattr(module, "weight", None)), ())
    of_layer = isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and len(weight) > 1
    layer_fan_in = (weight[0 if isinstance(module, _TRANSPOSED) else 1] or 1.0) if of_layer else fan_in
    return Width(
        role="hidden" if into is not None and out is not None else found,
        fan_in=fan_in,
        fan_out=fan_out,
        drawn=(weight[1] or 1.0) if of_layer else _drawn(module, fan_in, fan_out),
        layer_fan_in=layer_fan_in,
        natural=len(owners) == 1 and _is_natural(module),
    )


def _axes(name: str, module: nn.Module, grown: Sequence[float | None], role: Role | None) -> _Axes:
    lengths = [dim for dim, ratio in enumerate(grown) if ratio is not None]
    if role is not None:
        wanted = {"scalar": 0, "input": 1, "output": 1, "hidden": 2}[role]
        if len(lengths) not in (0, wanted):
            raise SettingError(f"mup: roles calls {name} {role!r}, but {len(lengths)} of its dimensions grow.")
        if role == "hidden" and lengths:
            return _Axes(lengths[1], lengths[0])
        place = lengths[0] if lengths else None
        return _Axes(place, None) if role == "output" else _Axes(None, place)
    if len(grown) < 2:
        return _Axes(None, 0 if grown else None)
    if isinstance(module, _TABLES + _TRANSPOSED):
        return _Axes(0, 1)
    if isinstance(module, _MATRICES):
        return _Axes(1, 0)
    if len(lengths) == 2:
        return _Axes(lengths[1], lengths[0])
    return _Axes(None, lengths[0] if lengths else None)


def _drawn(module: nn.Module, fan_in: float, fan_out: float) -> float:
    """By the inverse of what torch scales the variance of a recurrent or attention module's weights."""
    if isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention):
        return fan_out if fan_out != 1 else fan_in
    return 1.0


def _is_natural(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def tied_outputs(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers that share their weight with an embedding, with the weight's name among the parameters."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, _TABLES)}
    names = {id(param): name for name, param in model.named_parameters()}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) in tables:
            yield names[id(module.weight)], module
