"""The group sparse envelope and its proximal operator, as functions of the lengths of the groups."""

import torch
from torch import Tensor

__all__ = ["envelope", "envelope_prox"]


def envelope(norms: Tensor, k: int) -> Tensor:
    r"""The group sparse envelope :math:`s_k`, the largest convex function below half a square on k-sparse points.

    .. math:: s_k(x) = \min_{0 \le u \le 1,\ \sum_g u_g \le k} \tfrac12 \sum_g \frac{\lVert x_g \rVert^2}{u_g}

    It is :math:`\frac12 \lVert x \rVert^2` where at most :math:`k` of the groups :math:`x_g` are not zero,
    :math:`\frac12 (\sum_g \lVert x_g \rVert)^2` for :math:`k = 1`.

    Args:
        norms: ``(n,)`` the lengths :math:`\lVert x_g \rVert`.
        k: how many groups are free, from 1 to ``n``.

    Returns:
        A scalar.

    Example:
        >>> envelope(torch.tensor([3.0, 4.0]), 1), envelope(torch.tensor([3.0, 4.0]), 2)
        (tensor(24.5000), tensor(12.5000))

    Cost: :math:`O(n \log n)`.
    """
    there = norms > 0
    shares = _shares(norms, k, 0.0)[there]
    return 0.5 * (norms[there] ** 2 / shares).sum()


def envelope_prox(norms: Tensor, k: int, strength: float) -> Tensor:
    r"""What the proximal operator of :math:`\lambda s_k` multiplies each group by.

    .. math:: \mathrm{prox}_{\lambda s_k}(x)_g = \frac{u_g}{u_g + \lambda}\, x_g, \qquad
              u_g = \min\big(1, \max(0, \eta \lVert x_g \rVert - \lambda)\big), \qquad \sum_g u_g = k

    Args:
        norms: ``(n,)`` the lengths :math:`\lVert x_g \rVert`.
        k: how many groups are free, from 1 to ``n``; for ``n`` this is weight decay, :math:`1 / (1 + \lambda)`.
        strength: :math:`\lambda`, positive.

    Returns:
        ``(n,)`` numbers in [0, 1).

    Example:
        >>> envelope_prox(torch.tensor([1.0, 4.0]), 1, 1.0)
        tensor([0.0000, 0.5000])

    Cost: :math:`O(n \log n)`, for sorting.
    """
    shares = _shares(norms, k, strength)
    return shares / (shares + strength)


def _shares(norms: Tensor, k: int, strength: float) -> Tensor:
    r"""``(n,)`` the :math:`u` of the minimum, :math:`\eta` found exactly.

    :math:`\sum_g u_g` rises with :math:`\eta`, and is linear between the points where a group begins to rise
    (:math:`\lambda / \lVert x_g \rVert`) and where it has reached 1 (:math:`(1 + \lambda) / \lVert x_g \rVert`).
    """
    there = norms > 0
    if int(there.sum()) <= k:
        return there.to(norms.dtype)
    length = norms[there].double()
    points = torch.cat([strength / length, (1.0 + strength) / length])
    slopes = torch.cat([length, -length])
    points, order = points.sort()
    rate = slopes[order].cumsum(0)
    sums = torch.cat([rate.new_zeros(1), (rate[:-1] * points.diff()).cumsum(0)])
    at = int(torch.searchsorted(sums, float(k)).clamp(1, len(points) - 1)) - 1
    eta = points[at] + (k - sums[at]) / rate[at]
    return (eta * norms.double() - strength).clamp(0.0, 1.0).to(norms.dtype)
