"""The inverse of a damped empirical Fisher matrix, never formed: for second-order training and for pruning."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from netwright.core.errors import SettingError

__all__ = ["InverseFisher", "inverse_root", "row_products", "solve_gram"]

_CPU_CHUNK = 1 << 18  # elements held in float64 at a time: 2 MiB, about what a core's caches hold
_DEVICE_CHUNK = 1 << 25


class _Piece(NamedTuple):
    """Equal blocks of neighbouring entries ``start:stop``.

    Args:
        start, stop: which entries.
        factor: W, ``(n, m, b)``, where the inverse is ``(I - Wᵀ W) / damping``, or the inverse itself, ``(n, b, b)``.
        low_rank: which of the two.
    """

    start: int
    stop: int
    factor: Tensor
    low_rank: bool


class InverseFisher:
    r"""Multiplies with the inverse of a damped empirical Fisher matrix of ``d`` parameters, given ``m`` gradients.

    Reach for it where a loss is to be expanded to second order around trained weights: the rise in loss when weight
    ``i`` is set to zero is ``w[i]**2 / (2 * inverse.diagonal()[i])``, and the best answer of all other weights is a
    multiple of a column of the inverse. The gradients are those of single items or small batches.

    With the gradients :math:`g_1, \dots, g_m` as rows of :math:`G \in \mathbb R^{m \times d}` and the damping
    :math:`\lambda`,

    .. math:: F = \lambda I + \frac1m \sum_{i=1}^m g_i g_i^\top, \qquad
              F^{-1} = \frac1\lambda \big(I - W^\top W\big), \qquad
              W = L^{-1} G, \quad L L^\top = m \lambda I + G G^\top,

    with :math:`L` lower triangular. :math:`F^{-1} x` is then two products with :math:`W`, the diagonal
    :math:`(1 - \sum_k W_{ki}^2) / \lambda`, a single entry a product of two columns of :math:`W`. With ``block_size``,
    entries of :math:`F` outside square blocks on its diagonal are taken as zero, and each block is treated so on its
    own; a block of at most ``m`` entries is inverted as a dense matrix instead.

    Cost: ``O(d m**2)`` once, ``O(d m)`` for each product, ``O(d)`` for the diagonal, ``O(m)`` for an entry; ``m + 1``
    words of memory for each parameter, besides the gradients, which are not kept. The ``(m, m)`` matrices, and all
    sums over parameters at construction, are in float64.

    Args:
        gradients: ``(m, d)`` floating-point, left untouched. Half precision is kept in float32.
        damping: :math:`\lambda > 0`, in the units of a squared gradient.
        block_size: entries in a block; None for one block. The last block may be smaller.

    Raises:
        SettingError: gradients that are not a finite real matrix, or a setting outside its range.

    Example:
        >>> gradients = torch.tensor([[1.0, 0.0, 2.0], [0.0, 2.0, 2.0]])
        >>> inverse = InverseFisher(gradients, damping=0.5)
        >>> inverse.dot(torch.tensor([1.0, 0.0, 0.0]))
        tensor([ 1.5263,  0.4211, -0.5263])
        >>> inverse.diagonal()
        tensor([1.5263, 0.7368, 0.5263])

    Source: paper 14, Frantar, Kurtic and Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
    Information", 2021, arXiv 2107.03356, the static algorithm.

    Differs: the paper finds :math:`W`, up to the scale of its rows, by a recursion over gradients (Woodbury's identity,
    one gradient at a time). Its coefficients are those of the Cholesky factor above, which needs matrix products only
    and is backward stable; where rounding makes the factorization fail, an eigendecomposition with non-negative
    eigenvalues takes its place. The diagonal is kept within its bounds
    :math:`1/F_{ii} \le (F^{-1})_{ii} \le 1/\lambda`, which cancellation could leave. With small blocks the paper has
    no dense form.
    """

    @torch.no_grad()
    def __init__(self, gradients: Tensor, damping: float, *, block_size: int | None = None) -> None:
        _check(gradients, damping, block_size)
        if gradients.dtype in (torch.float16, torch.bfloat16):
            gradients = gradients.float()
        self.count, self.size = gradients.shape
        self.damping = float(damping)
        self.block_size = self.size if block_size is None else min(block_size, self.size)
        self._diagonal = gradients.new_empty(self.size)
        self._pieces = [self._piece(gradients, start, stop) for start, stop in self._spans()]

    @torch.no_grad()
    def dot(self, x: Tensor) -> Tensor:
        """The inverse times ``x``, for vectors ``(..., d)``; what comes out has the dtype of the gradients.

        Raises:
            SettingError: another last dimension.
        """
        if x.ndim == 0 or x.shape[-1] != self.size:
            raise SettingError(f"InverseFisher.dot takes vectors of {self.size} entries, got shape {tuple(x.shape)}.")
        flat = x.to(self._diagonal).reshape(-1, self.size)
        out = torch.empty_like(flat)
        for start, stop, factor, low_rank in self._pieces:
            blocks = flat[:, start:stop].reshape(len(flat), *factor.shape[::2]).permute(1, 2, 0)  # (n, b, vectors)
            product = factor @ blocks
            if low_rank:
                product = (blocks - factor.mT @ product) / self.damping
            out[:, start:stop] = product.permute(2, 0, 1).reshape(len(flat), -1)
        return out.reshape(x.shape)

    def diagonal(self) -> Tensor:
        """The diagonal of the inverse, ``(d,)``."""
        return self._diagonal.clone()

    def entry(self, row: int, column: int) -> float:
        """One entry of the inverse; indices may count from the end.

        Raises:
            SettingError: an index outside the matrix.
        """
        for index in (row, column):
            if not -self.size <= index < self.size:
                raise SettingError(f"InverseFisher.entry: there is no row or column {index} among {self.size}.")
        row, column = row % self.size, column % self.size
        if row == column:
            return float(self._diagonal[row])
        piece = next(piece for piece in self._pieces if piece.start <= row < piece.stop)
        block, row = divmod(row - piece.start, piece.factor.shape[2])
        other, column = divmod(column - piece.start, piece.factor.shape[2])
        if block != other:
            return 0.0
        factor = piece.factor[block]
        return float(-(factor[:, row] @ factor[:, column]) / self.damping if piece.low_rank else factor[row, column])

    def _spans(self) -> list[tuple[int, int]]:
        """Where whole blocks lie, and where the smaller last one does."""
        whole = self.size // self.block_size * self.block_size
        return [(start, stop) for start, stop in ((0, whole), (whole, self.size)) if start < stop]

    def _piece(self, gradients: Tensor, start: int, stop: int) -> _Piece:
        width = min(self.block_size, stop - start)
        blocks = gradients[:, start:stop].reshape(self.count, -1, width).transpose(0, 1)  # (n, m, b)
        low_rank = width > self.count
        factor = gradients.new_empty(len(blocks), self.count if low_rank else width, width)
        diagonal = self._diagonal[start:stop].view(-1, width)
        batch = max(1, _chunk(gradients.device) // (self.count * max(self.count, width)))
        for first in range(0, len(blocks), batch):
            part = slice(first, first + batch)
            if low_rank:
                _whiten(blocks[part], self.damping, factor[part], diagonal[part])
            else:
                _invert(blocks[part], self.damping, factor[part], diagonal[part])
        return _Piece(start, stop, factor, low_rank)


def _whiten(rows: Tensor, damping: float, factor: Tensor, diagonal: Tensor) -> None:
    """Fill W and the diagonal of ``(I - Wᵀ W) / damping`` for gradients ``(n, m, b)`` of n blocks."""
    blocks, count, _ = rows.shape
    gram = torch.zeros(blocks, count, count, dtype=torch.float64, device=rows.device)
    for _, chunk in _chunks(rows):
        gram.baddbmm_(chunk, chunk.mT)
    root = inverse_root(gram, count * damping)
    for place, chunk in _chunks(rows):
        white = root @ chunk
        least = 1 / (damping + chunk.square().sum(1) / count)
        factor[..., place] = white
        diagonal[..., place] = ((1 - white.square().sum(1)) / damping).maximum(least).clamp_(max=1 / damping)


def _invert(rows: Tensor, damping: float, inverse: Tensor, diagonal: Tensor) -> None:
    """Fill the dense inverses ``(n, b, b)`` and their diagonals for gradients ``(n, m, b)`` of n blocks."""
    wide = rows.double()
    root = inverse_root(wide.mT @ wide / rows.shape[1], damping)
    inverse.copy_(root.mT @ root)
    diagonal.copy_(inverse.diagonal(dim1=1, dim2=2))


def _chunk(device: torch.device) -> int:
    return _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK


def _chunks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The matrices ``(..., m, d)`` in float64, a few columns at a time in the same memory, and where these are."""
    width = min(rows.shape[-1], max(1, _chunk(rows.device) // math.prod(rows.shape[:-1])))
    buffer = torch.empty(*rows.shape[:-1], width, dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[-1], max(1, width)):
        part = rows[..., start : start + width]
        yield slice(start, start + width), buffer[..., : part.shape[-1]].copy_(part)


def row_products(rows: Tensor, vector: Tensor) -> Tensor:
    """The products of each row of ``(m, d)`` with a vector ``(d,)``, summed in float64, without a copy of the rows.

    Entries of a Gram matrix are small differences of large sums where gradients are nearly parallel: in float32 their
    error would exceed the damping.
    """
    out = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    for place, chunk in _chunks(rows):
        out.addmv_(chunk, vector[place].double())
    return out


def solve_gram(gram: Tensor, ridge: float, right: Tensor, eps: float) -> Tensor:
    """``c = (G Gᵀ + ridge I)^-1 right`` for a product ``Gᵀ c`` with rows G known to a relative accuracy ``eps``.

    Where rows are parallel to within ``eps``, entries of ``c`` are huge and cancel in the product. What is left then is
    rounding, so the parts of ``c`` along these directions, whose true product vanishes, are set to zero.

    Args:
        gram: ``G Gᵀ``, ``(m, m)`` in float64.
        ridge: greater than 0.
        right: ``(m,)`` in float64.
        eps: the spacing of the dtype of G.
    """
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    if not bool(failed):
        solution = torch.cholesky_solve(right[:, None], factor).flatten()
        signal, noise = solution @ (gram @ solution), eps**2 * (solution.square() @ gram.diagonal())
        if bool(noise < 1e-4 * signal):
            return solution
    values, vectors = torch.linalg.eigh(gram)
    resolved = values > max((4 * eps) ** 2, len(gram) * torch.finfo(gram.dtype).eps) * values[-1]
    inside: Tensor = torch.where(resolved, (vectors.mT @ right) / (values + ridge), 0.0)
    spectral: Tensor = vectors @ inside
    return spectral


def inverse_root(gram: Tensor, ridge: float) -> Tensor:
    """R with ``Rᵀ R = (gram + ridge I)^-1`` for ``(n, m, m)`` without negative eigenvalues but for rounding."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * identity)
    if bool(failed.any()):
        values, vectors = torch.linalg.eigh(gram)
        spectral: Tensor = vectors.mT / (values.clamp(min=0) + ridge).sqrt()[..., None]
        return spectral
    root: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    return root


def _check(gradients: Tensor, damping: float, block_size: int | None) -> None:
    if gradients.ndim != 2 or 0 in gradients.shape or not gradients.is_floating_point():
        raise SettingError(
            f"InverseFisher needs a real matrix of gradients, (m, d), got {gradients.dtype} of shape "
            f"{tuple(gradients.shape)}. Stack the flattened gradients of m items."
        )
    if not bool(gradients.isfinite().all()):
        raise SettingError("InverseFisher: some gradients are not finite. Leave those items out.")
    number = isinstance(damping, int | float) and not isinstance(damping, bool)
    if not number or not 0 < damping < math.inf or 1 / damping > torch.finfo(gradients.dtype).max:
        raise SettingError(
            f"InverseFisher: damping must be a finite number greater than 0 whose inverse is finite in "
            f"{gradients.dtype}, got {damping!r}."
        )
    whole = isinstance(block_size, int) and not isinstance(block_size, bool)
    if block_size is not None and not (whole and block_size >= 1):
        raise SettingError(f"InverseFisher: block_size must be a positive integer or None, got {block_size!r}.")
