"""What an entrywise operation makes of zeros, found by asking it."""

from itertools import product
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["zero_image"]

_PROBES = (0.7, -1.3)  # any two values that no common function maps to zero


def zero_image(node: fx.Node, null: tuple[bool, ...]) -> tuple[bool, bool]:
    """Apply ``node``'s operation to one entry: zero for the tensors flagged in ``null``, something else for the rest.

    Args:
        node: a call of an entrywise operation.
        null: one flag for each tensor argument, in order.

    Returns:
        Whether the result is zero whatever the other tensors are, and whether the zeros make it infinite or NaN
        where other values would not.
    """
    tensors = [item for item in node.all_input_nodes_in_order] if False else _tensor_nodes(node)
    free = null.count(False)
    zero, singular = any(null), False
    for values in product(range(len(_PROBES)), repeat=min(free, 4)):
        filled = iter((*values, *([0] * max(0, free - 4))))
        choice = [None if flag else next(filled) for flag in null]
        result = _apply(node, dict(zip(map(id, tensors), choice, strict=False)))
        if result is None:
            return False, False
        zero = zero and bool((result == 0).all())
        if any(null) and not bool(torch.isfinite(result).all()):
            other = _apply(node, {id(tensor): c if c is not None else 0 for tensor, c in zip(tensors, choice, strict=False)})
            singular = singular or (other is not None and bool(torch.isfinite(other).all()))
    return zero, singular
