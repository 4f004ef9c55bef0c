"""Routing against plain loops over tokens, heads and states."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from nsm_graph.ops import route
from nsm_graph.relation import Relation

HEADS, CHANNELS, COLUMNS = 2, 3, 5
BACKENDS = ("reference", "dense", None)

# Tokens and states of each example.
COMPLETE = {
    "uniform": ([4, 4], [3, 3]),
    "one": ([1], [1]),
    "63 to 33": ([63], [33]),
    "ragged": ([5, 2, 9], [3, 4, 1]),
    "ragged tokens": ([5, 0, 2], [4, 4, 4]),
    "ragged states": ([4, 4, 4], [1, 0, 3]),
    "no tokens": ([0, 0], [2, 2]),
    "no states": ([3, 2], [0, 0]),
    "no examples": ([], []),
}


def complete(name):
    return Relation.complete(*(torch.tensor([0, *counts]).cumsum(0) for counts in COMPLETE[name]))


def table(relation, columns=COLUMNS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    options = {"generator": generator, "dtype": torch.float64}
    logits = torch.randn(relation.num_src, HEADS, columns, **options)
    x = torch.randn(relation.num_src, CHANNELS, **options)
    return logits.to(dtype).requires_grad_(), x.to(dtype).requires_grad_()


def columns_of(relation, columns=COLUMNS):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(columns, (relation.num_dst,), generator=generator)


def oracle(logits, x, edge_index, num_dst, column):
    """Loops; every sum runs over the edges of one token."""
    edges = list(zip(*edge_index.tolist(), strict=True))
    routed = [torch.zeros(x.size(1), dtype=x.dtype) + 0 * x.sum() for _ in range(num_dst)]
    weights = {}
    for token in {src for src, _ in edges}:
        leaving = [e for e, (src, _) in enumerate(edges) if src == token]
        total = 0
        for h in range(logits.size(1)):
            scores = torch.stack([logits[token, h, column[edges[e][1]]] for e in leaving])
            powers = torch.exp(scores - scores.detach().max())
            total = total + powers / powers.sum()
        for e, weight in zip(leaving, total / logits.size(1), strict=True):
            weights[e] = weight
            routed[edges[e][1]] = routed[edges[e][1]] + weight * x[token]
    rows = torch.stack(routed) if routed else x[:0]
    return rows, torch.stack([weights[e] for e in range(len(edges))]) if edges else x[:0].sum(1)


def gradients(outputs, tensors):
    loss = sum(
        (out * torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)).sum()
        for out in outputs
    )
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COMPLETE)
def test_equals_the_oracle_with_every_gradient(name, backend):
    relation = complete(name)
    logits, x = table(relation)
    column = columns_of(relation)
    actual = route(logits, x, relation, column, backend=backend)
    expected = oracle(logits, x, relation.edge_index, relation.num_dst, column)
    grads = [gradients(out, [logits, x]) for out in (actual, expected)]
    for a, e in [*zip(actual, expected, strict=True), *zip(*grads, strict=True)]:
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_columns_states_count_from_the_first_of_each_example(backend):
    relation = Relation.complete([0, 4, 6, 6], [0, 3, 6, 9])
    logits, x = table(relation, columns=3)
    actual = route(logits, x, relation, backend=backend)
    column = torch.tensor([0, 1, 2] * 3)
    expected = oracle(logits, x, relation.edge_index, relation.num_dst, column)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("with_column", [False, True])
def test_general_edges_equal_the_oracle(with_column):
    # A duplicate edge, a token and a state alone.
    edges = torch.tensor([[0, 0, 0, 2, 2, 3], [1, 1, 3, 0, 3, 3]])
    relation = Relation.from_edge_index(edges, (5, 6))
    logits, x = table(relation, columns=3)
    column = torch.tensor([2, 0, 0, 1, 1, 2]) if with_column else torch.tensor([0, 1, 2] * 2)
    actual = route(logits, x, relation, column if with_column else None)
    expected = oracle(logits, x, edges, 6, column)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_a_subset_of_edges_is_normalised_over_what_is_left():
    whole = complete("ragged")
    relation = whole.subset(torch.arange(0, whole.num_edges, 2))
    logits, x = table(relation)
    column = columns_of(relation)
    actual = route(logits, x, relation, column)
    expected = oracle(logits, x, relation.edge_index, relation.num_dst, column)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ptr", [[0, 3, 6], [0, 1, 1, 5]], ids=str)
def test_a_causal_relation_is_routed_over_its_edges_only(ptr, dtype):
    relation = Relation.causal(ptr)
    logits, x = table(relation, dtype=dtype)
    column = columns_of(relation)
    actual = route(logits, x, relation, column)
    expected = oracle(logits, x, relation.edge_index, relation.num_dst, column)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    with pytest.raises(ValueError, match='"dense" of routing needs a complete relation'):
        route(logits, x, relation, column, backend="dense")


@pytest.mark.parametrize("backend", ["reference", "dense"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_every_dtype_offered(dtype, tolerance, backend):
    for name in COMPLETE:
        relation = complete(name)
        logits, x = table(relation, dtype=dtype)
        column = columns_of(relation)
        actual = route(logits, x, relation, column, backend=backend)
        expected = oracle(
            logits.double(), x.double(), relation.edge_index, relation.num_dst, column
        )
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == dtype
            assert (a.double() - e).norm() <= tolerance * e.norm()


@pytest.mark.parametrize("backend", ["reference", "dense"])
@pytest.mark.parametrize("kind", ["uniform", "ragged states"])
def test_first_and_second_derivatives(kind, backend):
    relation = complete(kind)
    logits, x = table(relation)
    column = columns_of(relation)

    def function(logits, x):
        return route(logits, x, relation, column, backend=backend)

    assert gradcheck(function, [logits, x])
    assert gradgradcheck(function, [logits, x])


@pytest.mark.parametrize("backend", ["reference", "dense"])
def test_weights_of_a_token_sum_to_one(backend):
    relation = complete("ragged tokens")
    logits, x = table(relation)
    _, weights = route(logits, x, relation, columns_of(relation), backend=backend)
    total = torch.zeros(relation.num_src, dtype=weights.dtype)
    total.index_add_(0, relation.edge_index[0], weights.detach())
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("backend", ["reference", "dense"])
def test_n12_huge_logits(backend):
    relation = complete("ragged")
    logits, x = table(relation, dtype=torch.float32)
    column = columns_of(relation)
    big = logits.detach().sign() * 1e30
    routed, weights = route(big.requires_grad_(), x, relation, column, backend=backend)
    expected = oracle(big.double(), x.double(), relation.edge_index, relation.num_dst, column)
    torch.testing.assert_close(routed.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.double(), expected[1], rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in gradients([routed, weights], [big, x]))


@pytest.mark.parametrize("backend", ["reference", "dense"])
def test_a_broken_example_does_not_reach_its_neighbours(backend):
    relation = Relation.complete([0, 3, 7, 9], [0, 2, 4, 7])
    logits, x = table(relation)
    column = columns_of(relation)
    clean, clean_weights = route(logits, x, relation, column, backend=backend)
    logits.data[3:7] = math.nan
    x.data[3:7] = math.inf
    routed, weights = route(logits, x, relation, column, backend=backend)
    mine = torch.tensor([0, 1, 4, 5, 6])
    assert torch.equal(routed[mine], clean[mine])
    is_mine = torch.isin(relation.edge_index[1], mine)
    assert torch.equal(weights[is_mine], clean_weights[is_mine])
    for grad in torch.autograd.grad(routed[mine].sum(), [logits, x]):
        assert grad[[0, 1, 2, 7, 8]].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "dense"])
def test_no_result_depends_on_memory_that_was_never_written(poisoned_memory, backend):
    for name in COMPLETE:
        relation = complete(name)
        logits, x = table(relation)
        out = route(logits, x, relation, columns_of(relation), backend=backend)
        assert all(o.isfinite().all() for o in out)
        assert all(g.isfinite().all() for g in gradients(out, [logits, x]))


def test_tokens_without_states_route_nothing_even_if_broken():
    relation = complete("no states")
    logits, x = table(relation)
    x.data.fill_(math.nan)
    routed, weights = route(logits, x, relation, columns_of(relation), backend="dense")
    assert routed.shape == (0, CHANNELS)
    assert weights.shape == (0,)
    assert routed.requires_grad
    assert weights.requires_grad


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=5))
def test_dense_equals_the_reference_for_any_counts(counts):
    ptrs = [[0], [0]]
    for pair in counts:
        for ptr, count in zip(ptrs, pair, strict=True):
            ptr.append(ptr[-1] + count)
    relation = Relation.complete(*ptrs)
    logits, x = table(relation)
    column = columns_of(relation)
    actual = route(logits, x, relation, column, backend="dense")
    expected = route(logits, x, relation, column, backend="reference")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(5, 4)}, r"logits must have shape \(5, heads, columns\)"),
        ({"logits": torch.zeros(4, 2, 3)}, r"shape \(5, heads, columns\), but has \(4, 2, 3\)"),
        ({"x": torch.zeros(5)}, r"x must have shape \(tokens, channels\), but has \(5,\)"),
        ({"logits": torch.zeros(5, 2, 4)}, r"does not give every example 4 states, .* column="),
        ({"column": torch.zeros(4).long()}, r"each of the 3 states, but has shape \(4,\)"),
        (
            {"x": torch.zeros(6, 2), "logits": torch.zeros(6, 2, 3)},
            "relation goes from 5 nodes, .* 6 rows",
        ),
        ({"backend": "segment_csr"}, r"backend of routing must be one of \['dense', 'reference'\]"),
        (
            {
                "backend": "dense",
                "relation": Relation.from_edge_index(torch.zeros(2, 0).long(), (5, 3)),
            },
            "needs a complete relation",
        ),
        (
            {"relation": Relation.complete([0, 4, 5], [0, 1, 3])},
            "does not give every example 3 states",
        ),
        (
            {"relation": Relation.from_edge_index(torch.zeros(2, 0).long(), (5, 4))},
            "does not give every example 3 states",
        ),
    ],
)
def test_wrong_arguments(changes, message):
    given_arguments = {
        "logits": torch.zeros(5, 2, 3),
        "x": torch.zeros(5, 2),
        "relation": Relation.complete([0, 5], [0, 3]),
    }
    route(**given_arguments)
    with pytest.raises(ValueError, match=message):
        route(**{**given_arguments, **changes})
