"""Relations against plain Python lists of edges."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nsm_graph.edge_lists
import nsm_graph.relation
from nsm_graph import Partition, Relation
from nsm_graph.partition import ptr_from_batch
from nsm_graph.relation import as_relation, check_size

counts_lists = st.lists(st.integers(0, 4), max_size=5)
count_pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=5)


def cumulate(counts):
    ptr = [0]
    for count in counts:
        ptr.append(ptr[-1] + count)
    return ptr


def complete_edges(src_counts, dst_counts):
    """By example, then by target, then by source."""
    edges = []
    first_src = first_dst = 0
    for num_src, num_dst in zip(src_counts, dst_counts, strict=True):
        for target in range(num_dst):
            edges += [(first_src + source, first_dst + target) for source in range(num_src)]
        first_src += num_src
        first_dst += num_dst
    return edges


def edges_of(relation):
    assert relation.edge_index.dtype == torch.long
    assert relation.edge_index.shape == (2, relation.num_edges)
    return list(zip(*relation.edge_index.tolist(), strict=True))


def split(pairs):
    return [src for src, _ in pairs], [dst for _, dst in pairs]


@st.composite
def general(draw):
    num_src, num_dst = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    if num_src == 0 or num_dst == 0:
        edges = []
    else:
        edge = st.tuples(st.integers(0, num_src - 1), st.integers(0, num_dst - 1))
        edges = draw(st.lists(edge, max_size=15))
    edge_index = torch.tensor(edges, dtype=torch.long).view(-1, 2).T
    return edges, Relation.from_edge_index(edge_index, (num_src, num_dst))


# Partition ########################################################################


@given(counts_lists)
def test_partition_pads_and_unpads(counts):
    partition = Partition.from_ptr(torch.tensor(cumulate(counts)))
    most = max(counts, default=0)
    assert (partition.num_examples, partition.num_rows) == (len(counts), sum(counts))
    assert partition.max_count == most
    assert partition.min_count == min(counts, default=0)
    assert partition.is_uniform == (len(set(counts)) <= 1)
    assert partition.batch.tolist() == [b for b, count in enumerate(counts) for _ in range(count)]
    assert partition.mask().tolist() == [[i < count for i in range(most)] for count in counts]
    rows = torch.arange(1.0, sum(counts) * 2 + 1).view(-1, 2)
    padded = partition.pad(rows)
    assert padded.shape == (len(counts), most, 2)
    first = 0
    for b, count in enumerate(counts):
        assert torch.equal(padded[b, :count], rows[first : first + count])
        assert (padded[b, count:] == 0).all()
        first += count
    assert torch.equal(partition.unpad(padded), rows)


def test_unpadding_reads_no_padding():
    partition = Partition.from_ptr(torch.tensor([0, 2, 2, 5]))
    padded = partition.pad(torch.ones(5, 1)).masked_fill(~partition.mask()[..., None], torch.nan)
    assert torch.equal(partition.unpad(padded), torch.ones(5, 1))


def test_padding_is_zero_whatever_memory_held(poisoned_memory):
    partition = Partition.from_ptr(torch.tensor([0, 2, 2, 5]))
    assert partition.pad(torch.ones(5, 3)).sum() == 15


def test_padding_passes_gradients_to_every_row():
    rows = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    partition = Partition.from_ptr(torch.tensor([0, 2, 2, 5]))
    assert torch.autograd.gradcheck(lambda r: partition.unpad(partition.pad(r) * 2), [rows])


@given(st.integers(0, 4), st.integers(0, 4))
def test_a_uniform_partition_equals_the_one_read_from_its_pointer(num_examples, count):
    made = Partition.uniform(num_examples, count)
    read = Partition.from_ptr(torch.tensor(cumulate([count] * num_examples)))
    assert torch.equal(made.ptr, read.ptr)
    assert made.num_rows == read.num_rows
    assert made.is_uniform
    assert made.batch.tolist() == read.batch.tolist()
    if num_examples > 0:
        assert made.max_count == read.max_count


# What a relation holds ############################################################


@given(count_pairs)
def test_complete(pairs):
    src, dst = split(pairs)
    relation = Relation.complete(cumulate(src), cumulate(dst))
    edges = complete_edges(src, dst)
    assert relation.is_complete
    assert relation.num_edges == len(edges)
    assert relation.size == (sum(src), sum(dst))
    assert relation.num_examples == len(pairs)
    assert edges_of(relation) == edges
    assert relation.is_uniform == (len(set(src)) <= 1 and len(set(dst)) <= 1)
    assert relation.has_in_edge.tolist() == [
        any(target == j for _, target in edges) for j in range(sum(dst))
    ]
    cells = len(pairs) * max(src, default=0) * max(dst, default=0)
    assert relation.fill == (len(edges) / cells if cells else 1.0)


@given(general())
def test_general(case):
    edges, relation = case
    assert not relation.is_complete
    assert not relation.is_uniform
    assert relation.num_edges == len(edges)
    assert edges_of(relation) == edges
    assert relation.num_examples == 1
    assert relation.has_in_edge.tolist() == [
        any(target == j for _, target in edges) for j in range(relation.num_dst)
    ]
    cells = relation.num_src * relation.num_dst
    assert relation.fill == (len(edges) / cells if cells else 1.0)


@pytest.mark.parametrize(("num_src", "num_dst"), [(0, 0), (1, 1), (33, 63), (63, 33), (63, 0)])
def test_complete_sizes(num_src, num_dst):
    relation = Relation.complete([0, num_src], [0, num_dst])
    assert edges_of(relation) == complete_edges([num_src], [num_dst])


def test_from_edge_index_takes_the_largest_index_as_size():
    relation = Relation.from_edge_index(torch.tensor([[0, 4], [2, 1]], dtype=torch.int32))
    assert relation.size == (5, 3)
    assert edges_of(relation) == [(0, 2), (4, 1)]
    assert Relation.from_edge_index(torch.zeros(2, 0, dtype=torch.long)).size == (0, 0)


@given(count_pairs)
def test_from_batch(pairs):
    src, dst = split(pairs)
    batches = [
        torch.tensor([b for b, count in enumerate(counts) for _ in range(count)], dtype=torch.long)
        for counts in (src, dst)
    ]
    relation = Relation.from_batch(*batches, batch_size=len(pairs))
    assert edges_of(relation) == complete_edges(src, dst)
    assert relation.num_examples == len(pairs)
    seen = [b for b, pair in enumerate(pairs) if sum(pair) > 0]
    inferred = Relation.from_batch(*batches)
    assert inferred.num_examples == max(seen, default=-1) + 1
    assert edges_of(inferred) == complete_edges(src, dst)


@given(count_pairs)
def test_between_counts_edges_as_complete_does(pairs):
    src, dst = split(pairs)
    sides = [Partition.from_ptr(torch.tensor(cumulate(counts))) for counts in (src, dst)]
    assert edges_of(Relation.between(*sides)) == complete_edges(src, dst)


# Compressed forms #################################################################


def check_compressed(compressed, edges, end, num_groups):
    """Groups in order; inside a group, edges in the relation's order."""
    assert compressed.ptr.dtype == torch.int32
    assert compressed.index.dtype == torch.int32
    assert compressed.perm.dtype == torch.int64
    members = [[e for e, edge in enumerate(edges) if edge[end] == g] for g in range(num_groups)]
    assert compressed.ptr.tolist() == cumulate([len(group) for group in members])
    flat = [e for group in members for e in group]
    assert compressed.perm.tolist() == flat
    assert compressed.index.tolist() == [edges[e][1 - end] for e in flat]


@given(general())
def test_csr_and_csc_of_general_edges(case):
    edges, relation = case
    check_compressed(relation.csr, edges, 1, relation.num_dst)
    check_compressed(relation.csc, edges, 0, relation.num_src)


@given(count_pairs)
def test_csr_and_csc_of_complete_relations(pairs):
    src, dst = split(pairs)
    relation = Relation.complete(cumulate(src), cumulate(dst))
    edges = complete_edges(src, dst)
    check_compressed(relation.csr, edges, 1, sum(dst))
    check_compressed(relation.csc, edges, 0, sum(src))


@pytest.mark.parametrize(
    ("edges", "size"),
    [
        ([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], (1, 1)),
        ([[0], [0]], (1, 6)),
        ([[0], [0]], (6, 1)),
    ],
)
def test_compressed_forms_widen_where_int32_does_not_fit(monkeypatch, edges, size):
    edge_index = torch.tensor(edges)
    for limit, dtype in ((6, torch.int32), (5, torch.int64)):
        monkeypatch.setattr(nsm_graph.edge_lists, "_INT32_MAX", limit)
        relation = Relation.from_edge_index(edge_index, size)
        for compressed in (relation.csr, relation.csc):
            assert compressed.ptr.dtype == compressed.index.dtype == dtype


# Dense view #######################################################################


@given(count_pairs, st.sampled_from([(), (2,)]), st.sampled_from([0.0, -1.0, float("-inf")]))
def test_dense_view_of_complete_relations(pairs, rest, fill):
    src, dst = split(pairs)
    relation = Relation.complete(cumulate(src), cumulate(dst))
    values = torch.randn(relation.num_edges, *rest)
    dense = relation.to_dense(values, fill=fill)
    shape = (len(pairs), max(dst, default=0), max(src, default=0))
    expected = torch.full((*shape, *rest), fill)
    e = 0
    for b, (num_src, num_dst) in enumerate(pairs):
        for row in range(num_dst):
            for column in range(num_src):
                expected[b, row, column] = values[e]
                e += 1
    assert torch.equal(dense, expected)
    assert torch.equal(relation.from_dense(dense), values)


@given(general(), st.sampled_from([0.0, 7.0]))
def test_dense_view_of_general_edges_adds_duplicates(case, fill):
    edges, relation = case
    values = torch.randint(1, 9, (len(edges), 2)).float()
    expected = torch.full((1, relation.num_dst, relation.num_src, 2), fill)
    for source, target in set(edges):
        same = [values[e] for e, edge in enumerate(edges) if edge == (source, target)]
        expected[0, target, source] = torch.stack(same).sum(0)
    dense = relation.to_dense(values, fill=fill)
    assert torch.equal(dense, expected)
    gathered = relation.from_dense(dense)
    for e, (source, target) in enumerate(edges):
        assert torch.equal(gathered[e], expected[0, target, source])


def test_documented_layouts():
    relation = Relation.complete([0, 3, 6], [0, 2, 4])
    edges = edges_of(relation)
    weights = torch.randn(relation.num_edges, 4)
    routing = relation.to_dense(weights[:, 0]).transpose(1, 2)
    attention = relation.to_dense(weights).permute(0, 3, 1, 2)
    for e, (token, state) in enumerate(edges):
        b, i, j = token // 3, token % 3, state % 2
        assert routing[b, i, j] == weights[e, 0]
        assert torch.equal(attention[b, :, j, i], weights[e])


def test_the_dense_view_passes_gradients():
    relation = Relation.complete([0, 3, 4], [0, 1, 3])
    values = torch.randn(relation.num_edges, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: relation.to_dense(v), [values])
    assert torch.autograd.gradcheck(lambda v: relation.from_dense(relation.to_dense(v)), [values])


# Changes ##########################################################################


@given(count_pairs)
def test_reverse_of_a_complete_relation_has_the_complete_order(pairs):
    src, dst = split(pairs)
    relation = Relation.complete(cumulate(src), cumulate(dst)).reverse()
    assert relation.is_complete
    assert relation.size == (sum(dst), sum(src))
    assert edges_of(relation) == complete_edges(dst, src)
    assert edges_of(relation.reverse()) == complete_edges(src, dst)


@given(general())
def test_reverse_of_general_edges_keeps_their_order(case):
    edges, relation = case
    reverse = relation.reverse()
    assert reverse.size == relation.size[::-1]
    assert edges_of(reverse) == [(target, source) for source, target in edges]
    check_compressed(reverse.csr, edges_of(reverse), 1, relation.num_src)


def test_a_subset_keeps_examples():
    relation = Relation.complete([0, 2, 5], [0, 2, 3])
    edges = edges_of(relation)
    chosen = [6, 0, 3]
    subset = relation.subset(torch.tensor(chosen))
    assert not subset.is_complete
    assert edges_of(subset) == [edges[e] for e in chosen]
    dense = subset.to_dense(torch.tensor([1.0, 2.0, 3.0]))
    assert dense.tolist() == [[[2, 0, 0], [0, 3, 0]], [[0, 0, 1], [0, 0, 0]]]
    assert subset.from_dense(dense).tolist() == [1, 2, 3]
    assert edges_of(subset.reverse()) == [(t, s) for s, t in edges_of(subset)]
    reversed_dense = subset.reverse().to_dense(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(reversed_dense, dense.transpose(1, 2))


@pytest.mark.parametrize(
    "relation",
    [
        Relation.complete([0, 2, 5], [0, 2, 3]),
        Relation.complete([0, 2, 4], [0, 3, 6]),
        Relation.from_edge_index(torch.tensor([[0, 1], [1, 1]])),
        Relation.complete([0, 2, 5], [0, 2, 3]).subset(torch.tensor([1, 2])),
    ],
)
def test_to_another_device(relation):
    assert relation.edge_index.device.type == "cpu"  # cached, and must not stay behind
    moved = relation.to("meta")
    assert moved.device.type == "meta"
    assert moved.edge_index.device.type == "meta"
    assert moved.edge_index.shape == relation.edge_index.shape
    assert moved.size == relation.size
    assert moved.is_complete == relation.is_complete
    values = torch.zeros(relation.num_edges, device="meta")
    assert moved.to_dense(values).shape == relation.to_dense(torch.zeros(values.shape)).shape
    back = relation.to("cpu")
    assert edges_of(back) == edges_of(relation)
    assert back.fill == relation.fill


def test_moving_a_relation_of_one_partition_keeps_it_one():
    ptr = torch.tensor([0, 2, 5])
    relation = Relation.complete(ptr, ptr)
    assert relation.sources is relation.targets
    moved = relation.to("meta")
    assert moved.sources is moved.targets


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_relations_can_be_copied(duplicate):
    relation = Relation.complete([0, 2, 5], [0, 2, 3])
    assert edges_of(duplicate(relation)) == edges_of(relation)
    subset = relation.subset(torch.tensor([3, 1]))
    assert edges_of(duplicate(subset)) == edges_of(subset)


def test_repr():
    relation = Relation.complete([0, 3, 5], [0, 2, 4])
    assert repr(relation) == "Relation(5 -> 4, 10 edges, complete over 2 examples)"
    assert repr(relation.subset(torch.tensor([0]))) == "Relation(5 -> 4, 1 edges, general)"


def test_as_relation():
    relation = Relation.complete([0, 2], [0, 2])
    assert as_relation(relation, (2, 2)) is relation
    edge_index = torch.tensor([[0], [1]])
    made = as_relation(edge_index, (3, 2))
    assert made.size == (3, 2)
    assert torch.equal(made.edge_index, edge_index)


# Errors ###########################################################################


@pytest.mark.parametrize(
    ("src_ptr", "dst_ptr", "message"),
    [
        ([1, 2], [0, 2], r"src_ptr must start at 0 and never decrease, but is \[1, 2\]"),
        ([0, 2], [0, 3, 2], r"dst_ptr must start at 0 .* but is \[0, 3, 2\]; cumulate"),
        ([*range(9), 0], [0], r"but is \[0, 1, 2, 3, 4, 5, 6, 7\]\.\.\.; cumulate"),
        ([], [0], r"src_ptr must be an integer vector .* but has shape \(0,\)"),
        ([[0, 1]], [0, 1], r"src_ptr must be .* but has shape \(1, 2\)"),
        ([0.0, 1.0], [0, 1], "src_ptr must be an integer vector .* dtype torch.float32"),
        ([0, 1], [False, True], "dst_ptr must be an integer vector .* dtype torch.bool"),
        ([0, 1], [0, 1, 2], "src_ptr has 1 examples, but dst_ptr has 2; build both"),
    ],
)
def test_wrong_pointers(src_ptr, dst_ptr, message):
    with pytest.raises(ValueError, match=message):
        Relation.complete(src_ptr, dst_ptr)


def test_partitions_of_different_batches():
    two, three = Partition.uniform(2, 1), Partition.uniform(3, 1)
    with pytest.raises(ValueError, match="sources have 2 examples, but targets have 3"):
        Relation.between(two, three)


def test_pointers_on_different_devices(monkeypatch):
    # A pointer on "meta" has no values to check; only the devices are of interest here.
    monkeypatch.setattr(nsm_graph.relation, "check_ptr", lambda ptr, name: ptr)
    with pytest.raises(ValueError, match="src_ptr is on cpu, but dst_ptr is on meta"):
        Relation.complete(torch.tensor([0, 1]), torch.tensor([0, 1], device="meta"))


@pytest.mark.parametrize(
    ("edge_index", "size", "message"),
    [
        (
            [[0], [1]],
            None,
            r"edge_index must be a tensor of shape \(2, E\), but got <class 'list'>",
        ),
        (torch.zeros(3, 2).long(), None, r"shape \(2, E\), but got \(3, 2\)"),
        (torch.zeros(2).long(), None, r"shape \(2, E\), but got \(2,\)"),
        (torch.zeros(2, 1), None, r"must hold integers, but has dtype torch.float32; use .long"),
        (torch.zeros(2, 1).bool(), None, "must hold integers, but has dtype torch.bool"),
        (torch.zeros(2, 1, dtype=torch.complex64), None, "must hold integers"),
        (torch.tensor([[0, -2], [0, 0]]), None, "holds the negative index -2"),
        (torch.tensor([[0, 3], [0, 0]]), (3, 1), "names source 3, but there are 3 source nodes"),
        (torch.tensor([[0, 3], [0, 2]]), (4, 2), "names target 2, but there are 2 target nodes"),
        (torch.zeros(2, 0).long(), (-1, 2), r"size must be \(num_src, num_dst\), but is \(-1, 2\)"),
    ],
)
def test_wrong_edge_index(edge_index, size, message):
    with pytest.raises(ValueError, match=message):
        Relation.from_edge_index(edge_index, size)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.tensor([0, 1, 0]), "batch must be sorted, but goes back 1 times"),
        (torch.tensor([0, 2]), "batch holds the example 2, but there are 2 examples"),
        (torch.tensor([-1, 1]), "batch holds the example -1, but there are 2 examples"),
        (torch.tensor([[0, 1]]), r"batch must be an integer vector .* shape \(1, 2\)"),
        (torch.tensor([0.0, 1.0]), "batch must be an integer vector .* dtype torch.float32"),
        (torch.tensor([False, True]), "batch must be an integer vector .* dtype torch.bool"),
    ],
)
def test_wrong_batch(batch, message):
    with pytest.raises(ValueError, match=message):
        ptr_from_batch(batch, 2)
    with pytest.raises(ValueError, match=message.replace("batch", "src_batch", 1)):
        Relation.from_batch(batch, torch.tensor([0, 1]), 2)


@pytest.mark.parametrize("batch", [torch.zeros(2, 2).long(), torch.tensor([1, 0])])
def test_wrong_batch_without_a_batch_size(batch):
    with pytest.raises(ValueError, match="src_batch must be"):
        Relation.from_batch(batch, torch.tensor([0]))


def test_ptr_from_batch_keeps_examples_without_rows():
    assert ptr_from_batch(torch.tensor([1, 1, 3]), 5).tolist() == [0, 0, 2, 2, 3, 3]
    assert ptr_from_batch(torch.tensor([], dtype=torch.long), 2).tolist() == [0, 0, 0]


def test_values_and_relation_must_agree():
    relation = Relation.complete([0, 3], [0, 2])
    with pytest.raises(ValueError, match="the relation has 6 edges, but values has 5 rows"):
        relation.to_dense(torch.zeros(5))
    with pytest.raises(ValueError, match=r"shape \(1, 2, 3\), but dense has \(1, 3, 2\)"):
        relation.from_dense(torch.zeros(1, 3, 2))


def test_sizes_must_agree():
    relation = Relation.complete([0, 12], [0, 2])
    with pytest.raises(ValueError, match=r"relation goes from 12 nodes, .* have 10 rows; build"):
        check_size(relation, (10, 2))
    with pytest.raises(ValueError, match=r"relation goes to 2 nodes, .* have 3 rows; build"):
        as_relation(relation, (12, 3))
    with pytest.raises(ValueError, match="names target 1, but there are 1 target nodes"):
        as_relation(torch.tensor([[0], [1]]), (2, 1))


# Edges by target ##################################################################

row_lists = st.integers(1, 5).flatmap(
    lambda num_src: st.tuples(
        st.just(num_src),
        st.lists(st.lists(st.integers(0, num_src - 1), unique=True).map(sorted), max_size=5),
    )
)


@given(row_lists)
def test_rows_are_a_relation_without_sorting(case):
    num_src, rows = case
    index = torch.tensor([i for row in rows for i in row], dtype=torch.long)
    degree = torch.tensor([len(row) for row in rows], dtype=torch.long)
    size = (num_src, len(rows))
    relation = Relation.from_rows(index, degree, size)
    assert not relation.is_complete
    dst = torch.arange(len(rows)).repeat_interleave(degree)
    general = Relation.from_edge_index(torch.stack([index, dst]), size)
    for one, other in [(relation.csr, general.csr), (relation.csc, general.csc)]:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert torch.equal(relation.edge_index, general.edge_index)
    assert torch.equal(relation.has_in_edge, general.has_in_edge)
    back, general = relation.reverse(), general.reverse()
    assert torch.equal(back.edge_index, general.edge_index)
    for one, other in [(back.csr, general.csr), (back.csc, general.csc)]:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_rows_of_one_length_know_it():
    relation = Relation.from_rows(torch.tensor([1, 2, 0, 2]), 2, (3, 2))
    assert relation.degree == 2
    assert relation.reaches_every_target
    assert relation._edge_index is None
    assert repr(relation) == "Relation(3 -> 2, 4 edges, 2 a target)"
    assert not Relation.from_rows(torch.zeros(0).long(), 0, (3, 2)).reaches_every_target
    assert Relation.from_edge_index(torch.tensor([[0], [1]])).degree is None


@pytest.mark.parametrize(
    ("index", "degree", "message"),
    [
        (torch.zeros(3).long(), 2, r"2 sources for each of the 2 targets, but has shape \(3,\)"),
        (torch.zeros(2, 2).long(), 2, r"index must hold .* but has shape \(2, 2\)"),
        (
            torch.zeros(3).long(),
            torch.tensor([1]),
            r"one number for each of the 2 targets, .* \(1,",
        ),
        (torch.zeros(3).long(), torch.tensor([1, 1]), "adds up to 2 edges, but index has 3"),
    ],
)
def test_wrong_rows(index, degree, message):
    with pytest.raises(ValueError, match=message):
        Relation.from_rows(index, degree, (3, 2))


def test_wrong_bias():
    relation = Relation.complete([0, 2], [0, 2])
    for bias in (torch.zeros(3), torch.zeros(4, 1, 1)):
        with pytest.raises(ValueError, match=r"bias must have shape \(4,\) or \(4, heads\), one"):
            relation.with_bias(bias)


def test_errors_show_the_edges():
    edge_index = torch.tensor([[0, 9, 1, 8, 7, 9], [0, 0, 0, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"\(edge 1: 9 -> 0, edge 3: 8 -> 0, edge 5: 9 -> 0\)$"):
        Relation.from_edge_index(edge_index, (8, 1))
    edge_index[:] = 9
    with pytest.raises(ValueError, match=r"edge 2: 9 -> 9 and 3 more\)$"):
        Relation.from_edge_index(edge_index, (8, 8))


@pytest.mark.parametrize(
    "relation",
    [
        Relation.complete([0, 2, 3], [0, 1, 3]),
        Relation.causal([0, 2, 3]),
        Relation.from_edge_index(torch.tensor([[0, 1, 0], [1, 0, 0]])),
        Relation.from_rows(torch.tensor([1, 0]), 1, (2, 2)),
    ],
    ids=repr,
)
def test_lists_made_in_inference_mode_serve_training(relation):
    with torch.inference_mode():
        held = [relation.edge_index, *relation.csr, *relation.csc, relation._dense_position]
    assert not any(tensor.is_inference() for tensor in held)
    assert relation.version == 0
    relation.csr.index.zero_()
    assert relation.version == 1
