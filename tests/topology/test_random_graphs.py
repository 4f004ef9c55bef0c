"""Random graphs: what they promise, against networkx."""

import networkx as nx
import numpy as np
import pytest
import torch
from edge_sets import edges_of

from nsm_graph import topology
from nsm_graph.topology import NodeSet


def as_graph(rule, n):
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(edges_of(rule, [n]))
    return graph


@pytest.mark.parametrize(
    ("n", "degree"),
    [(2, 1), (5, 4), (6, 3), (8, 5), (10, 7), (12, 11), (33, 4), (64, 31), (500, 8)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_random_regular(n, degree, seed):
    rule = topology.random_regular(degree, seed)
    graph = as_graph(rule, n)
    assert nx.is_k_regular(graph.to_undirected(), degree)
    assert set(graph.edges) == set(graph.reverse().edges)
    assert nx.number_of_selfloops(graph) == 0
    assert rule(NodeSet.from_counts([n])).degree == degree


@pytest.mark.parametrize(("n", "degree"), [(64, 3), (200, 4), (1500, 6)])
def test_an_expander_has_a_gap_as_wide_as_its_degree_allows(n, degree):
    graph = as_graph(topology.expander(degree), n)
    assert nx.is_k_regular(graph.to_undirected(), degree)
    assert nx.is_strongly_connected(graph)
    eigenvalues = np.linalg.eigvalsh(nx.to_numpy_array(graph))
    assert eigenvalues[-2] <= 2 * (degree - 1) ** 0.5 * 1.01


@pytest.mark.parametrize(("n", "k", "p"), [(5, 2, 0.5), (40, 2, 0.3), (40, 3, 1.0), (8, 3, 0.9)])
def test_small_world_moves_edges_of_a_ring(n, k, p):
    graph = as_graph(topology.small_world(k, p, seed=3), n)
    assert graph.number_of_edges() == 2 * n * k
    assert set(graph.edges) == set(graph.reverse().edges)
    assert nx.number_of_selfloops(graph) == 0


def test_small_world_lies_between_a_ring_and_a_random_graph():
    n, k = 400, 4
    assert edges_of(topology.small_world(k, 0.0), [n]) == edges_of(topology.ring(k), [n])
    kept = set(edges_of(topology.small_world(k, 0.2), [n])) & set(edges_of(topology.ring(k), [n]))
    assert 0.75 < len(kept) / (2 * n * k) < 0.87
    graph = as_graph(topology.small_world(k, 0.2), n).to_undirected()
    ring = as_graph(topology.ring(k), n).to_undirected()
    assert nx.average_shortest_path_length(graph) < nx.average_shortest_path_length(ring) / 4
    assert nx.average_clustering(graph) > 0.2


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: topology.random_regular(4, seed),
        lambda seed: topology.expander(4, seed),
        lambda seed: topology.small_world(2, 0.5, seed),
    ],
)
def test_the_seed_decides_and_examples_do_not(make):
    state = torch.get_rng_state()
    one = edges_of(make(0), [32])
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"
    assert one == edges_of(make(0), [32])
    assert one != edges_of(make(1), [32])
    two = edges_of(make(0), [40, 32])
    assert [(i - 40, j - 40) for i, j in two if j >= 40] == one


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: topology.expander(2), r"expander\(degree\) needs degree >= 3, but degree is 2"),
        (lambda: topology.random_regular(0), r"random_regular\(degree\) needs degree >= 1"),
        (lambda: topology.small_world(0), r"small_world\(k, p\) needs k >= 1, but k is 0"),
        (lambda: topology.small_world(1, 1.5), r"a probability p in \[0, 1\], but p is 1.5"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "counts", "message"),
    [
        (
            topology.random_regular(4),
            [6, 4],
            r"random_regular\(4, seed=0\) needs more than 4 nodes .* one has 4; .*\(example 1\)",
        ),
        (topology.expander(3), [5], r"expander\(3, seed=0\) needs an even number .* has 5; use"),
        (topology.small_world(2), [4], r"small_world\(2, 0.1, seed=0\) needs more than 4 nodes"),
    ],
)
def test_too_few_nodes(rule, counts, message):
    with pytest.raises(ValueError, match=message):
        rule(NodeSet.from_counts(counts))
