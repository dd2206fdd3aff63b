"""Which entries of a regression go first: a share at a time, those that cost least, as Optimal Brain Surgeon has it."""

import torch
from torch import Tensor

from netwright.compress._least_squares import WIDTH, LeastSquares, fit_and_inverse, products

__all__ = ["cuts_for", "eliminate", "fit_and_costs"]

_TINY = 1e-12
_LEAST_CUTS, _MOST_CUTS = 2, 16
_WORTH = 128  # entries for each row below which more cuts than two are worth their time


def fit_and_costs(problem: LeastSquares, index: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""The minimizer among vectors that are zero outside ``index``, and what its entries cost, ``(len(index),)`` each.

    Where entry i of the minimizer w becomes zero and all others adapt, the objective rises by

    .. math:: c_i = \frac{w_i^2}{2 [H^{-1}]_{ii}}, \qquad
              [H^{-1}]_{ii} = \frac1\lambda \Big(1 - x_i^\top (n \lambda I + X X^\top)^{-1} x_i\Big)

    with :math:`H = X^\top X / n + \lambda I` of the columns ``index``, whose products may be ``known``.
    """
    fit, inverse = fit_and_inverse(problem, index, known)
    leverage = []
    for part in torch.split(index, WIDTH):
        columns = problem.rows.mT[part]
        leverage.append((columns * (columns @ inverse.to(columns))).sum(1))
    diagonal = (1 - torch.cat(leverage)).clamp_min(_TINY) / problem.ridge
    return fit, fit.square() / (2 * diagonal)


def cuts_for(rows: int, left: int) -> int:
    """How often to cut: the fewer entries are left, the more each of them matters and the less a cut costs.

    Example:
        >>> [cuts_for(256, left) for left in (1_000_000, 16_000, 4_000, 600)]
        [2, 2, 8, 16]
    """
    return min(_MOST_CUTS, max(_LEAST_CUTS, _WORTH * rows // max(left, 1)))


def eliminate(problem: LeastSquares, start: Tensor, count: int, *, cuts: int | None = None) -> Tensor:
    """The minimizer on a support of ``count`` entries, which is what ``cuts`` cuts leave of the support of ``start``.

    Each cut takes an equal share of what is left: the entries of least cost, after an exact fit of all. None is
    :func:`cuts_for`.

    Cost: for each cut ``O(n**2 s + n**3)`` time with ``s`` entries left, and ``O(n**2 + s)`` memory; all cuts together
    take no longer than two of them over all entries, or ``O(n**3)``.
    """
    index = start.nonzero().flatten()
    known = products(problem, index)
    for left in range(cuts_for(len(problem.target), len(index)) if cuts is None else cuts, 0, -1):
        if len(index) > count:
            keep = round(len(index) * (count / len(index)) ** (1 / left))
            _, costs = fit_and_costs(problem, index, known)
            stays = torch.zeros(len(index), dtype=torch.bool, device=index.device)
            stays[torch.topk(costs, keep, sorted=False).indices] = True
            gone, index = index[~stays], index[stays]
            known = known - products(problem, gone) if len(gone) < len(index) else products(problem, index)
    found = torch.zeros_like(start)
    found[index] = fit_and_inverse(problem, index, known)[0]
    return found
