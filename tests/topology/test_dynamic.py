"""k nearest states against plain loops."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsm_graph import ops, topology
from nsm_graph.topology import NodeSet


def nearest(counts, x, k):
    """By target; each target's sources ascend. Ties go to the lowest index."""
    edges, first = [], 0
    for count in counts:
        for j in range(first, first + count):
            others = [i for i in range(first, first + count) if i != j]
            others.sort(key=lambda i: (float((x[i].double() - x[j].double()).square().sum()), i))
            edges += [(i, j) for i in sorted(others[:k])]
        first += count
    return edges


def edges_of(relation):
    return [tuple(edge) for edge in relation.edge_index.T.tolist()]


@given(
    st.lists(st.sampled_from([0, 3, 5, 8]), max_size=4),
    st.integers(1, 2),
    st.integers(0, 1000),
    st.sampled_from([1, 3]),
)
def test_knn_on_a_grid_full_of_ties(counts, k, seed, width):
    # Whole numbers: distances are exact, and many are equal.
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 3, (sum(counts), width), generator=generator).float()
    relation = topology.knn(k)(NodeSet.from_counts(counts, x))
    assert edges_of(relation) == nearest(counts, x, k)
    assert relation.size == (sum(counts), sum(counts))


@pytest.mark.parametrize(("counts", "k"), [([33], 4), ([63], 1), ([63, 33, 5], 4), ([2], 1)])
def test_knn_of_random_states(counts, k):
    x = torch.randn(sum(counts), 6)
    assert edges_of(topology.knn(k)(NodeSet.from_counts(counts, x))) == nearest(counts, x, k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_knn_in_every_dtype(dtype):
    x = torch.randint(0, 4, (9, 2)).to(dtype)
    assert edges_of(topology.knn(2)(NodeSet.from_counts([4, 5], x))) == nearest([4, 5], x, 2)


def test_equal_states_choose_the_lowest():
    relation = topology.knn(2)(NodeSet.from_counts([4], torch.zeros(4, 3)))
    assert edges_of(relation) == [
        (1, 0), (2, 0), (0, 1), (2, 1), (0, 2), (1, 2), (0, 3), (1, 3),
    ]  # fmt: skip


def test_far_away_states_are_told_apart():
    # |a|^2 - 2ab + |b|^2 would cancel to nothing here.
    x = torch.tensor([[1e4], [1e4 + 0.25], [1e4 + 1]])
    relation = topology.knn(1)(NodeSet.from_counts([3], x))
    assert edges_of(relation) == [(1, 0), (0, 1), (1, 2)]


def test_an_example_does_not_depend_on_its_neighbours():
    parts = [torch.randn(count, 3) for count in (5, 9, 4)]
    together = topology.knn(3)(NodeSet.from_counts([5, 9, 4], torch.cat(parts)))
    alone, first = [], 0
    for part in parts:
        edges = edges_of(topology.knn(3)(NodeSet.from_counts([len(part)], part)))
        alone += [(first + i, first + j) for i, j in edges]
        first += len(part)
    assert edges_of(together) == alone


def test_the_rule_follows_the_states():
    rule = topology.knn(1)
    assert rule.is_dynamic
    node_set = NodeSet.from_counts([3], torch.tensor([[0.0], [1.0], [5.0]]))
    assert edges_of(rule(node_set)) == [(1, 0), (0, 1), (1, 2)]
    moved = replace(node_set, x=torch.tensor([[0.0], [4.0], [5.0]]))
    assert edges_of(rule(moved)) == [(1, 0), (2, 1), (1, 2)]


def test_the_choice_carries_no_gradient_and_the_attention_does():
    x = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    relation = topology.knn(2)(NodeSet.from_counts([6], x))
    rows = x.unsqueeze(1)
    ops.edge_attention(rows, rows, rows, relation).sum().backward()
    assert (x.grad != 0).any()


def test_knn_without_nodes():
    relation = topology.knn(2)(NodeSet.from_counts([0, 0], torch.zeros(0, 3)))
    assert relation.size == (0, 0)
    assert relation.num_edges == 0


def test_knn_skips_examples_without_nodes_and_has_a_dense_view_per_example():
    x = torch.randn(7, 2)
    relation = topology.knn(2)(NodeSet.from_counts([3, 0, 4], x))
    assert edges_of(relation) == nearest([3, 0, 4], x, 2)
    assert relation.to_dense(torch.ones(14)).sum((1, 2)).tolist() == [6, 0, 8]


def test_knn_composes():
    x = torch.tensor([[0.0], [1.0], [2.5], [9.0]])
    node_set = NodeSet.from_counts([4], x)
    union = (topology.ring(1) | topology.knn(2) - topology.star())(node_set)
    ring = {(i, j) for i in range(4) for j in range(4) if (i - j) % 4 in (1, 3)}
    knn = set(nearest([4], x, 2))
    star = {(i, j) for i in range(4) for j in range(4) if i != j and 0 in (i, j)}
    assert set(edges_of(union)) == ring | (knn - star)


@pytest.mark.parametrize(
    ("counts", "x", "message"),
    [
        ([3], None, r"knn\(2\) reads the current states, but the node set has no x"),
        ([3, 2], torch.zeros(5, 1), r"knn\(2\) needs more than 2 nodes .* one has 2; use a"),
        ([3, 0, 1], torch.zeros(4, 1), "needs more than 2 nodes in every example, but one has 1"),
    ],
)
def test_wrong_node_sets(counts, x, message):
    with pytest.raises(ValueError, match=message):
        topology.knn(2)(NodeSet.from_counts(counts, x))


@pytest.mark.parametrize("x", [torch.zeros(4, 1), torch.zeros(3)])
def test_wrong_states(x):
    node_set = replace(NodeSet.from_counts([3]), x=x)
    with pytest.raises(ValueError, match=r"needs x of shape \(3, channels\), but it has"):
        topology.knn(1)(node_set)


def test_wrong_k():
    with pytest.raises(ValueError, match=r"knn\(k\) needs at least one neighbour, but k is 0"):
        topology.knn(0)


# Other rules that compare states ##################################################


def chosen(rule, counts, x, y=None, target_counts=None):
    sources = NodeSet.from_counts(counts, x)
    targets = () if y is None else (NodeSet.from_counts(target_counts, y),)
    return edges_of(rule(sources, *targets))


def pairs(counts, target_counts=None):
    """Every target with the sources of its example."""
    target_counts = counts if target_counts is None else target_counts
    first = target = 0
    for num_src, num_dst in zip(counts, target_counts, strict=True):
        for j in range(target, target + num_dst):
            yield j, list(range(first, first + num_src))
        first, target = first + num_src, target + num_dst


COUNTS = [5, 0, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rules_are_what_they_say(dtype):
    x = torch.randn(12, 3, dtype=dtype)
    distance = torch.cdist(x.double(), x.double())
    angle = torch.nn.functional.normalize(x.double()) @ torch.nn.functional.normalize(x.double()).T
    score = x.double() @ x.double().T / 3**0.5

    def most(table, k, with_self):
        edges = []
        for j, sources in pairs(COUNTS):
            others = [i for i in sources if with_self or i != j]
            edges += [(i, j) for i in sorted(sorted(others, key=lambda i: -table[j, i])[:k])]
        return edges

    def enough(table, least, with_self):
        return [
            (i, j)
            for j, sources in pairs(COUNTS)
            for i in sources
            if table[j, i] >= least and (with_self or i != j)
        ]

    for rule, expected in [
        (topology.knn(2), most(-distance, 2, False)),
        (topology.knn(2, metric="cosine"), most(angle, 2, False)),
        (topology.top_k(3), most(score, 3, True)),
        (topology.top_k(2, "cosine"), most(angle, 2, True)),
        (topology.top_k(2, lambda q, k: -(q @ k.mT)), most(-score, 2, True)),
        (topology.radius(1.5), enough(-distance, -1.5, False)),
        (topology.radius(0.8, metric="cosine"), enough(angle, 1 - 0.8**2 / 2, False)),
        (topology.threshold(0.3), enough(score, 0.3, True)),
        (topology.threshold(0.3, "cosine"), enough(angle, 0.3, True)),
        (topology.threshold(0.3, lambda q, k: -(q @ k.mT)), enough(-score * 3**0.5, 0.3, True)),
    ]:
        assert rule.is_dynamic
        assert chosen(rule, COUNTS, x) == expected, rule


def test_between_two_sets_every_source_may_be_chosen():
    x, y = torch.randn(12, 3), torch.randn(4, 3)
    distance = torch.cdist(y.double(), x.double())
    table = list(pairs(COUNTS, [2, 0, 2]))
    nearest_two = [
        (i, j)
        for j, sources in table
        for i in sorted(sorted(sources, key=distance[j].tolist().__getitem__)[:2])
    ]
    assert chosen(topology.knn(2), COUNTS, x, y, [2, 0, 2]) == nearest_two
    close = [(i, j) for j, sources in table for i in sources if distance[j, i] <= 1.5]
    assert chosen(topology.radius(1.5), COUNTS, x, y, [2, 0, 2]) == close


def test_all_nodes_may_be_asked_for_where_the_node_itself_counts():
    x = torch.randn(3, 2)
    assert len(chosen(topology.top_k(3), [3], x)) == 9
    with pytest.raises(ValueError, match=r"top_k\(4\) needs more than 3 nodes .* one has 3"):
        chosen(topology.top_k(4), [3], x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: topology.knn(2, metric="manhattan"),
            'must be "euclidean" or "cosine", but is \'manh',
        ),
        (lambda: topology.radius(1.0, metric="attention"), 'radius: metric must be "euclidean" or'),
        (lambda: topology.radius(-1.0), r"radius\(r\) needs a distance r >= 0, but r is -1.0"),
        (lambda: topology.top_k(0), r"top_k\(k\) needs k >= 1, but k is 0"),
        (lambda: topology.top_k(2, "dot"), r"top_k\(2, 'dot'\): score must be one of 'euclidean'"),
        (lambda: topology.threshold(2, 5), "score must be a name or a function, but is 5"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("rule", [topology.top_k(1), topology.radius(1), topology.threshold(1)])
def test_without_states(rule):
    with pytest.raises(ValueError, match="reads the current states, but the node set has no x"):
        rule(NodeSet.from_counts([3]))


def test_states_of_other_width():
    with pytest.raises(ValueError, match="targets have 2 channels and sources 3; project one"):
        chosen(topology.knn(1), [4], torch.randn(4, 3), torch.randn(2, 2), [2])


def test_a_score_of_the_wrong_shape():
    rule = topology.top_k(1, lambda q, k: q.sum(-1))
    with pytest.raises(ValueError, match=r"must give \(examples, targets, sources\), \(1, 3, 3\)"):
        rule(NodeSet.from_counts([3], torch.randn(3, 2)))


def test_examples_that_are_too_small_are_named():
    x = torch.randn(9, 2)
    with pytest.raises(ValueError, match=r"one has 1; .* \(examples 1, 3, of 4\)$"):
        topology.knn(2)(NodeSet.from_counts([3, 2, 3, 1], x))
