"""Parameters as points: to one vector and back, and the state of an optimizer to return to or to go on from."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Snapshot", "flatten", "flatten_grads", "put", "restore", "restore_tensors", "snapshot", "split"]


def flatten(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All entries in one new vector, complex ones as pairs."""
    real = [torch.view_as_real(entry.resolve_conj()) if entry.is_complex() else entry for entry in tensors]
    return torch.cat([entry.detach().reshape(-1).to(dtype) for entry in real])


def flatten_grads(grads: Sequence[Tensor | None], params: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Gradients in one vector, zero where there is none."""
    pairs = zip(grads, params, strict=True)
    return flatten([torch.zeros_like(param) if grad is None else grad for grad, param in pairs], dtype)


def split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that :func:`flatten` made ``vector`` from; shapes and dtypes are those of ``like``."""
    sizes = [entry.numel() * (2 if entry.is_complex() else 1) for entry in like]
    found = []
    for piece, entry in zip(torch.split(vector, sizes), like, strict=True):
        real = piece.to(entry.dtype.to_real())
        shaped = torch.view_as_complex(real.reshape(*entry.shape, 2)) if entry.is_complex() else real.view(entry.shape)
        found.append(shaped)
    return found


@torch.no_grad()
def put(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write ``values`` into ``params``."""
    for param, value in zip(params, values, strict=True):
        param.copy_(value)


class Snapshot(NamedTuple):
    """What a step of an optimizer changes, apart from the parameters.

    Args:
        state: a copy of ``optimizer.state``.
        numbers: of each group, the entries that are plain numbers (some methods count steps there).
    """

    state: dict[Any, Any]
    numbers: list[dict[str, float]]


def snapshot(optimizer: Optimizer) -> Snapshot:
    """A copy of the state of ``optimizer``."""
    numbers = [
        {name: value for name, value in group.items() if isinstance(value, int | float)}
        for group in optimizer.param_groups
    ]
    return Snapshot({key: _copied(value) for key, value in optimizer.state.items()}, numbers)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return {key: _copied(entry) for key, entry in value.items()} if isinstance(value, dict) else copy.deepcopy(value)


def restore(optimizer: Optimizer, kept: Snapshot) -> None:
    """Return to a snapshot, which is used up."""
    optimizer.state.clear()
    optimizer.state.update(kept.state)
    for group, numbers in zip(optimizer.param_groups, kept.numbers, strict=True):
        group.update(numbers)


def restore_tensors(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put tensors of a loaded state back in the type in which they were saved; torch casts them to the parameter's."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for number, param in zip(numbers, params, strict=True):
        for name, value in saved["state"].get(number, {}).items():
            optimizer.state[param][name] = _placed(value, param.device)


def _placed(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    return [_placed(entry, device) for entry in value] if isinstance(value, list) else value
