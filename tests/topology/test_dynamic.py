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
