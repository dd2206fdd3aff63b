"""Messages of graph hypernetworks: against loops over nodes and edges, and against networkx's shortest paths."""

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from netwright.search._ghn_gnn import GatedGNN, messages
from netwright.search._ghn_graph import NetworkGraph, Node, path_lengths


def random_graph(size, seed):
    rng = np.random.default_rng(seed)
    edges = [
        (a, b) for b in range(1, size) for a in range(b) if rng.random() < 0.3 or (a == b - 1 and rng.random() < 0.8)
    ]
    return NetworkGraph(tuple(Node("sum") for _ in range(size)), tuple(edges))


def naive_sweeps(gnn, states, graph, cutoff, rounds):
    """One node after the other in the order of computation, one edge after the other."""
    net = nx.DiGraph(list(graph.edges))
    net.add_nodes_from(range(len(graph.nodes)))
    states = [states[place : place + 1] for place in range(len(graph.nodes))]
    for _ in range(rounds):
        for turned in (net, net.reverse()):
            lengths = dict(nx.all_pairs_shortest_path_length(turned, cutoff=cutoff))
            for node in range(len(states)) if turned is net else reversed(range(len(states))):
                heard = torch.zeros_like(states[node])
                for other in range(len(states)):
                    distance = lengths[other].get(node, 0)
                    if distance == 1:
                        heard = heard + gnn.near(states[other])
                    elif distance > 1:
                        heard = heard + gnn.far(states[other]) / distance
                states[node] = gnn.cell(heard, states[node])
    return torch.cat(states)


@pytest.mark.parametrize(("cutoff", "rounds"), [(1, 1), (3, 1), (50, 2)])
def test_sweeps_equal_loops_over_nodes_and_edges(cutoff, rounds):
    torch.manual_seed(cutoff)
    graphs = [random_graph(9, 1), random_graph(6, 2)]
    gnn = GatedGNN(4, virtual=cutoff > 1, rounds=rounds).double()
    states = torch.randn(15, 4, dtype=torch.float64)
    found = gnn(states, messages(graphs, cutoff))
    wanted = [
        naive_sweeps(gnn, part, graph, cutoff, rounds) for part, graph in zip(states.split([9, 6]), graphs, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-6, atol=1e-7)


def test_without_virtual_edges_it_is_plain_message_passing():
    graph, states = random_graph(10, 3), torch.randn(10, 4)
    torch.manual_seed(0)
    gnn = GatedGNN(4, virtual=True, rounds=1)
    for value in gnn.far[-1].parameters():
        nn.init.zeros_(value)  # virtual edges say nothing
    plain = GatedGNN(4, virtual=False, rounds=1)
    plain.load_state_dict({name: value for name, value in gnn.state_dict().items() if "far" not in name})
    with_edges = gnn(states, messages([graph], 50))
    torch.testing.assert_close(with_edges, plain(states, messages([graph], 1)))
    torch.testing.assert_close(with_edges, gnn(states, messages([graph], 1)))


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 14), st.integers(0, 1000), st.integers(1, 5))
def test_virtual_edges_follow_shortest_paths(size, seed, cutoff):
    graph = random_graph(size, seed)
    net = nx.DiGraph(list(graph.edges))
    net.add_nodes_from(range(size))
    wanted = np.full((size, size), np.inf)
    for tail, found in nx.all_pairs_shortest_path_length(net, cutoff=cutoff):
        for head, length in found.items():
            wanted[tail, head] = length
    np.testing.assert_array_equal(path_lengths(graph, cutoff), wanted)
    sweep = messages([graph], cutoff).forward
    heard = np.zeros((size, size))
    start = 0
    for block, end in zip(sweep.far, sweep.ends, strict=True):
        heard[np.ix_(sweep.order[start:end], sweep.order[:start])] = block
        start = end
    expected = np.where((wanted > 1) & np.isfinite(wanted), 1 / np.maximum(wanted, 1), 0).T
    np.testing.assert_allclose(heard, expected, rtol=1e-6)
