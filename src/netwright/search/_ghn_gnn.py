"""Gated message passing along a network's graph and back, with virtual edges between nodes that are not neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from netwright.search._ghn_graph import NetworkGraph, path_lengths

__all__ = ["GatedGNN", "Messages", "Sweep", "messages"]


class Sweep(NamedTuple):
    """The nodes of a batch of graphs in the order in which one direction visits them.

    Args:
        order: ``(n,)`` numbers of the nodes, those of one depth together.
        ends: where in ``order`` each depth ends.
        near: for each depth ``(its nodes, all earlier nodes)`` 1 where an edge leads to the node.
        far: likewise ``1 / s`` where the shortest path has ``1 < s <= cutoff`` edges.
    """

    order: Tensor
    ends: tuple[int, ...]
    near: tuple[Tensor, ...]
    far: tuple[Tensor, ...]


@dataclass(frozen=True)
class Messages:
    """Both directions of a batch of graphs."""

    forward: Sweep
    backward: Sweep


def messages(graphs: Sequence[NetworkGraph], cutoff: int) -> Messages:
    """Who hears whom in a batch of graphs, whose nodes are numbered one graph after the other.

    Args:
        graphs: at least one.
        cutoff: longest path that makes a virtual edge; 1 for none.
    """
    size = sum(len(graph.nodes) for graph in graphs)
    lengths = np.full((size, size), np.inf)
    start = 0
    for graph in graphs:
        end = start + len(graph.nodes)
        lengths[start:end, start:end] = path_lengths(graph, cutoff)
        start = end
    return Messages(_sweep(lengths.T), _sweep(lengths))


def _sweep(lengths: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> Sweep:
    """Of ``lengths[v, u]``, the edges from ``u`` to ``v``."""
    near = lengths == 1
    depth = np.zeros(len(lengths), dtype=int)
    while True:
        deeper = np.where(near.any(1), (near * (depth + 1)).max(1), 0)
        if (deeper == depth).all():
            break
        depth = deeper
    order = np.argsort(depth, kind="stable")
    ends = tuple(np.cumsum(np.bincount(depth)).tolist())
    weights = np.where((lengths > 1) & np.isfinite(lengths), 1.0 / np.maximum(lengths, 1.0), 0.0)
    rows = [order[begin:end] for begin, end in zip((0, *ends[:-1]), ends, strict=True)]
    blocks = [
        tuple(
            torch.from_numpy(matrix[np.ix_(row, order[:begin])]).to(torch.get_default_dtype())
            for row, begin in zip(rows, (0, *ends[:-1]), strict=True)
        )
        for matrix in (near.astype(float), weights)
    ]
    return Sweep(torch.from_numpy(order), ends, blocks[0], blocks[1])


class GatedGNN(nn.Module):
    r"""Updates the nodes of a graph one after the other, forward and then backward, ``(n, d) -> (n, d)``.

    A node :math:`v` hears the nodes :math:`u` before it, whose states are those that this sweep has given them, and

    .. math:: m_v = \sum_{s_{vu} = 1} f(h_u) + \sum_{1 < s_{vu} \le S} \tfrac{1}{s_{vu}} f'(h_u), \qquad
              h_v \leftarrow \mathrm{GRU}(m_v, h_v)

    with :math:`s_{vu}` the edges on the shortest path from :math:`u` to :math:`v`, and perceptrons :math:`f, f'` of one
    hidden layer. The backward sweep does the same with all edges turned round.

    Args:
        features: :math:`d`.
        virtual: whether there is :math:`f'`.
        rounds: forward and backward sweeps.
    """

    def __init__(self, features: int, virtual: bool, rounds: int) -> None:
        super().__init__()
        self.near = _perceptron(features)
        self.far = _perceptron(features) if virtual else None
        self.cell = nn.GRUCell(features, features)
        self._rounds = rounds

    def forward(self, states: Tensor, graph: Messages) -> Tensor:
        """States after all sweeps.

        Args:
            states: ``(n, d)`` of all nodes of the batch.
            graph: who hears whom.
        """
        for _ in range(self._rounds):
            for sweep in (graph.forward, graph.backward):
                states = self._sweep(states, sweep)
        return states

    def _sweep(self, states: Tensor, sweep: Sweep) -> Tensor:
        ordered = states[sweep.order]
        done: list[Tensor] = []
        near: list[Tensor] = []
        far: list[Tensor] = []
        start = 0
        for level, end in enumerate(sweep.ends):
            heard = torch.zeros_like(ordered[start:end])
            if start:
                heard = sweep.near[level].to(heard) @ torch.cat(near)
                if self.far is not None:
                    heard = heard + sweep.far[level].to(heard) @ torch.cat(far)
            state = self.cell(heard, ordered[start:end])
            done.append(state)
            near.append(self.near(state))
            if self.far is not None:
                far.append(self.far(state))
            start = end
        return torch.cat(done)[torch.argsort(sweep.order)]


def _perceptron(features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, features))
