"""Which units go, given how much each matters."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from netwright.core.errors import TransformError

__all__ = ["Limits", "choose_global", "choose_layer", "kept"]

_ROUNDING = 1e-9  # 0.29 * 100 is a little less than 29


@dataclass(frozen=True)
class Limits:
    """What has to stay of a group: at least ``least`` units, and a multiple of ``multiple``."""

    least: int = 1
    multiple: int = 1


def kept(size: int, removed: int, limits: Limits) -> int:
    """How many of ``size`` units stay when ``removed`` are to go.

    At least ``limits.least``, rounded up to a multiple of ``limits.multiple``; all, where the group is not that large.

    Example:
        >>> kept(32, 20, Limits()), kept(32, 20, Limits(multiple=8)), kept(32, 31, Limits(least=4))
        (12, 16, 4)
        >>> kept(6, 3, Limits(multiple=8))
        6
    """
    rest = max(size - removed, limits.least)
    return min(size, math.ceil(rest / limits.multiple) * limits.multiple)


def choose_layer(
    scores: Mapping[str, Tensor], ratios: Mapping[str, float], limits: Mapping[str, Limits]
) -> dict[str, list[int]]:
    """In each group the ``floor(ratio * size)`` units with the lowest scores, fewer where limits say so.

    Args:
        scores: ``(size,)`` for each group.
        ratios: the share to remove, for each group.
        limits: what has to stay, for each group.

    Returns:
        For each group the units to remove, ascending. Of equal scores the first go first.
    """
    return {
        name: _lowest(score, math.floor(ratios[name] * len(score) + _ROUNDING), limits[name])
        for name, score in scores.items()
    }


def choose_global(
    scores: Mapping[str, Tensor], costs: Mapping[str, float], ratio: float, limits: Mapping[str, Limits]
) -> dict[str, list[int]]:
    """The units with the lowest score per cost in all groups together, as many as ``ratio`` of the cost allows.

    A group's scores are divided by their mean first, so that groups of different scale compare. A unit whose removal
    saves nothing stays.

    Args:
        scores: ``(size,)`` for each group.
        costs: what removing one unit saves, for each group; ones count units.
        ratio: the share of the total cost to remove.
        limits: what has to stay, for each group. Rounding up to a multiple may remove less than ``ratio``.

    Returns:
        For each group the units to remove, ascending.

    Raises:
        TransformError: limits that leave less than ``ratio`` to remove; the message says how much they leave.
    """
    ranked = sorted(
        (value / costs[name], position, name)
        for position, (name, score) in enumerate(scores.items())
        for value in (_relative(score).tolist() if costs[name] > 0 else [])
    )
    total = math.fsum(costs[name] * len(score) for name, score in scores.items())
    target = ratio * total * (1 + _ROUNDING)
    removed = dict.fromkeys(scores, 0)
    gone = 0.0
    for _, _, name in ranked:
        if removed[name] >= len(scores[name]) - limits[name].least:
            continue
        if gone + costs[name] > target:
            break
        removed[name] += 1
        gone += costs[name]
    else:
        if not ranked or gone + min(costs[name] for _, _, name in ranked) <= target:
            raise TransformError(
                f"A ratio of {ratio:g} over all groups cannot be reached while keep_at_least units stay in each; at "
                f"most {gone / total if total else 0:.3f} can be removed. Lower ratios or keep_at_least."
            )
    return {name: _lowest(score, removed[name], limits[name]) for name, score in scores.items()}


def _relative(score: Tensor) -> Tensor:
    mean = score.double().mean()
    return score.double() / mean if mean > 0 else torch.zeros_like(score, dtype=torch.float64)


def _lowest(score: Tensor, removed: int, limits: Limits) -> list[int]:
    count = len(score) - kept(len(score), removed, limits)
    order: list[int] = torch.argsort(score, stable=True)[:count].tolist()
    return sorted(order)
