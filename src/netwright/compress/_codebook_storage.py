"""A weight as codebooks and packed indices into them."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["StoredCodebooks", "attach", "codebook_bytes", "packed", "unpacked"]


def packed(index: Tensor, bits: int) -> Tensor:
    """Bit ``k`` of all indices in row ``k``, eight to a byte, the first in the lowest bit: ``(bits, ceil(n / 8))``.

    Args:
        index: ``(n,)``, each from 0 to ``2**bits - 1``.
        bits: from 1 to 8.

    Example:
        >>> packed(torch.tensor([1, 0, 3]), 2)
        tensor([[5],
                [4]], dtype=torch.uint8)
    """
    flat = nn.functional.pad(index.flatten().int(), (0, -index.numel() % 8))
    shifts = torch.arange(bits, device=index.device, dtype=torch.int32)[:, None]
    planes = torch.bitwise_and(torch.bitwise_right_shift(flat, shifts), 1)
    powers = 2 ** torch.arange(8, device=index.device, dtype=torch.int32)
    packed: Tensor = (planes.reshape(bits, -1, 8) * powers).sum(-1)
    return packed.to(torch.uint8)


def unpacked(planes: Tensor, count: int) -> Tensor:
    """The first ``count`` indices that :func:`packed` packed, as 32-bit integers.

    Example:
        >>> unpacked(packed(torch.tensor([1, 0, 3]), 2), 3).tolist()
        [1, 0, 3]
    """
    places = 2 ** torch.arange(8, device=planes.device, dtype=torch.int32)
    bits = torch.div(planes[:, :, None].int(), places, rounding_mode="floor") % 2
    each = bits.flatten(1)[:, :count]
    powers = 2 ** torch.arange(planes.shape[0], device=planes.device, dtype=torch.int32)
    return (each * powers[:, None]).sum(0, dtype=torch.int32)


class StoredCodebooks(nn.Module):
    """A parametrization that reads a weight out of codebooks ``(g, k)``; these train, the indices stay.

    Args:
        index: ``(rows, columns)``, the codeword of each weight.
        groups: ``(rows,)``, the codebook of each row.
        bits: of one index.
        shape: of the weight.
    """

    planes: Tensor
    groups: Tensor

    def __init__(self, index: Tensor, groups: Tensor, bits: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("planes", packed(index, bits))
        self.register_buffer("groups", groups.to(torch.uint8))

    def index(self, words: int) -> Tensor:
        """Where each weight's value is in the flattened codebooks, ``(rows, columns)``."""
        rows = self.groups.shape[0]
        columns = 1
        for size in self.shape[1:]:
            columns *= size
        within = unpacked(self.planes, rows * columns).view(rows, columns)
        return within + self.groups.int()[:, None] * words

    def forward(self, codebooks: Tensor) -> Tensor:
        """The weight."""
        return codebooks.flatten()[self.index(codebooks.shape[1]).long()].view(self.shape)


def attach(layer: nn.Module, codebooks: Tensor, reading: nn.Module) -> None:
    """Replace the weight of ``layer`` by ``codebooks``, read by ``reading``, in place."""
    weight = layer.get_parameter("weight")
    parameter = nn.Parameter(codebooks.to(weight.dtype, copy=True), requires_grad=weight.requires_grad)
    layer.register_parameter("weight", parameter)
    parametrize.register_parametrization(layer, "weight", reading, unsafe=True)


def codebook_bytes(rows: int, count: int, groups: int, bits: int, width: int) -> int:
    """Bytes of a stored weight: indices, the codebook of each row, codebooks.

    Args:
        rows: of the weight.
        count: its entries.
        groups: number of codebooks.
        bits: of one index.
        width: bytes of one codeword.
    """
    return int(bits * -(-count // 8) + rows + groups * 2**bits * width)
