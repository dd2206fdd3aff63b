"""Entropic optimal transport between two sets of numbers of equal weight."""

import math

import torch
from torch import Tensor

__all__ = ["barycentric_target", "sinkhorn_plan"]


def sinkhorn_plan(a: Tensor, b: Tensor, eps: float, *, iterations: int = 1000, tolerance: float = 1e-3) -> Tensor:
    r"""The plan that moves :math:`a` to :math:`b` at the least cost, blurred by entropy.

    .. math:: \Pi = \arg\min_{\Pi \ge 0} \sum_{ij} \Pi_{ij} (a_i - b_j)^2 + \varepsilon \sum_{ij} \Pi_{ij}
              \log \Pi_{ij} \quad\text{s.t.}\quad \Pi 1 = 1/n,\ \Pi^\top 1 = 1/m

    by Sinkhorn's scaling of rows and columns in the log domain, from the duals of exact transport where :math:`n = m`;
    columns last, so that these are exact. As :math:`\varepsilon \to \infty` the plan becomes uniform; as
    :math:`\varepsilon \to 0`, it moves the smallest of :math:`a` to the smallest of :math:`b`, and so on.

    Args:
        a: ``(n,)``.
        b: ``(m,)``.
        eps: :math:`\varepsilon > 0`, in the units of a squared entry.
        iterations: scalings of rows and columns, at most.
        tolerance: largest error of a row sum, relative to ``1/n``, at which scaling ends.

    Returns:
        ``(n, m)`` in float64.

    Example:
        >>> sinkhorn_plan(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]), 0.01).round(decimals=6)
        tensor([[0.0000, 0.5000],
                [0.5000, 0.0000]], dtype=torch.float64)

    Cost: ``O(n m)`` for each iteration; four ``(n, m)`` matrices.
    """
    kernel = -(a.double()[:, None] - b.double()[None, :]).square() / eps
    rows, columns = math.log(len(a)), math.log(len(b))
    right = _exact_duals(a.double(), b.double()) / eps if len(a) == len(b) else torch.zeros_like(kernel[0])
    for _ in range(iterations):
        left = -rows - torch.logsumexp(kernel + right, 1)
        right = -columns - torch.logsumexp(kernel + left[:, None], 0)
        plan = torch.softmax(kernel + left[:, None], 0) / len(b)  # exp(kernel + left + right), without large duals
        if float((plan.sum(1) * len(a) - 1).abs().max()) <= tolerance:
            break
    return plan


def _exact_duals(a: Tensor, b: Tensor) -> Tensor:
    r"""Dual values :math:`v_j` of exact transport between as many entries, where scaling starts.

    In ascending order entry :math:`k` moves to entry :math:`k`. With :math:`c` the cost, :math:`v_{k+1} - v_k` lies
    between :math:`c(a_{k+1}, b_{k+1}) - c(a_{k+1}, b_k)` and :math:`c(a_k, b_{k+1}) - c(a_k, b_k)`: in the middle here.
    """
    first, (second, order) = a.sort().values, b.sort()
    middle = (first[1:] + first[:-1]) / 2
    rise = (middle - second[1:]).square() - (middle - second[:-1]).square()
    return torch.zeros_like(b).scatter(0, order[1:], rise.cumsum(0))


def barycentric_target(plan: Tensor, a: Tensor) -> Tensor:
    r"""Where the plan takes each :math:`b_j` from, :math:`t_j = \sum_i \Pi_{ij} a_i / \sum_i \Pi_{ij}`, ``(m,)``."""
    mixed: Tensor = (plan.mT @ a.double()) / plan.sum(0)
    return mixed.to(a)
