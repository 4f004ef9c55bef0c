"""Causal relations: all that a relation offers, against plain Python lists of edges."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsm_graph import Partition, Relation
from nsm_graph.nn import StateCommunication

counts_lists = st.lists(st.integers(0, 5), max_size=5)


def cumulate(counts):
    ptr = [0]
    for count in counts:
        ptr.append(ptr[-1] + count)
    return ptr


def causal_edges(counts):
    """By example, then by target, then by source."""
    edges, first = [], 0
    for count in counts:
        edges += [(first + i, first + j) for j in range(count) for i in range(j + 1)]
        first += count
    return edges


def edges_of(relation):
    assert relation.edge_index.dtype == torch.long
    assert relation.edge_index.shape == (2, relation.num_edges)
    return list(zip(*relation.edge_index.tolist(), strict=True))


def same_lists(relation, edges, size):
    """The grouped forms of a relation are those of its edges, given one by one."""
    edge_index = torch.tensor(edges, dtype=torch.long).view(-1, 2).T
    wanted = Relation.from_edge_index(edge_index, size)
    for mine, theirs in ((relation.csr, wanted.csr), (relation.csc, wanted.csc)):
        for actual, expected in zip(mine, theirs, strict=True):
            assert actual.dtype == expected.dtype
            assert torch.equal(actual, expected)


@given(counts_lists)
def test_what_it_knows(counts):
    relation = Relation.causal(cumulate(counts))
    edges = causal_edges(counts)
    assert relation.is_causal
    assert not relation.is_complete
    assert not relation.is_uniform
    assert relation.num_edges == len(edges)
    assert relation.size == (sum(counts), sum(counts))
    assert relation.num_examples == len(counts)
    assert relation.degree is None
    assert relation.reaches_every_target
    assert relation.has_in_edge.all()
    assert relation.in_degree.tolist() == [j + 1 for count in counts for j in range(count)]
    most = max(counts, default=0)
    full = len(counts) * most * (most + 1) // 2
    assert relation.fill == (len(edges) / full if full else 1.0)
    assert relation._edge_index is relation._csr is None  # knowing made no list
    assert edges_of(relation) == edges


@given(counts_lists)
def test_edges_by_target_and_by_source(counts):
    size = sum(counts), sum(counts)
    same_lists(Relation.causal(cumulate(counts)), causal_edges(counts), size)


@given(counts_lists)
def test_between_two_partitions(counts):
    sides = [Partition.from_ptr(torch.tensor(cumulate(counts))) for _ in range(2)]
    relation = Relation.causal_between(*sides)
    assert relation.is_causal
    assert edges_of(relation) == causal_edges(counts)
    assert relation.num_edges == len(causal_edges(counts))


@given(counts_lists)
def test_reverse_is_general(counts):
    relation = Relation.causal(cumulate(counts))
    edges = causal_edges(counts)
    for is_listed in (False, True):  # what was made already is kept
        reverse = relation.reverse()
        assert not reverse.is_causal
        assert not reverse.is_complete
        assert edges_of(reverse) == [(target, source) for source, target in edges]
        same_lists(reverse, edges_of(reverse), reverse.size)
        assert edges_of(reverse.reverse()) == edges
        if not is_listed:
            _ = relation.csr, relation.csc


@given(counts_lists, st.sampled_from([(), (2,)]), st.sampled_from([0.0, -1.0, float("-inf")]))
def test_dense_view(counts, rest, fill):
    relation = Relation.causal(cumulate(counts))
    values = torch.randn(relation.num_edges, *rest)
    most = max(counts, default=0)
    expected = torch.full((len(counts), most, most, *rest), fill)
    e = 0
    for b, count in enumerate(counts):
        for row in range(count):
            for column in range(row + 1):
                expected[b, row, column] = values[e]
                e += 1
    dense = relation.to_dense(values, fill=fill)
    assert torch.equal(dense, expected)
    assert torch.equal(relation.from_dense(dense), values)


def test_a_bias_leaves_the_structure():
    relation = Relation.causal([0, 3, 5])
    biased = relation.with_bias(torch.arange(9.0))
    assert biased.is_causal
    assert relation.bias is None
    reverse = biased.reverse()
    assert not reverse.is_causal
    assert torch.equal(reverse.bias, biased.bias)
    with pytest.raises(ValueError, match=r"bias must have shape \(9,\) or \(9, heads\)"):
        relation.with_bias(torch.zeros(13))


def test_a_subset_is_general_and_keeps_examples():
    relation = Relation.causal([0, 3, 5])
    subset = relation.subset(torch.tensor([8, 0, 4]))
    assert not subset.is_causal
    assert edges_of(subset) == [(4, 4), (0, 0), (1, 2)]
    assert subset.num_examples == 2
    again = Relation.from_rows(
        relation.csr.index, relation.in_degree, relation.size, relation.sources, relation.targets
    )
    assert not again.is_causal
    assert edges_of(again) == edges_of(relation)


@pytest.mark.parametrize("is_listed", [False, True])
def test_to_another_device(is_listed):
    relation = Relation.causal([0, 3, 5]).with_bias(torch.zeros(9))
    if is_listed:
        _ = relation.edge_index, relation.csr, relation.csc
    moved = relation.to("meta")
    assert moved.is_causal
    assert moved.device.type == moved.bias.device.type == "meta"
    assert moved.edge_index.device.type == "meta"
    assert moved.edge_index.shape == (2, 9)
    assert moved.sources is moved.targets
    back = relation.to("cpu")
    assert edges_of(back) == causal_edges([3, 2])
    same_lists(back, causal_edges([3, 2]), (5, 5))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies(duplicate):
    relation = duplicate(Relation.causal([0, 3, 5]))
    assert relation.is_causal
    assert edges_of(relation) == causal_edges([3, 2])


def test_repr():
    assert repr(Relation.causal([0, 3, 5])) == "Relation(5 -> 5, 9 edges, causal over 2 examples)"


def test_wrong_pointers_and_partitions():
    with pytest.raises(ValueError, match=r"ptr must start at 0 and never decrease, but is \[1\]"):
        Relation.causal([1])
    three, four = (Partition.from_ptr(torch.tensor([0, 2, n])) for n in (3, 4))
    with pytest.raises(ValueError, match=r"as many sources as targets .* has 3 and 4 rows"):
        Relation.causal_between(three, four)
    other = Partition.from_ptr(torch.tensor([0, 1, 3]))
    with pytest.raises(ValueError, match="as many sources as targets"):
        Relation.causal_between(three, other)
    with pytest.raises(ValueError, match="in 2 and 4 examples"):
        Relation.causal_between(Partition.uniform(2, 2), Partition.uniform(4, 1))


@pytest.mark.parametrize("counts", [[4, 4], [3, 0, 1], [256, 16]], ids=str)
def test_communication_over_it_compiles_in_one_graph(counts):
    """Padded, by sparse kernels, and (where nothing is compiled) one by one."""
    layer = StateCommunication(8, heads=2)
    relation = Relation.causal(cumulate(counts))
    general = Relation.from_edge_index(relation.edge_index, relation.size)
    x = torch.randn(sum(counts), 8, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for run, edges in ((layer, general), (layer, relation), (compiled, relation)):
        out = run(x, edges)
        direction = torch.cos(torch.arange(out.numel())).view_as(out)
        results.append([out, *torch.autograd.grad(out, x, direction)])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)
