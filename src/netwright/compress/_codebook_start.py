"""Where codebooks start: rows that are distributed alike, and one-dimensional k-means over each group of them."""

import torch
from torch import Tensor

__all__ = ["alike", "kmeans", "nearest"]

_ROUNDS = 100
_QUANTILES = 16


def alike(rows: Tensor, groups: int, generator: torch.Generator) -> Tensor:
    """A group for each row, ``(n,)``, rows of similar distributions together.

    Distributions are compared by their quantiles, whose squared distance is that of optimal transport between the rows'
    entries, and grouped by k-means.

    Args:
        rows: ``(n, columns)``.
        groups: at most so many.
        generator: draws the first centres.
    """
    levels = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    place = (levels * rows.shape[1]).long().to(rows.device)
    features = rows.double().sort(1).values[:, place]
    centres = features[:1] * 0 + features.mean(0)
    for _ in range(groups):
        distance = torch.cdist(features, centres).amin(1).square()
        if not bool((distance > 0).any()):
            break
        drawn = int(torch.multinomial(distance.cpu() / distance.cpu().max(), 1, generator=generator))
        centres = torch.cat([centres, features[drawn : drawn + 1]])
    centres = centres[1:] if len(centres) > 1 else centres
    for _ in range(_ROUNDS):
        found = torch.cdist(features, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, found, features)
        counts = torch.bincount(found, minlength=len(centres))
        moved = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    numbered: Tensor = torch.unique(found, return_inverse=True)[1]
    return numbered


def kmeans(values: Tensor, words: int) -> Tensor:
    """Codewords ``(words,)`` in ascending order, by Lloyd's iteration in one dimension.

    Every word ends as the mean of the values nearest to it. The better of two starts is taken, from quantiles and from
    equal steps.

    Args:
        values: ``(n,)``.
        words: number of codewords; where there are fewer values, the last is repeated.

    Example:
        >>> kmeans(torch.tensor([0.0, 0.5, 5.0, 5.5, 9.0]), 3).tolist()
        [0.25, 5.25, 9.0]
    """
    ordered = values.double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    steps = (torch.arange(words, dtype=torch.float64, device=values.device) + 0.5) / words
    found = []
    for start in (ordered[(steps * len(ordered)).long()], ordered[0] + steps * (ordered[-1] - ordered[0])):
        centres = start
        for _ in range(_ROUNDS):
            ends = torch.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2, right=True)
            edges = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(ordered))])
            counts = edges[1:] - edges[:-1]
            means = (sums[edges[1:]] - sums[edges[:-1]]) / counts.clamp(min=1)
            moved = torch.where(counts > 0, means, centres).sort().values
            if torch.equal(moved, centres):
                break
            centres = moved
        found.append(((ordered - centres[nearest(ordered, centres)]).square().sum(), centres))
    return min(found, key=lambda entry: float(entry[0]))[1].to(values.dtype)


def nearest(values: Tensor, words: Tensor) -> Tensor:
    """The index of the nearest of some ascending words for each value."""
    return torch.searchsorted((words[1:] + words[:-1]) / 2, values)
