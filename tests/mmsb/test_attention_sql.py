"""Attention in SQL, an oracle that shares no code with the kernels, against every backend."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm_graph import topology
from nsm_graph.mmsb import attention_sql
from nsm_graph.mmsb.attention_sql import attention_statement
from nsm_graph.ops import edge_attention
from nsm_graph.ops.backend import available_backends
from nsm_graph.relation import Relation
from nsm_graph.testing import random_relation
from nsm_graph.topology import NodeSet

pytest.importorskip("duckdb", reason="attention_sql needs DuckDB: pip install 'nsm-graph[sql]'")

BACKENDS = [name for name, is_available, _ in available_backends() if is_available]
#: Share of the norm; one in float32 is 6e-8.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def inputs(relation, heads=2, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, heads, channels, generator=generator, dtype=torch.float64)
        for rows in (relation.num_dst, relation.num_src, relation.num_src)
    ]


def check(relation, bias=None, normalise="target", **shape):
    """Every backend that can serve the relation, in both precisions, equals the statement."""
    for dtype, tolerance in TOLERANCE.items():
        q, k, v = (tensor.to(dtype) for tensor in inputs(relation, **shape))
        given_bias = None if bias is None else bias.to(dtype)
        expected = attention_sql(q, k, v, relation, bias=given_bias, normalise=normalise)
        assert expected.dtype == torch.float64
        for name in BACKENDS:
            if name == "dense" and not relation.is_complete:
                continue
            out = edge_attention(
                q, k, v, relation, bias=given_bias, normalise=normalise, backend=name
            )
            assert out.shape == expected.shape
            error = (out.double() - expected).norm()
            assert error <= tolerance * expected.norm(), (name, dtype, float(error))


counts = st.integers(0, 5)


@pytest.mark.parametrize("normalise", ["target", "source"])
@given(counts, counts, st.integers(0, 30), st.integers(0, 9), st.integers(1, 3))
@settings(max_examples=30)
def test_general_edges(normalise, num_src, num_dst, num_edges, seed, heads):
    """Few nodes and up to thirty edges: isolated nodes, and edges that stand twice."""
    relation = random_relation(num_src, num_dst, num_edges, seed=seed)
    check(relation, normalise=normalise, heads=heads, seed=seed)


@pytest.mark.parametrize("normalise", ["target", "source"])
@given(st.lists(st.tuples(counts, counts), max_size=3), st.integers(0, 9))
@settings(max_examples=30)
def test_complete_examples(normalise, sizes, seed):
    """Ragged, with examples that are empty on one side or both."""
    src, dst = (torch.tensor([0, *(size[i] for size in sizes)]).cumsum(0) for i in (0, 1))
    check(Relation.complete(src, dst), normalise=normalise, seed=seed)


@pytest.mark.parametrize("normalise", ["target", "source"])
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 20), st.booleans(), st.integers(0, 9))
@settings(max_examples=20)
def test_biases_and_removed_edges(normalise, num_src, num_dst, num_edges, is_complete, seed):
    relation = random_relation(num_src, num_dst, num_edges, seed=seed)
    if is_complete:
        relation = Relation.complete([0, num_src, num_src + 1], [0, num_dst, num_dst + 2])
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(relation.num_edges, 2, generator=generator, dtype=torch.float64)
    bias[torch.rand(bias.shape, generator=generator) < 0.4] = -math.inf
    bias[relation.edge_index[1] == 0] = -math.inf  # a target that loses all its edges
    check(relation, bias, normalise)
    own = torch.linspace(-1, 1, relation.num_edges, dtype=torch.float64)
    check(relation.with_bias(own), own, normalise)


def test_scores_far_from_zero():
    """Stabilised: exponentials of the scores themselves would overflow, or all vanish."""
    relation = random_relation(6, 5, 20)
    q, k, v = inputs(relation)
    for factor in (2000.0, -2000.0):
        expected = attention_sql(factor * q, k, v, relation)
        assert expected.isfinite().all() and expected.norm() > 0
        out = edge_attention(factor * q, k, v, relation)
        assert (out - expected).norm() <= 1e-10 * expected.norm()
    shifted = attention_sql(q, k, v, relation, bias=torch.full((20,), 5000.0))
    assert (shifted - attention_sql(q, k, v, relation)).norm() < 1e-10


def test_rules_and_their_biases():
    nodes = NodeSet.from_counts([7, 0, 4])
    alibi = topology.causal().biased(lambda edges: -0.5 * edges.distance)
    for rule in (topology.ring(), topology.window(2), alibi, topology.star()):
        check(rule(nodes))


def test_against_softmax_by_hand():
    query = torch.tensor([[[1.0]], [[0.0]], [[2.0]]])
    key, value = torch.tensor([[[math.log(3.0)]], [[0.0]]]), torch.tensor([[[1.0]], [[5.0]]])
    relation = Relation.from_edge_index(torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 1, 1]]), (2, 3))
    out = attention_sql(query, key, value, relation)
    expected = torch.tensor([0.75 * 1 + 0.25 * 5, (1 + 5 + 5) / 3, 0.0], dtype=torch.float64)
    assert torch.allclose(out.flatten(), expected, atol=1e-7)
    out = attention_sql(query, key, value, relation, normalise="source")
    expected = torch.tensor([0.75 * 1 + 5 / 3, 0.25 * 1 + 10 / 3, 0.0], dtype=torch.float64)
    assert torch.allclose(out.flatten(), expected, atol=1e-7)


def test_it_is_one_statement():
    import duckdb

    for normalise in ("target", "source"):
        statements = duckdb.extract_statements(attention_statement(normalise))
        assert [statement.type.name for statement in statements] == ["SELECT"]


def test_wide_values():
    relation = random_relation(4, 3, 9)
    q, k, v = inputs(relation)
    wide = torch.cat([v, 2 * v], dim=2)
    out = attention_sql(q, k, wide, relation)
    assert out.shape == (3, 2, 6)
    assert torch.allclose(out[..., 3:], 2 * out[..., :3], rtol=1e-12)


def test_edge_index_is_a_relation():
    relation = random_relation(4, 3, 9)
    q, k, v = inputs(relation)
    found = attention_sql(q, k, v, relation.edge_index)
    assert found.equal(attention_sql(q, k, v, relation))


def test_bad_input():
    relation = random_relation(4, 3, 9)
    q, k, v = inputs(relation)
    with pytest.raises(ValueError, match=r"query must have shape .* has \(3, 6\)"):
        attention_sql(q.flatten(1), k, v, relation)
    with pytest.raises(ValueError, match="must agree in heads"):
        attention_sql(q, k[:, :1], v, relation)
    with pytest.raises(ValueError, match=r"query \(3, 2, 0\) has no channels"):
        attention_sql(q[..., :0], k[..., :0], v, relation)
    with pytest.raises(ValueError, match="relation goes from 4 nodes, but their features have 3"):
        attention_sql(q, k[:3], v[:3], relation)
    with pytest.raises(ValueError, match=r"bias must have shape \(9,\), \(9, 1\) or \(9, 2\)"):
        attention_sql(q, k, v, relation, bias=torch.zeros(9, 3))
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="bias must hold numbers, or -inf"):
            attention_sql(q, k, v, relation, bias=torch.full((9,), wrong))
        with pytest.raises(ValueError, match=r"value must be finite, .* 24 of its numbers are not"):
            attention_sql(q, k, torch.full_like(v, wrong), relation)
    with pytest.raises(ValueError, match=r"scores must be finite in double precision, but 18 num"):
        attention_sql(1e200 * torch.ones_like(q), 1e200 * torch.ones_like(k), v, relation)
    for wrong, message in (
        (relation.edge_index.T, r"must be a tensor of shape \(2, E\), but got \(9, 2\)"),
        (relation.edge_index + 4, "names source"),
        ("edges", r"must be a tensor of shape \(2, E\), but got <class 'str'>"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_sql(q, k, v, wrong)
    with pytest.raises(ValueError, match='must be "target" or "source", but is \'edge\''):
        attention_sql(q, k, v, relation, normalise="edge")


def test_it_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    relation = random_relation(4, 3, 9)
    with pytest.raises(ImportError, match=r"attention_sql needs DuckDB: pip install 'nsm-graph\[s"):
        attention_sql(*inputs(relation), relation)
