"""The Jacobian of a network's outputs, item by item, from the graph that its forward pass left behind.

Of an affine layer the derivative by the weights is a product of what goes in and what comes back, so that one backward
pass without weight gradients gives the rows of all items at once. Everything else goes through ordinary autograd.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from netwright.optim._item_rows import KNOWN, Piece, Use, piece_of, wide
from netwright.optim._output_curvature import other_half

__all__ = ["ItemJacobian", "find_uses", "is_coupled"]

_BLOCK = 64  # rows that one batched backward pass computes


def find_uses(root: Node, wanted: dict[int, Tensor], stop: Node | None = None) -> tuple[list[Use], tuple[Any, ...]]:
    """Where the tensors of ``wanted`` (by ``id``) enter the graph under ``root``, and the graph's signature.

    Args:
        root: where to begin.
        wanted: leaf tensors.
        stop: a node not to go past.
    """
    uses: list[Use] = []
    names: list[str] = []
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        names.append(node.name())
        if node is stop:
            continue
        for place, (following, _) in enumerate(node.next_functions):
            if following is None:
                continue
            leaf = _leaf(following)
            transposed = leaf is None and following.name() == "TBackward0"
            if transposed:
                after = following.next_functions[0][0]
                leaf = None if after is None else _leaf(after)
            if leaf is not None and id(leaf) in wanted:
                uses.append(Use(leaf, node, place, transposed))
            elif following not in seen:
                seen.add(following)
                waiting.append(following)
    nodes: list[Any] = [use.node for use in uses if "BatchNorm" in use.node.name()]
    return uses, (*names, *(bool(node._saved_training) for node in nodes))


def _leaf(node: Node) -> Tensor | None:
    leaf = getattr(node, "variable", None)
    return leaf if isinstance(leaf, Tensor) else None


def is_coupled(outputs: Tensor, uses: Sequence[Use]) -> bool:
    """Whether outputs of some items depend on what happens to others, as under batch normalization in training.

    Half of the items are seeded; nothing may come back to the other half. Layers whose items are not their outermost
    dimension look coupled.
    """
    items = len(outputs)
    nodes = [node for node in dict.fromkeys(use.node for use in uses) if node.name() in KNOWN]
    if items == 1 or not nodes:
        return False
    half = other_half(items, outputs.device)
    seed = torch.linspace(1.0, 2.0, outputs.numel(), dtype=outputs.dtype, device=outputs.device).view_as(outputs)
    seed = seed * half.view(-1, *(1,) * (outputs.dim() - 1))
    backs = [back[0] for back in backward(outputs, nodes, seed[None])]
    return any(len(back) % items == 0 and bool((back.reshape(items, -1)[~half] != 0).any()) for back in backs)


class ItemJacobian:
    """The Jacobian of ``outputs`` by ``params``, seen through seeds: row ``(i, k)`` is ``seeds[k, i] @ d outputs[i]``.

    Args:
        outputs: ``(b, ...)``, with their graph.
        params: leaf tensors of that graph, or none of it.
        uses: of ``params`` (see :func:`find_uses`).
        seeds: ``(k, b, ...)``.
        whole: True where items are coupled: then each row takes a backward pass of its own. Where it is False and
            items are coupled after all, row ``(i, k)`` is what the activations of item ``i`` contribute when all
            items are seeded with their ``k``-th; over items, they add up to the exact gradient.
    """

    def __init__(self, outputs: Tensor, params: Sequence[Tensor], uses: Sequence[Use], seeds: Tensor, whole: bool):
        self.items, self.count, self.device = outputs.shape[0], len(seeds), outputs.device
        self.dtype = torch.float64 if any(param.dtype == torch.float64 for param in params) else torch.float32
        by_param: dict[int, list[tuple[Node, Piece | None]]] = defaultdict(list)
        for use in uses:
            by_param[id(use.param)].append((use.node, None if whole else piece_of(use, self.items)))
        self.pieces: list[list[tuple[Piece, Tensor]]] = [[] for _ in params]
        plain = {place for place, param in enumerate(params) if any(e[1] is None for e in by_param[id(param)])}
        taken = [param for place, param in enumerate(params) if place not in plain]
        nodes = list(dict.fromkeys(node for param in taken for node, _ in by_param[id(param)]))
        backs = dict(zip(nodes, backward(outputs, nodes, seeds), strict=True)) if nodes else {}
        for place, param in enumerate(params):
            for node, piece in [] if place in plain else by_param[id(param)]:
                assert piece is not None
                back = backs[node]
                if back.shape[1] != self.items:  # places were folded into the items
                    back = back.reshape(len(back), self.items, -1, *back.shape[2:])
                self.pieces[place].append((piece, back))
        self.dense: dict[int, Tensor] = {}
        if plain:
            order = sorted(plain)
            rows = _rows_by_autograd(outputs, [params[place] for place in order], seeds)
            self.dense = dict(zip(order, rows, strict=True))

    def rows(self, place: int) -> Tensor | None:
        """The rows by one parameter, ``(b * k, p)``; None where no row depends on it."""
        found = self.dense.get(place)
        for piece, back in self.pieces[place]:
            part = piece.rows(back).reshape(self.items * self.count, -1)
            found = part if found is None else found + part
        return found

    def gram(self, shares: Sequence[float]) -> Tensor:
        """Inner products of the rows, those by each parameter times its share, ``(b * k, b * k)``."""
        size = self.items * self.count
        total = torch.zeros(size, size, dtype=self.dtype, device=self.device)
        for place, share in enumerate(shares):
            found = self.pieces[place][0] if len(self.pieces[place]) == 1 else None
            inner = None if found is None else found[0].gram(found[1])
            if inner is not None:
                total.add_(inner, alpha=share)
            elif (rows := self.rows(place)) is not None:
                rows = wide(rows).to(self.dtype)
                total.addmm_(rows, rows.T, alpha=share)
        return total

    def combine(self, place: int, weights: Tensor) -> Tensor | None:
        """The sum of the rows by one parameter, each times its entry of ``weights`` ``(b, k)``, flat."""
        if place in self.dense:
            rows = wide(self.dense[place])
            return weights.flatten().to(rows.dtype) @ rows
        found = None
        for piece, back in self.pieces[place]:
            scale = weights.T.to(back.dtype).reshape(self.count, self.items, *(1,) * (back.dim() - 2))
            part = piece.total((back * scale).sum(0)).flatten()
            found = part if found is None else found + part
        return found

    def along(self, place: int, direction: Tensor) -> Tensor | None:
        """The rows by one parameter times a direction of its shape, ``(b, k)``."""
        if place in self.dense:
            rows = wide(self.dense[place])
            return (rows @ direction.flatten().to(rows.dtype)).view(self.items, self.count)
        parts = [piece.along(back, direction) for piece, back in self.pieces[place]]
        return sum(parts[1:], parts[0]) if parts else None


def backward(outputs: Tensor, nodes: Sequence[Node], seeds: Tensor) -> list[Tensor]:
    """What comes back to the first output of each node for each of ``seeds`` ``(k, b, ...)``, ``(k, ...)`` each."""
    edges = [GradientEdge(node, 0) for node in nodes]
    if len(seeds) == 1:
        return [back[None] for back in torch.autograd.grad(outputs, edges, seeds[0], retain_graph=True)]
    return list(torch.autograd.grad(outputs, edges, seeds, retain_graph=True, is_grads_batched=True))


def _rows_by_autograd(outputs: Tensor, params: Sequence[Tensor], seeds: Tensor) -> list[Tensor]:
    """The rows by backward passes of their own, ``(b * k, p)`` for each parameter."""
    count, items = seeds.shape[:2]
    each = torch.zeros(items, count, items, *seeds.shape[2:], dtype=seeds.dtype, device=seeds.device)
    index = torch.arange(items, device=seeds.device)
    each[index, :, index] = seeds.transpose(0, 1)
    found: list[list[Tensor]] = [[] for _ in params]
    for block in torch.split(each.flatten(0, 1), _BLOCK):
        grads = torch.autograd.grad(outputs, params, block, retain_graph=True, is_grads_batched=True)
        for parts, grad in zip(found, grads, strict=True):
            parts.append(grad.reshape(len(block), -1))
    return [torch.cat(parts) for parts in found]
