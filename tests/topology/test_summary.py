"""Numbers and drawings of topologies, against networkx."""

import math
import sys

import networkx as nx
import numpy as np
import pytest
import torch
from edge_sets import edges_of, fixed
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm_graph import topology
from nsm_graph.topology import NodeSet, spectrum

edge_lists = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20)


def diameter(graph):
    if not nx.is_strongly_connected(graph):
        return math.inf
    return nx.diameter(graph)


@settings(max_examples=60)
@given(edge_lists, st.integers(1, 7))
def test_of_any_graph(edges, n):
    edges = [(i, j) for i, j in edges if max(i, j) < n]
    summary = fixed(edges).describe(n)
    graph = nx.DiGraph(edges)
    graph.add_nodes_from(range(n))
    degrees = [d for _, d in nx.MultiDiGraph(edges).in_degree()]
    assert summary.num_edges == len(edges)
    assert summary.degree[1] == len(edges) / n
    assert summary.degree[2] == max(degrees, default=0)
    assert summary.diameter == diameter(graph)
    laplacian = nx.normalized_laplacian_matrix(graph.to_undirected()).toarray()
    eigenvalues = np.linalg.eigvalsh(laplacian)
    assert summary.spectral_gap == pytest.approx(eigenvalues[1] if n > 1 else 0, abs=1e-8)


@pytest.mark.parametrize(
    "rule",
    [
        topology.complete(),
        topology.ring(3),
        topology.path(),
        topology.star(),
        topology.tree(3),
        topology.causal(),
        topology.expander(4),
        topology.hierarchical(4),
    ],
)
@pytest.mark.parametrize("n", [8, 130])
def test_of_built_in_rules(rule, n):
    summary = rule.describe(n)
    graph = nx.DiGraph(edges_of(rule, [n]))
    assert summary.diameter == diameter(graph)
    assert summary.cost == graph.number_of_edges() / n**2
    degrees = [d for _, d in graph.in_degree()]
    assert summary.degree == (min(degrees), sum(degrees) / n, max(degrees))


def test_the_gap_of_many_nodes_is_found_step_by_step(monkeypatch):
    for rule in (topology.expander(6), topology.small_world(3, 0.2), topology.torus(15, 20)):
        relation = rule(NodeSet.from_counts([300]))
        exact = spectrum.spectral_gap(relation.edge_index, 300)
        monkeypatch.setattr(spectrum, "MAX_EXACT_NODES", 100)
        assert spectrum.spectral_gap(relation.edge_index, 300) == pytest.approx(exact, abs=1e-4)
        monkeypatch.undo()


def test_one_node_and_parts():
    alone = topology.self_loops().describe(1)
    assert (alone.diameter, alone.spectral_gap) == (0, 0)
    first = topology.causal().describe(1)
    assert (first.degree, first.diameter) == ((1, 1.0, 1), 0)
    apart = topology.blocks(2).describe(8)
    assert (apart.diameter, apart.spectral_gap) == (math.inf, pytest.approx(0, abs=1e-12))


def test_the_table():
    assert str(topology.ring().describe(4)).splitlines() == [
        "ring(1) over 4 nodes",
        "edges         8 (50.0% of complete)",
        "degree        min 2, mean 2.0, max 2",
        "diameter      2",
        "spectral gap  1.0000",
    ]


def test_of_states():
    nodes = NodeSet.from_counts([5], torch.arange(5.0).unsqueeze(1))
    assert topology.knn(1).describe(nodes).num_edges == 5


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (0, r"ring\(1\) over 0 -> 0 nodes: there is nothing to describe; pass at least one"),
        (NodeSet.from_counts([3, 3]), r"ring\(1\) was asked about 2 examples; describe them one"),
    ],
)
def test_nothing_to_describe(nodes, message):
    with pytest.raises(ValueError, match=message):
        topology.ring().describe(nodes)


# Drawings #########################################################################


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


@pytest.mark.parametrize("layout", ["circle", "line", "matrix"])
@pytest.mark.parametrize(
    "rule", [topology.complete(), topology.causal(), topology.ring(), topology.self_loops()]
)
def test_plot(pyplot, rule, layout):
    ax = rule.plot(6, layout=layout)
    assert ax.get_title() == repr(rule)
    ax.figure.canvas.draw()
    if layout == "matrix":
        image = np.asarray(ax.images[0].get_array())
        assert {(i, j) for j, i in zip(*image.nonzero(), strict=True)} == set(edges_of(rule, [6]))


def test_plot_where_nodes_stand(pyplot):
    axes = pyplot.figure().subplots()
    positions = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert topology.path().plot(3, positions=positions, ax=axes) is axes
    assert np.array_equal(axes.collections[-1].get_offsets(), positions)
    with pytest.raises(ValueError, match=r"positions must have shape \(3, 2\), .* \(2, 2\)"):
        topology.path().plot(3, positions=positions[:2])
    with pytest.raises(ValueError, match="layout must be one of circle, line, matrix, but is 'x'"):
        topology.path().plot(3, layout="x")


def test_plot_of_two_sets(pyplot):
    from nsm_graph.topology.drawing import draw

    relation = topology.band(1)(NodeSet.from_counts([4]), NodeSet.from_counts([3]))
    draw(relation, "tokens to states").figure.canvas.draw()


def test_plot_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"plot needs matplotlib: pip install 'nsm-graph\[rep"):
        topology.ring().plot(4)
