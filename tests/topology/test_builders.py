"""Static rules against plain loops and networkx."""

import copy
import pickle

import networkx as nx
import pytest
import torch
from edge_sets import between, edges_of, in_each_example
from hypothesis import given
from hypothesis import strategies as st

import nsm_graph as nsm
from nsm_graph import topology
from nsm_graph.topology import NodeSet

counts_lists = st.lists(st.integers(0, 7), max_size=4)


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

    assert set(edges_of(topology.ring(k), counts)) == in_each_example(counts, one)


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


def both_ways(graph):
    return set(
        nx.relabel.convert_node_labels_to_integers(graph, ordering="sorted").to_directed().edges
    )


@given(counts_lists)
def test_path(counts):
    def one(n):
        return [(i, j) for i in range(n) for j in range(n) if abs(i - j) == 1]

    assert set(edges_of(topology.path(), counts)) == in_each_example(counts, one)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (1, 4), (2, 3, 4)])
def test_grid_is_the_grid_graph(shape):
    graph = nx.grid_graph(list(reversed(shape)))
    assert set(edges_of(topology.grid(*shape), [graph.number_of_nodes()])) == both_ways(graph)


@pytest.mark.parametrize("shape", [(3, 5), (7,), (3, 4, 5)])
def test_torus_is_the_periodic_grid_graph(shape):
    graph = nx.grid_graph(list(reversed(shape)), periodic=True)
    n = graph.number_of_nodes()
    assert set(edges_of(topology.torus(*shape), [n, n])) == in_each_example(
        [n, n], lambda n: both_ways(graph)
    )
    assert topology.torus(*shape)(NodeSet.from_counts([n])).degree == 2 * len(shape)


@pytest.mark.parametrize("shape", [(2, 2), (1, 3), (2,)])
def test_a_torus_of_short_axes_names_no_edge_twice(shape):
    edges = set(edges_of(topology.torus(*shape), [topology_size(shape)]))
    assert all(i != j for i, j in edges)
    assert edges >= set(edges_of(topology.grid(*shape), [topology_size(shape)]))


def topology_size(shape):
    size = 1
    for axis in shape:
        size *= axis
    return size


@pytest.mark.parametrize(("branching", "n"), [(1, 5), (2, 1), (2, 15), (2, 11), (3, 14)])
def test_tree_is_the_full_rary_tree(branching, n):
    graph = nx.full_rary_tree(branching, n).to_directed()
    assert set(edges_of(topology.tree(branching), [n])) == set(graph.edges)


@pytest.mark.parametrize(("size", "n"), [(2, 1), (2, 7), (3, 27), (3, 20), (4, 64), (5, 3)])
def test_hierarchical(size, n):
    def group(i, level):
        return i // size ** (level + 1)

    edges = {
        (i, j)
        for level in range(8)
        for i in range(0, n, size**level)
        for j in range(0, n, size**level)
        if i != j and group(i, level) == group(j, level)
    }
    assert set(edges_of(topology.hierarchical(size), [n])) == edges
    graph = nx.DiGraph(edges)
    graph.add_nodes_from(range(n))
    assert nx.is_strongly_connected(graph)


def test_from_parents():
    parents = [2, 2, -1, 0, -1]
    edges = {(0, 2), (1, 2), (3, 0)}
    rule = topology.from_parents(torch.tensor(parents))
    both = edges | {(j, i) for i, j in edges}
    assert set(edges_of(rule, [5, 0, 5])) == in_each_example([5, 0, 5], lambda n: both if n else [])


@given(counts_lists, st.integers(0, 4))
def test_spans(counts, width):
    def near(n, before, after):
        return [(i, j) for i in range(n) for j in range(n) if -before <= i - j <= after]

    for rule, before, after in [
        (topology.band(width), width, width),
        (topology.window(width), width, 0),
        (topology.causal(), 99, 0),
    ]:
        expected = in_each_example(counts, lambda n, b=before, a=after: near(n, b, a))
        assert set(edges_of(rule, counts)) == expected


@given(counts_lists, st.integers(0, 3), st.integers(1, 3))
def test_dilated(counts, width, dilation):
    def one(n):
        steps = [dilation * d for d in range(-width, width + 1)]
        return [(j + d, j) for j in range(n) for d in steps if 0 <= j + d < n]

    assert set(edges_of(topology.dilated(width, dilation), counts)) == in_each_example(counts, one)


@given(st.lists(st.integers(3, 9), max_size=3), st.integers(1, 3))
def test_blocks(counts, num_blocks):
    def one(n):
        block = [i * num_blocks // n for i in range(n)]
        return [(i, j) for i in range(n) for j in range(n) if block[i] == block[j]]

    assert set(edges_of(topology.blocks(num_blocks), counts)) == in_each_example(counts, one)


# By attribute #####################################################################

attributes = st.lists(st.lists(st.integers(-2, 3), max_size=5), min_size=1, max_size=3)


def with_attribute(values, name="pos"):
    flat = torch.tensor([v for part in values for v in part], dtype=torch.long)
    return NodeSet.from_counts([len(part) for part in values], attributes={name: flat})


@given(attributes, attributes, st.integers(0, 2))
def test_spans_by_attribute(sources, targets, width):
    num = min(len(sources), len(targets))
    sources, targets = sources[:num], targets[:num]
    source_of = [(b, v) for b, part in enumerate(sources) for v in part]
    target_of = [(b, v) for b, part in enumerate(targets) for v in part]
    for rule, before, after in [
        (topology.band(width, by="pos"), width, width),
        (topology.window(width, by="pos"), width, 0),
        (topology.causal(by="pos"), 99, 0),
        (topology.blocks(by="pos"), 0, 0),
    ]:
        relation = rule(with_attribute(sources), with_attribute(targets))
        edges = list(map(tuple, relation.edge_index.T.tolist()))
        assert edges == [
            (i, j)
            for j, (example, target) in enumerate(target_of)
            for i, (other, source) in enumerate(source_of)
            if example == other and -before <= source - target <= after
        ]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (NodeSet.from_counts([2]), r"band\(1, by='pos'\) compares the .* no attributes; pass"),
        (with_attribute([[1]], "kind"), "but the node set has 'kind'"),
        (
            NodeSet.from_counts([2], attributes={"pos": torch.zeros(2, 2)}),
            r"needs one number for each of the 2 nodes, but 'pos' has shape \(2, 2\)",
        ),
        (
            NodeSet.from_counts([3], attributes={"pos": torch.tensor([0, torch.nan, torch.inf])}),
            "needs finite numbers, but 'pos' has others: row 1: nan, row 2: inf",
        ),
    ],
)
def test_wrong_attributes(nodes, message):
    with pytest.raises(ValueError, match=message):
        topology.band(1, by="pos")(nodes)


def test_attributes_have_a_row_for_each_node():
    with pytest.raises(ValueError, match=r"'pos' must have one row for each of the 3 nodes"):
        NodeSet.from_counts([3], attributes={"pos": torch.zeros(2)})


# Between two node sets ############################################################


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=3), st.integers(0, 3))
def test_places_are_compared_between_two_sets(sizes, width):
    counts = [m for m, _ in sizes], [n for _, n in sizes]

    def expected(is_edge):
        edges, source, target = set(), 0, 0
        for m, n in sizes:
            edges |= {(source + i, target + j) for i in range(m) for j in range(n) if is_edge(i, j)}
            source, target = source + m, target + n
        return edges

    assert between(topology.complete(), *counts) == expected(lambda i, j: True)
    assert between(topology.band(width), *counts) == expected(lambda i, j: abs(i - j) <= width)
    assert between(topology.causal(), *counts) == expected(lambda i, j: i <= j)
    assert between(~topology.causal(), *counts) == expected(lambda i, j: i > j)
    assert between(topology.dilated(1, 2), *counts) == expected(lambda i, j: i - j in (-2, 0, 2))
    assert between(topology.causal().reverse(), *counts) == expected(lambda i, j: i >= j)
    combined = topology.band(width) & topology.causal() | topology.window(0)
    assert between(combined, *counts) == expected(lambda i, j: 0 <= j - i <= width)


@given(counts_lists)
def test_causal_stores_no_edges(counts):
    nodes = NodeSet.from_counts(counts)
    relation = topology.causal()(nodes)
    assert relation.is_causal
    assert relation.sources is relation.targets is nodes.nodes
    assert topology.causal()(nodes, NodeSet.from_counts(counts)).is_causal
    assert relation._edge_index is relation._csr is None
    assert not (topology.causal() | topology.ring()).reverse()(nodes).is_causal
    other = topology.causal()(nodes, NodeSet.from_counts([n + 1 for n in counts]))
    assert other.is_causal == (counts == [])
    biased = topology.causal().biased(lambda edges: -edges.distance.float())(nodes)
    assert biased.is_causal
    assert biased.bias.shape == (relation.num_edges, 1)


def test_blocks_between_two_sets():
    block = [i * 3 // 7 for i in range(7)], [j * 3 // 4 for j in range(4)]
    expected = {(i, j) for i in range(7) for j in range(4) if block[0][i] == block[1][j]}
    assert between(topology.blocks(3), [7], [4]) == expected


@pytest.mark.parametrize(
    "rule",
    [
        topology.ring(),
        topology.star(),
        topology.grid(2, 2),
        topology.tree(),
        topology.self_loops(),
        topology.hierarchical(),
        topology.small_world(1),
        topology.expander(3),
        topology.learned(4, 1),
        topology.band(1).power(2),
        topology.band(1) | topology.ring(),
        topology.rule(lambda nodes: torch.zeros(2, 0, dtype=torch.long)),
    ],
)
def test_rules_about_one_set_say_so(rule):
    message = r"joins the nodes of one set, but was asked for edges from 4 to 3 nodes of two"
    with pytest.raises(ValueError, match=message):
        rule(NodeSet.from_counts([4]), NodeSet.from_counts([3]))


def test_two_sets_need_the_same_examples():
    with pytest.raises(ValueError, match=r"complete\(\) was given 2 examples of sources, but 1 of"):
        topology.complete()(NodeSet.from_counts([1, 1]), NodeSet.from_counts([2]))


# What is kept #####################################################################


def test_a_pattern_is_worked_out_once():
    rule = topology.ring(2)
    first, again = rule(NodeSet.from_counts([8])), rule(NodeSet.from_counts([8]))
    assert first is again
    assert rule(NodeSet.from_counts([9])) is not first
    assert copy.deepcopy(rule)(NodeSet.from_counts([8])) is not first


def test_patterns_build_no_edge_list():
    for rule in (
        topology.complete(),
        topology.ring(2),
        topology.band(3),
        topology.expander(4),
        topology.ring(2) | topology.self_loops(),
    ):
        relation = rule(NodeSet.from_counts([16, 16]))
        if not relation.is_complete:
            assert relation.csr.ptr.tolist()[0] == 0
        assert relation._edge_index is None


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
    for text in (
        "path()", "grid(2, 3)", "torus(3, 3)", "tree(2)", "band(2)", "window(3)", "causal()",
        "dilated(2, 3)", "blocks(4)", "hierarchical(4)", "small_world(2, 0.1, seed=0)",
        "random_regular(4, seed=1)", "expander(4, seed=0)", "band(2, by='pos')", "causal(by='pos')",
        "blocks(by='kind')", "knn(4)", "knn(4, metric='cosine')", "top_k(2)", "radius(1.5)",
        "threshold(0.5, 'cosine')", "random(4, seed=2)", "learned(6, 2)",
        "scheduled({0: complete(), 4: ring(1)})", "ring(1).reverse()", "ring(1).power(2)",
    ):  # fmt: skip
        assert repr(eval(f"topology.{text}", {"topology": topology, **vars(topology)})) == text
    fixed = topology.from_edge_index(torch.tensor([[0, 1], [1, 2]]), num_nodes=4)
    assert repr(fixed) == "from_edge_index(2 edges, 4 nodes)"


@pytest.mark.parametrize("k", [0, -1])
def test_wrong_k(k):
    with pytest.raises(ValueError, match=rf"ring\(k\) .* but k is {k}; use k >= 1"):
        topology.ring(k)
    with pytest.raises(ValueError, match=f"needs at least one hub, but hubs is {k}"):
        topology.star(k)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: topology.band(-1), r"band\(width\) needs width >= 0, but width is -1"),
        (lambda: topology.window(1.5), "needs width >= 0, but width is 1.5, no integer"),
        (lambda: topology.ring(1.5), "but k is 1.5"),
        (lambda: topology.ring(1).power(1.5), "but k is 1.5"),
        (lambda: topology.from_adjacency([[0.0, float("nan")]]), "the first at row 0, column 1"),
        (lambda: topology.dilated(1, 0), r"dilated\(.*needs dilation >= 1, but dilation is 0"),
        (lambda: topology.blocks(0), r"blocks\(num_blocks\) needs num_blocks >= 1"),
        (lambda: topology.blocks(), "exactly one of num_blocks and by=, but got None and None"),
        (lambda: topology.grid(), r"grid\(\*shape\) needs the nodes along each axis; got none"),
        (lambda: topology.torus(3, 0), r"torus\(\*shape\) needs every axis >= 1"),
        (lambda: topology.tree(0), r"tree\(branching\) needs branching >= 1"),
        (lambda: topology.hierarchical(1), r"hierarchical\(size\) needs size >= 2"),
        (lambda: topology.from_parents([]), "needs one integer for each node, but got shape"),
        (lambda: topology.from_parents([-1, 5, 0]), r"parents in -1\.\.2, but has row 1: 5"),
        (
            lambda: topology.from_parents([1, 2, 3, 1, -1]),
            "needs a tree, but these are their own ancestors: 1 -> 2 -> 3 -> 1; give one",
        ),
        (lambda: topology.ring().power(0), r"power\(k\) takes 1 to k steps, but k is 0"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "counts", "message"),
    [
        (
            topology.grid(2, 3),
            [6, 5, 5],
            r"grid\(2, 3\) has 6 nodes, .* 5; .*\(example 1 and 1 more",
        ),
        (topology.torus(4), [3], r"torus\(4\) has 4 nodes, but an example has 3; choose a shape"),
        (topology.blocks(3), [4, 2], r"blocks\(3\) needs at least 3 nodes .* \(example 1\)"),
        (topology.from_parents([-1, 0]), [3], "is for examples of 2 nodes, but one has 3; make a"),
        (topology.grid(2, 3) | topology.ring(), [5], "but an example has 5"),
        (topology.grid(2, 3).reverse().power(2), [5], "but an example has 5"),
    ],
)
def test_other_node_counts(rule, counts, message):
    with pytest.raises(ValueError, match=message):
        rule(NodeSet.from_counts(counts))


def test_wrong_fixed_edges():
    edge_index = torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match="names target 2, but there are 2 target nodes"):
        topology.from_edge_index(edge_index, num_nodes=2)
    rule = topology.from_edge_index(edge_index)
    with pytest.raises(
        ValueError, match=r"examples of 3 nodes, but one has 4; make a .* \(example 0\)"
    ):
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
