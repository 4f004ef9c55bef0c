"""Rules of given edges: matrices, networkx graphs, PyG data."""

import networkx as nx
import numpy as np
import pytest
import torch
from edge_sets import between, edges_of
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import Data
from torch_geometric.utils import from_networkx as pyg_from_networkx

from nsm_graph import topology
from nsm_graph.topology import NodeSet

matrices = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 2), min_size=n, max_size=n), min_size=n, max_size=n)
)


@given(matrices)
def test_from_adjacency(matrix):
    n = len(matrix)
    expected = {(i, j) for i in range(n) for j in range(n) if matrix[i][j]}
    tensor = torch.tensor(matrix)
    for adjacency in (matrix, np.array(matrix), tensor, tensor.to_sparse(), tensor > 0):
        assert set(edges_of(topology.from_adjacency(adjacency), [n])) == expected


def test_from_an_adjacency_between_two_sets():
    rule = topology.from_adjacency([[0, 1, 1], [1, 0, 0]])
    assert repr(rule) == "from_adjacency(3 edges, 2 -> 3 nodes)"
    assert between(rule, [2, 0, 2], [3, 0, 3]) == {
        (0, 1), (0, 2), (1, 0), (2, 4), (2, 5), (3, 3),
    }  # fmt: skip


def test_from_edges_between_two_sets():
    rule = topology.from_edge_index(torch.tensor([[2, 0], [0, 1]]), (3, 2))
    assert between(rule, [3], [2]) == {(2, 0), (0, 1)}
    assert between(rule.reverse(), [2], [3]) == {(0, 2), (1, 0)}
    with pytest.raises(ValueError, match="for examples of 3 -> 2 nodes, but one has 3; make a"):
        rule(NodeSet.from_counts([3]))


@pytest.mark.parametrize(
    "graph",
    [nx.petersen_graph(), nx.gn_graph(9, seed=1), nx.path_graph("abcd"), nx.empty_graph(3)],
)
def test_from_networkx(graph):
    rule = topology.from_networkx(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    edges = {(order[i], order[j]) for i, j in graph.to_directed().edges}
    assert set(edges_of(rule, [len(order)])) == edges
    data = pyg_from_networkx(graph)
    if data.edge_index is not None:
        assert set(edges_of(topology.from_data(data), [len(order)])) == edges


def test_attributes_follow_their_edges():
    seen = []

    def look(edges):
        seen.append(edges.attr.tolist())
        return torch.zeros(edges.relation.num_edges)

    graph = nx.Graph([(0, 1, {"length": 5}), (1, 2, {"length": 7})])
    topology.from_networkx(graph, attribute="length").biased(look)(NodeSet.from_counts([3]))
    matrix = [[0, 5, 0], [5, 0, 7], [0, 7, 0]]
    topology.from_adjacency(matrix, weights=True).biased(look)(NodeSet.from_counts([3, 0, 3]))
    edge_attr = torch.tensor([[1.0], [2.0]])
    data = Data(edge_index=torch.tensor([[2, 0], [1, 1]]), edge_attr=edge_attr, num_nodes=3)
    topology.from_data(data).biased(look)(NodeSet.from_counts([3]))
    assert seen == [[5, 5, 7, 7], [5, 5, 7, 7] * 2, [[2.0], [1.0]]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: topology.from_edge_index(torch.tensor([[0, 9, 1], [0, 0, 8]]), 8),
            r"from_edge_index: .* names source 9, but there are 8 .* \(edge 1: 9 -> 0\)",
        ),
        (
            lambda: topology.from_edge_index(torch.tensor([[0, -1], [0, 0]])),
            r"from_edge_index: .* negative index -1; .* \(edge 1: -1 -> 0\)",
        ),
        (
            lambda: topology.from_edge_index(torch.zeros(2, 0, dtype=torch.long)),
            "got an empty graph of 0 -> 0 nodes; give it edges, or say with num_nodes=",
        ),
        (
            lambda: topology.from_edge_index(
                torch.tensor([[0, 1, 0], [1, 0, 1]]), edge_attr=torch.arange(3)
            ),
            r"got edges more than once, each with attributes .* \(edge 2: 0 -> 1\)",
        ),
        (
            lambda: topology.from_edge_index(torch.tensor([[0], [1]]), edge_attr=torch.arange(3)),
            r"one row of edge_attr for each of the 1 edges, but it has shape \(3,\)",
        ),
        (lambda: topology.from_networkx(nx.Graph()), "a graph without nodes; add at least one"),
        (lambda: topology.from_networkx([(0, 1)]), "needs a networkx graph, but got list"),
        (
            lambda: topology.from_networkx(nx.path_graph(2), attribute="length"),
            "asked for the attribute 'length', but the edge 0 -> 1 has none",
        ),
        (lambda: topology.from_adjacency(torch.zeros(0, 0)), r"at least one row .* shape \(0, 0\)"),
        (lambda: topology.from_data(Data(x=torch.zeros(2, 1))), "from_data needs an edge_index"),
    ],
)
def test_wrong_graphs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_repeated_edges_count_once():
    rule = topology.from_edge_index(torch.tensor([[0, 1, 0], [1, 0, 1]]))
    assert edges_of(rule, [2]) == [(1, 0), (0, 1)]
