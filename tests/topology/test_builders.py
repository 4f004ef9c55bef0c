"""Static rules against plain loops and networkx."""

import copy
import pickle

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nsm_graph as nsm
from nsm_graph import topology
from nsm_graph.topology import NodeSet

counts_lists = st.lists(st.integers(0, 7), max_size=4)


def edges_of(rule, counts):
    """Edges in order; a rule must name no edge twice and keep inside its nodes."""
    relation = rule(NodeSet.from_counts(counts))
    assert relation.size == (sum(counts), sum(counts))
    edges = [tuple(edge) for edge in relation.edge_index.T.tolist()]
    assert len(edges) == len(set(edges))
    assert all(0 <= node < sum(counts) for edge in edges for node in edge)
    return edges


def in_each_example(counts, edges_of_one):
    first, edges = 0, set()
    for count in counts:
        edges |= {(first + i, first + j) for i, j in edges_of_one(count)}
        first += count
    return edges


@given(counts_lists)
def test_complete(counts):
    expected = in_each_example(counts, lambda n: [(i, j) for i in range(n) for j in range(n)])
    assert set(edges_of(topology.complete(), counts)) == expected
    assert topology.complete()(NodeSet.from_counts(counts)).is_complete


@given(counts_lists, st.integers(1, 9))
def test_ring(counts, k):
    def one(n):
        return [
            ((j + sign * d) % n, j)
            for j in range(n)
            for d in range(1, k + 1)
            for sign in (-1, 1)
            if (j + sign * d) % n != j
        ]

    edges = edges_of(topology.ring(k), counts)
    assert set(edges) == in_each_example(counts, one)
    assert edges == sorted(edges, key=lambda edge: edge[::-1])


@pytest.mark.parametrize(("n", "k"), [(33, 1), (63, 3), (8, 2)])
def test_ring_is_the_circulant_graph(n, k):
    graph = nx.circulant_graph(n, range(1, k + 1)).to_directed()
    assert set(edges_of(topology.ring(k), [n])) == set(graph.edges)


@given(counts_lists, st.integers(1, 9))
def test_star(counts, hubs):
    def one(n):
        return [(i, j) for i in range(n) for j in range(n) if i != j and min(i, j) < hubs]

    assert set(edges_of(topology.star(hubs), counts)) == in_each_example(counts, one)


@pytest.mark.parametrize("n", [2, 33])
def test_star_is_the_star_graph(n):
    graph = nx.star_graph(n - 1).to_directed()
    assert set(edges_of(topology.star(), [n])) == set(graph.edges)


@given(counts_lists)
def test_self_loops(counts):
    expected = [(i, i) for i in range(sum(counts))]
    assert edges_of(topology.self_loops(), counts) == expected


@given(st.integers(0, 3), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), unique=True))
def test_fixed_edges_repeat_in_every_example(num_examples, edges):
    edge_index = torch.tensor(edges, dtype=torch.long).view(-1, 2).T
    rule = topology.from_edge_index(edge_index, num_nodes=5)
    assert set(edges_of(rule, [5] * num_examples)) == in_each_example(
        [5] * num_examples, lambda n: edges
    )


def test_fixed_edges_skip_examples_without_nodes():
    rule = topology.from_edge_index(torch.tensor([[0, 1], [1, 2]]))
    assert edges_of(rule, [0, 0]) == []
    assert edges_of(rule, []) == []
    assert set(edges_of(rule, [3, 0, 3])) == {(0, 1), (1, 2), (3, 4), (4, 5)}


@pytest.mark.parametrize(
    "rule",
    [
        topology.ring(),
        topology.star(),
        topology.self_loops(),
        topology.from_edge_index(torch.tensor([[0, 1], [1, 2]])),
    ],
)
def test_the_dense_view_is_per_example(rule):
    node_set = NodeSet.from_counts([3, 3])
    relation = rule(node_set)
    assert not rule.is_dynamic
    dense = relation.to_dense(torch.ones(relation.num_edges))
    assert dense.shape == (2, 3, 3)
    assert torch.equal(dense[0], dense[1])
    for source, target in relation.edge_index.T.tolist():
        assert dense[source // 3, target % 3, source % 3] == 1


def test_repr():
    assert repr(topology.complete()) == "complete()"
    assert repr(topology.ring(3)) == "ring(3)"
    assert repr(topology.star(2)) == "star(2)"
    assert repr(topology.self_loops()) == "self_loops()"
    fixed = topology.from_edge_index(torch.tensor([[0, 1], [1, 2]]), num_nodes=4)
    assert repr(fixed) == "from_edge_index(2 edges, 4 nodes)"


@pytest.mark.parametrize("k", [0, -1])
def test_wrong_k(k):
    with pytest.raises(ValueError, match=rf"ring\(k\) .* but k is {k}; use k >= 1"):
        topology.ring(k)
    with pytest.raises(ValueError, match=f"needs at least one hub, but hubs is {k}"):
        topology.star(k)


def test_wrong_fixed_edges():
    edge_index = torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="names target 2, but there are 2 target nodes"):
        topology.from_edge_index(edge_index, num_nodes=2)
    rule = topology.from_edge_index(edge_index)
    with pytest.raises(ValueError, match=r"examples of 3 nodes, but one has 4; make a .* \(example 0\)"):
        rule(NodeSet.from_counts([4, 3]))


@topology.rule
def everyone_to_the_first(nodes):
    """Module level, so that it can be found by name."""
    return torch.stack([torch.arange(nodes.num_nodes), nodes.ptr[nodes.batch]])


def test_a_machine_with_a_rule_can_be_pickled():
    machine = nsm.NeuralStateMachine(
        2, 4, 3, 1, segment_length=2, heads=2, communication=everyone_to_the_first
    )
    x = torch.randn(5, 2)
    copies = [pickle.loads(pickle.dumps(machine)), copy.deepcopy(machine)]
    for copied in copies:
        assert copied.cell.topology is everyone_to_the_first
        torch.testing.assert_close(copied(x), machine(x))
