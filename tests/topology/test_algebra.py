"""The algebra of topologies against Python sets of edges."""

import copy
import pickle
from dataclasses import replace
from functools import reduce

import networkx as nx
import pytest
import torch
from edge_sets import fixed
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm_graph import Partition, Relation, topology
from nsm_graph.topology import NodeSet, Topology

COUNTS = [4, 0, 3, 1]
NUM_NODES = sum(COUNTS)
FIRST = [0, 4, 4, 7]
INSIDE = [
    (first + i, first + j)
    for first, count in zip(FIRST, COUNTS, strict=True)
    for i in range(count)
    for j in range(count)
]


def nodes():
    return NodeSet.from_counts(COUNTS)


def as_set(rule, node_set=None):
    relation = rule(nodes() if node_set is None else node_set)
    return set(zip(*relation.edge_index.tolist(), strict=True))


inside = st.lists(st.sampled_from(INSIDE), max_size=12)
anywhere = st.lists(
    st.tuples(st.integers(0, NUM_NODES - 1), st.integers(0, NUM_NODES - 1)), max_size=12
)


@given(anywhere, anywhere)
def test_operators_are_those_of_sets(a, b):
    assert as_set(fixed(a) | fixed(b)) == set(a) | set(b)
    assert as_set(fixed(a) & fixed(b)) == set(a) & set(b)
    assert as_set(fixed(a) - fixed(b)) == set(a) - set(b)
    assert as_set(~fixed(a)) == set(INSIDE) - set(a)


@given(anywhere, anywhere)
def test_results_hold_each_edge_once_by_target_then_source(a, b):
    for rule in (fixed(a) | fixed(b), fixed(a) & fixed(b), fixed(a) - fixed(b), ~fixed(a)):
        relation = rule(nodes())
        assert relation.size == (NUM_NODES, NUM_NODES)
        edges = [(target, source) for source, target in relation.edge_index.T.tolist()]
        assert edges == sorted(set(edges))


@given(inside, inside, inside)
def test_laws(a, b, c):
    a, b, c = fixed(a), fixed(b), fixed(c)
    for left, right in [
        (a | b, b | a),
        (a & b, b & a),
        ((a | b) | c, a | (b | c)),
        ((a & b) & c, a & (b & c)),
        (a & (b | c), (a & b) | (a & c)),
        (a | (b & c), (a | b) & (a | c)),
        (~(a | b), ~a & ~b),
        (~(a & b), ~a | ~b),
        (~~a, a),
        (a - b, a & ~b),
        (a | ~a, topology.complete()),
        (a - a, a & ~a),
    ]:
        assert as_set(left) == as_set(right)


@given(st.lists(inside, min_size=1, max_size=4), st.sampled_from("|&-"))
def test_chains_of_rules(lists, operator):
    operators = {
        "|": lambda x, y: x | y,
        "&": lambda x, y: x & y,
        "-": lambda x, y: x - y,
    }
    chained = reduce(operators[operator], map(fixed, lists))
    assert as_set(chained) == reduce(operators[operator], map(set, lists))


# Against networkx #################################################################


def as_graph(rule, node_set):
    graph = nx.DiGraph()
    graph.add_nodes_from(range(node_set.num_nodes))
    graph.add_edges_from(as_set(rule, node_set))
    return graph


small = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=14, unique=True)


@settings(max_examples=30)
@given(small, small, small)
def test_the_algebra_is_that_of_networkx(a, b, c):
    six = NodeSet.from_counts([6])
    # A pattern, a rule asked every time, and one with a bias: the same sets.
    a = topology.from_edge_index(torch.tensor(a).view(-1, 2).T.long(), 6)
    b = fixed(b)
    c = fixed(c).biased(lambda edges: torch.ones(edges.relation.num_edges))
    for left, right in [(a, a), (a, b), (b, c), (c, a)]:
        one, two = as_graph(left, six), as_graph(right, six)
        assert as_set(left | right, six) == set(nx.compose(one, two).edges)
        assert as_set(left & right, six) == set(nx.intersection(one, two).edges)
        assert as_set(left - right, six) == set(nx.difference(one, two).edges)
        assert as_set(left | right, six) == as_set(right | left, six)
        assert as_set(left & right, six) == as_set(right & left, six)
    assert as_set((a | b) | c, six) == as_set(a | (b | c), six)
    assert as_set((a & b) & c, six) == as_set(a & (b & c), six)
    for rule in (a, b, c):
        graph = as_graph(rule, six)
        loops = set(nx.selfloop_edges(graph))
        others = set(nx.complement(graph).edges)  # never has loops
        assert as_set(~rule, six) == others | {(i, i) for i in range(6)} - loops
        assert as_set(rule.reverse(), six) == set(graph.reverse().edges)
        assert as_set(rule.with_self(), six) == set(graph.edges) | {(i, i) for i in range(6)}
        lengths = dict(nx.all_pairs_shortest_path_length(graph))
        for k in (1, 2, 5):
            near = {(i, j) for i in lengths for j, d in lengths[i].items() if 1 <= d <= k}
            assert as_set(rule.power(k), six) == near | loops


@settings(max_examples=40)
@given(st.lists(st.integers(0, 6), max_size=3), st.integers(1, 3))
def test_patterns_and_questions_give_the_same(counts, k):
    """Rules that are worked out once per node count, and the same asked on every node set."""
    node_set = NodeSet.from_counts(counts)
    ring, star = topology.ring(k), topology.star()
    asked_ring, asked_star = topology.rule(lambda n: ring(n)), topology.rule(lambda n: star(n))
    for make in (
        lambda a, b: a | b,
        lambda a, b: a - b,
        lambda a, b: ~(a & b),
        lambda a, b: (a - b).reverse(),
        lambda a, b: a.power(2) & b.with_self(),
    ):
        known, asked = make(ring, star), make(asked_ring, asked_star)
        assert known.is_pattern and not asked.is_pattern
        assert torch.equal(known(node_set).edge_index, asked(node_set).edge_index)


@pytest.mark.parametrize("n", [5, 12])
def test_powers_of_a_ring(n):
    graph = nx.power(nx.cycle_graph(n), 3).to_directed()
    six = NodeSet.from_counts([n])
    assert as_set(topology.ring(1).power(3), six) == set(graph.edges)
    assert as_set(topology.ring(1).power(3), six) == as_set(topology.ring(3), six)


@settings(max_examples=25)
@given(st.integers(0, 99), st.lists(st.sampled_from([0, 4, 5]), min_size=1, max_size=3))
def test_the_algebra_of_dynamic_rules(seed, counts):
    generator = torch.Generator().manual_seed(seed)
    node_set = NodeSet.from_counts(counts, torch.randn(sum(counts), 2, generator=generator))
    every = as_set(topology.complete(), node_set)
    rules = [topology.knn(2), topology.radius(1.0), topology.top_k(2), topology.random(2)]
    for a, b in zip(rules, [*rules[1:], topology.ring(1)], strict=True):
        left, right = as_set(a, node_set), as_set(b, node_set)
        assert as_set(a | b, node_set) == as_set(b | a, node_set) == left | right
        assert as_set(a & b, node_set) == as_set(b & a, node_set) == left & right
        assert as_set(a - b, node_set) == left - right
        assert as_set(~a, node_set) == every - left
        assert as_set(a.reverse(), node_set) == {(j, i) for i, j in left}
        assert (a | b).is_dynamic and (~a).is_dynamic and a.reverse().is_dynamic


def test_no_nodes():
    nothing = NodeSet.from_counts([])
    for rule in (
        topology.ring() | topology.star(),
        topology.ring() & topology.star(),
        ~topology.complete(),
    ):
        relation = rule(nothing)
        assert relation.num_edges == 0
        assert relation.size == (0, 0)


def test_the_dense_view_of_a_combination_is_per_example():
    relation = (topology.ring() | topology.self_loops())(NodeSet.from_counts([3, 4]))
    dense = relation.to_dense(torch.ones(relation.num_edges))
    assert dense.shape == (2, 4, 4)
    expected = torch.ones(2, 4, 4)
    expected[0, 3] = expected[0, :, 3] = 0
    expected[1, [0, 1, 2, 3], [2, 3, 0, 1]] = 0
    assert torch.equal(dense, expected)


def test_a_combination_with_edges_between_examples_stays_whole():
    between = fixed([(0, 6)])
    relation = (topology.self_loops() | between)(nodes())
    dense = relation.to_dense(torch.ones(relation.num_edges))
    assert dense.shape == (1, NUM_NODES, NUM_NODES)
    assert dense[0, 6, 0] == 1


def test_a_combination_is_dynamic_where_a_part_is():
    still, moving = topology.ring(), topology.knn(1)
    assert not (still | topology.star()).is_dynamic
    assert (still | moving).is_dynamic
    assert (moving - still).is_dynamic
    assert (~moving).is_dynamic
    assert not (~still).is_dynamic


def test_repr_reads_like_the_expression():
    rule = topology.ring(2) | topology.knn(4) - topology.star()
    assert repr(rule) == "(ring(2) | (knn(4) - star(1)))"
    assert repr(~topology.self_loops()) == "(complete() - self_loops())"
    assert repr(topology.complete() & topology.star(3)) == "(complete() & star(3))"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_rules_can_be_copied(duplicate):
    rule = topology.ring(2) - topology.star()
    assert as_set(duplicate(rule)) == as_set(rule)


# Custom rules #####################################################################


def test_a_function_becomes_a_rule():
    @topology.rule
    def chain(node_set):
        i = torch.arange(node_set.num_nodes - 1)
        return torch.stack([i, i + 1])[:, node_set.batch[i] == node_set.batch[i + 1]]

    assert isinstance(chain, Topology)
    assert not chain.is_dynamic
    assert repr(chain) == "chain"
    assert as_set(chain) == {(0, 1), (1, 2), (2, 3), (4, 5), (5, 6)}
    assert as_set(chain | topology.self_loops()) == as_set(chain) | {(i, i) for i in range(8)}


def test_a_rule_may_read_states_step_and_attributes():
    @topology.rule(is_dynamic=True)
    def odd(node_set):
        kept = node_set.x[:, 0] + node_set.step + node_set.attributes["shift"] > 2
        i = kept.nonzero().flatten()
        return torch.stack([i, i])

    assert odd.is_dynamic
    node_set = NodeSet(
        Partition.uniform(1, 3),
        x=torch.tensor([[0.0], [1.0], [2.0]]),
        attributes={"shift": torch.tensor([0.0, 0.0, 1.0])},
    )
    assert as_set(odd, node_set) == {(2, 2)}
    assert as_set(odd, replace(node_set, step=2)) == {(1, 1), (2, 2)}


def test_a_rule_may_return_a_relation():
    relation = Relation.complete([0, 2], [0, 2])
    assert topology.rule(lambda node_set: relation)(NodeSet.from_counts([2])) is relation


def test_a_topology_of_its_own_class():
    class Nobody(Topology):
        def __call__(self, node_set):
            size = (node_set.num_nodes, node_set.num_nodes)
            return Relation.from_edge_index(torch.zeros(2, 0, dtype=torch.long), size)

    assert as_set(~Nobody()) == set(INSIDE)


def test_the_base_class_has_no_rule():
    with pytest.raises(NotImplementedError):
        Topology()(nodes())


# Node sets ########################################################################


@given(st.lists(st.integers(0, 4), max_size=5))
def test_node_set(counts):
    node_set = NodeSet.from_counts(counts)
    assert node_set.num_nodes == sum(counts)
    assert node_set.batch.tolist() == [b for b, n in enumerate(counts) for _ in range(n)]
    assert node_set.position.tolist() == [i for n in counts for i in range(n)]
    assert node_set.ptr.tolist() == [sum(counts[:b]) for b in range(len(counts) + 1)]


# Errors ###########################################################################


@pytest.mark.parametrize(
    ("counts", "x", "message"),
    [
        ([2, -1], None, r"counts must be numbers of nodes, but are \[2, -1\]"),
        ([2, 1], torch.zeros(4, 1), r"one row of x for each \(4 given\), but are \[2, 1\]"),
    ],
)
def test_wrong_counts(counts, x, message):
    with pytest.raises(ValueError, match=message):
        NodeSet.from_counts(counts, x)


@pytest.mark.parametrize("operator", ["|", "&", "-"])
def test_only_topologies_combine(operator):
    combine = {
        "|": lambda a: a | as_set,
        "&": lambda a: a & 3,
        "-": lambda a: a - {(0, 1)},
    }
    with pytest.raises(ValueError, match=r"combines two topologies, but got .* topology\.rule"):
        combine[operator](topology.ring())


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (torch.tensor([[0, 8], [0, 0]]), "names source 8, but there are 8 source nodes"),
        (torch.zeros(3, 2).long(), r"shape \(2, E\)"),
        (torch.zeros(2, 1), "must hold integers"),
        ([(0, 1)], r"shape \(2, E\), but got <class 'list'>"),
        (Relation.complete([0, 3], [0, 8]), "made a relation 3 -> 8 for 8 nodes; use nodes.num_"),
    ],
)
def test_wrong_edges_name_the_rule(edges, message):
    def wrong(node_set):
        return edges

    with pytest.raises(ValueError, match=f"^wrong.*{message}"):
        topology.rule(wrong)(nodes())
