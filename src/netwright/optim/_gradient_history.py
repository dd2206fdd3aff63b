"""Points and gradients of the recent past, and what kernel regression on them predicts elsewhere."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["GradientHistory", "Predictor", "matern", "regression_weights"]

_SCALES = tuple(2.0**power for power in range(-2, 9, 2))  # length-scales tried, in median distances between points
_NOISES = (1e-6, 1e-3, 1e-1)  # noise variances tried


def matern(squared: Tensor, length_scale: float) -> Tensor:
    r"""Matérn-5/2 kernel :math:`(1 + u + u^2/3) e^{-u}`, :math:`u = \sqrt{5} r / \ell`, of squared distances."""
    u = squared.clamp_min(0).sqrt().mul(math.sqrt(5) / length_scale)
    return (1 + u + u * u / 3) * torch.exp(-u)


def regression_weights(among: Tensor, across: Tensor, length_scale: float, noise: float) -> Tensor:
    r"""Rows :math:`k(x, X) (K + \sigma^2 I)^{-1}`, from squared distances.

    Args:
        among: between the points, ``(t, t)``, float64.
        across: from where to predict to the points, ``(n, t)``.
        length_scale: of the kernel.
        noise: variance :math:`\sigma^2`, in units of the kernel's at distance zero.
    """
    kernel = matern(among, length_scale)
    kernel.diagonal().add_(noise)
    factor, failed = torch.linalg.cholesky_ex(kernel)
    right = matern(across.to(among), length_scale).mT
    if bool(failed):  # points that coincide, and no noise: the least-norm solution
        factor = torch.linalg.pinv(kernel, hermitian=True)
        least_norm: Tensor = factor @ right
        return least_norm.mT
    solved: Tensor = torch.cholesky_solve(right, factor)
    return solved.mT


class Predictor(NamedTuple):
    """A regression that is ready to predict.

    Args:
        points: in the kernel's coordinates, ``(t, m)``.
        grads: ``(t, d)``.
        among: squared distances of the points, ``(t, t)``.
        length_scale: of the kernel; infinite predicts the newest gradient everywhere.
        noise: see :func:`regression_weights`.
        newest: row of the newest point.
    """

    points: Tensor
    grads: Tensor
    among: Tensor
    length_scale: float
    noise: float
    newest: int

    def __call__(self, point: Tensor) -> Tensor:
        """The gradient predicted at ``point`` ``(m,)``, shape ``(d,)``."""
        if math.isinf(self.length_scale):
            return self.grads[self.newest].clone()
        across = _squared(point[None], self.points).double()
        weights = regression_weights(self.among, across, self.length_scale, self.noise)
        return (weights.to(self.grads) @ self.grads)[0]


class _Store(NamedTuple):
    """Rows are used in turn: points ``(c, m)``, gradients ``(c, d)``, and tables over pairs of rows ``(c, c)``."""

    points: Tensor
    grads: Tensor
    squared: Tensor
    products: Tensor


class GradientHistory:
    """The newest ``capacity`` points with their gradients, and the distances and products that regression needs.

    A new point costs one pass over the stored points and gradients; a prediction costs another.

    Args:
        capacity: points kept; the oldest gives way.
        coordinates: which entries of a point enter distances; None is all of them.
    """

    def __init__(self, capacity: int, coordinates: Tensor | None = None) -> None:
        self.capacity, self.coordinates = capacity, coordinates
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.count = 0
        self._store: _Store | None = None

    def __len__(self) -> int:
        return min(self.count, self.capacity)

    def select(self, point: Tensor) -> Tensor:
        """The coordinates of ``point`` ``(d,)`` that enter distances."""
        return point if self.coordinates is None else point[self.coordinates.to(point.device)]

    def add(self, point: Tensor, grad: Tensor) -> None:
        """Keep one point ``(d,)`` and its gradient; one that is not finite is left out."""
        near = self.select(point)
        if not bool(grad.isfinite().all() & near.isfinite().all()):
            return
        if self._store is None:
            rows, columns = (entry.new_zeros(self.capacity, len(entry)) for entry in (near, grad))
            table = torch.zeros(self.capacity, self.capacity, dtype=torch.float64, device=grad.device)
            self._store = _Store(rows, columns, table, table.clone())
        store, row = self._store, self.count % self.capacity
        store.points[row], store.grads[row] = near, grad
        self.count += 1
        size = len(self)
        for table, values in (
            (store.squared, _squared(near[None], store.points[:size])[0]),
            (store.products, store.grads[:size] @ grad),
        ):
            table[row, :size] = values.double()
            table[:size, row] = values.double()

    def predictor(self, recent: int, length_scale: float | None, noise: float | None) -> Predictor:
        """What predicts gradients.

        Args:
            recent: what is not given is chosen so that the older points predict the ``recent`` newest best.
            length_scale: of the kernel, or None.
            noise: see :func:`regression_weights`; or None.
        """
        store, size, newest = self._filled(), len(self), (self.count - 1) % self.capacity
        among = store.squared[:size, :size]
        apart = among[among > 0]
        unit = math.sqrt(float(apart.median())) if len(apart) else math.inf
        scales = [unit * scale for scale in _SCALES] if length_scale is None else [length_scale]
        noises = _NOISES if noise is None else (noise,)
        chosen = self._choose(store, recent, scales, noises)
        return Predictor(store.points[:size], store.grads[:size], among, *chosen, newest)

    def _filled(self) -> _Store:
        assert self._store is not None
        return self._store

    def _choose(
        self, store: _Store, recent: int, scales: Sequence[float], noises: Sequence[float]
    ) -> tuple[float, float]:
        size = len(self)
        cut = max(size - recent, 0)
        if cut < 2 or math.isinf(scales[0]) or len(scales) * len(noises) == 1:
            return scales[-1], noises[0]
        order = torch.arange(self.count - size, self.count, device=store.squared.device) % self.capacity
        old, new = order[:cut], order[cut:]
        among, across = store.squared[old][:, old], store.squared[new][:, old]
        products = store.products[old][:, old], store.products[new][:, old], store.products.diagonal()[new]
        pairs = [(scale, noise) for scale in scales for noise in noises]
        errors = [_error(regression_weights(among, across, *pair), *products) for pair in pairs]
        return pairs[errors.index(min(errors))]

    def state(self) -> dict[str, Any]:
        """Everything, in tensors and numbers."""
        if self._store is None:
            return {"count": 0}
        size = len(self)
        kept = {name: getattr(self._store, name)[:size].clone() for name in _Store._fields}
        return {"count": self.count, **kept}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Take back what :meth:`state` returned."""
        self.clear()
        self.count = int(state["count"])
        if self.count:
            rows = [state[name].to(device) for name in _Store._fields]
            grown = [torch.cat([row, row.new_zeros(self.capacity - len(row), row.shape[1])]) for row in rows]
            self._store = _Store(*grown)


def _error(weights: Tensor, old: Tensor, crossed: Tensor, new: Tensor) -> float:
    r"""Squared distance between gradients and ``weights`` times others, from inner products.

    Args:
        weights: ``(n, t)``.
        old: products of the others among each other, ``(t, t)``.
        crossed: products of the gradients with the others, ``(n, t)``.
        new: squared norms of the gradients, ``(n,)``.
    """
    error = float(new.sum() - 2 * (weights * crossed).sum() + ((weights @ old) * weights).sum())
    return error if math.isfinite(error) else math.inf


def _squared(left: Tensor, right: Tensor) -> Tensor:
    """Squared distances ``(n, t)`` without the cancellation of an expanded square."""
    return torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist").square()
