"""Least squares with a ridge around given weights, and its exact solution on a support; no p by p matrix is formed."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["WIDTH", "LeastSquares", "fit_and_inverse", "products", "refit"]

WIDTH = 1024
"""Columns that are gathered, or held in float64, at a time."""


@dataclass(frozen=True)
class LeastSquares:
    r"""The function :math:`f(w) = \frac1{2n} \lVert Xw - t \rVert^2 + \frac\lambda2 \lVert w - \bar w \rVert^2`.

    Args:
        rows: :math:`X`, ``(n, p)``; best with what belongs to one weight together in memory, as columns are taken.
        target: :math:`t`, ``(n,)``.
        anchor: :math:`\bar w`, ``(p,)``.
        ridge: :math:`\lambda > 0`.
        scale: ``(p,)`` above 0, which weights were multiplied by to give the entries of :math:`w`.
    """

    rows: Tensor
    target: Tensor
    anchor: Tensor
    ridge: float
    scale: Tensor

    def weights(self, w: Tensor) -> Tensor:
        """The weights that ``w`` stands for."""
        return w / self.scale

    def value(self, w: Tensor) -> float:
        """The objective."""
        fit = (self.rows @ w - self.target).double().square().sum() / (2 * len(self.target))
        return float(fit + self.ridge / 2 * (w - self.anchor).double().square().sum())

    def gradient(self, w: Tensor) -> Tensor:
        """The gradient, ``(p,)``: two products with the rows."""
        residual = self.rows @ w - self.target
        return self.rows.mT @ (residual / len(residual)) + self.ridge * (w - self.anchor)

    def curvature(self, direction: Tensor) -> float:
        """The second derivative along ``direction``."""
        along = (self.rows @ direction).double().square().sum() / len(self.target)
        return float(along + self.ridge * direction.double().square().sum())

    def columns(self, index: Tensor) -> "LeastSquares":
        """The function of the entries ``index`` alone, all others being zero; it lacks a constant."""
        return replace(self, rows=self.rows.mT[index].mT, anchor=self.anchor[index], scale=self.scale[index])


def refit(problem: LeastSquares, index: Tensor) -> Tensor:
    r"""The minimizer among vectors that are zero outside ``index``, as ``(len(index),)``."""
    return fit_and_inverse(problem, index)[0]


def products(problem: LeastSquares, index: Tensor) -> Tensor:
    """``X X^T`` of the columns ``index``, ``(n, n)`` in float64."""
    size = len(problem.target)
    found = torch.zeros(size, size, dtype=torch.float64, device=problem.target.device)
    for part in torch.split(index, WIDTH):
        columns = problem.rows.mT[part].double()
        found.addmm_(columns.mT, columns)
    return found


def fit_and_inverse(problem: LeastSquares, index: Tensor, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""The minimizer among vectors that are zero outside ``index``, and the ``(n, n)`` matrix C in float64 it needs.

    .. math:: w_S = \bar w_S + X_S^\top C (t - X_S \bar w_S), \qquad C = (n \lambda I + X_S X_S^\top)^{-1}

    ``known`` is what :func:`products` returns for ``index``, where that is at hand.
    """
    anchor = problem.anchor[index]
    right = problem.target.double() - _reach(problem, index, anchor)
    gram = products(problem, index) if known is None else known.clone()
    gram.diagonal().add_(problem.ridge * len(right))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    weights = (inverse @ right).to(problem.rows)
    if _most(problem, index):
        return anchor + (problem.rows.mT @ weights)[index], inverse
    step = torch.cat([problem.rows.mT[part] @ weights for part in torch.split(index, WIDTH)])
    return anchor + step, inverse


def _most(problem: LeastSquares, index: Tensor) -> bool:
    """Whether it is faster to read all columns in order than those of ``index`` alone."""
    return 4 * len(index) > problem.rows.shape[1]


def _reach(problem: LeastSquares, index: Tensor, values: Tensor) -> Tensor:
    """``X w`` in float64 of the vector that has ``values`` at ``index``."""
    if _most(problem, index):
        return (problem.rows @ torch.zeros_like(problem.anchor).index_copy(0, index, values)).double()
    pairs = zip(torch.split(index, WIDTH), torch.split(values, WIDTH), strict=True)
    return sum(((value @ problem.rows.mT[part]).double() for part, value in pairs), start=torch.zeros(()).double())
