"""States talk: torch.nn.MultiheadAttention with residual and LayerNorm on the complete graph."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nsm_graph import Relation, topology
from nsm_graph.nn import StateCommunication


def ptr(counts):
    return [sum(counts[:i]) for i in range(len(counts) + 1)]


def make(heads=2, *, seed=0):
    torch.manual_seed(seed)
    layer = StateCommunication(6, heads).double()
    nn.init.normal_(layer.norm.weight)
    nn.init.normal_(layer.norm.bias)
    return layer


def torch_attention(layer):
    attention = nn.MultiheadAttention(6, layer.heads, batch_first=True).double()
    attention.in_proj_weight.data = layer.lin_qkv.weight.data.clone()
    attention.in_proj_bias.data = layer.lin_qkv.bias.data.clone()
    attention.out_proj.weight.data = layer.lin_out.weight.data.clone()
    attention.out_proj.bias.data = layer.lin_out.bias.data.clone()
    return attention


def documented(layer, attention, s, mask=None):
    delta, _ = attention(s[None], s[None], s[None], attn_mask=mask)
    return nn.functional.layer_norm(s + delta[0], (6,), layer.norm.weight, layer.norm.bias)


@given(
    counts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    heads=st.sampled_from([1, 2, 3, 6]),
    seed=st.integers(0, 99),
)
def test_equals_multihead_attention_residual_and_norm(counts, heads, seed):
    layer = make(heads, seed=seed)
    attention = torch_attention(layer)
    s = torch.randn(sum(counts), 6, dtype=torch.double, requires_grad=True)
    out = layer(s, Relation.complete(ptr(counts), ptr(counts)))
    expected = torch.cat([documented(layer, attention, part) for part in s.split(counts)])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    probe = torch.randn_like(out)
    leaves = [layer.lin_qkv.weight, layer.lin_qkv.bias, layer.lin_out.weight, layer.lin_out.bias]
    ours = torch.autograd.grad((out * probe).sum(), [s, layer.norm.weight, *leaves])
    copies = [attention.in_proj_weight, attention.in_proj_bias]
    copies += [attention.out_proj.weight, attention.out_proj.bias]
    theirs = torch.autograd.grad((expected * probe).sum(), [s, layer.norm.weight, *copies])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", [topology.ring(), topology.star() | topology.self_loops()])
def test_a_topology_is_an_attention_mask(rule):
    layer = make()
    s = torch.randn(5, 6, dtype=torch.double)
    relation = rule(topology.NodeSet.from_counts([5]))
    src, dst = relation.edge_index
    is_masked = torch.ones(5, 5, dtype=torch.bool)
    is_masked[dst, src] = False
    expected = documented(layer, torch_attention(layer), s, is_masked)
    torch.testing.assert_close(layer(s, relation), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(s, relation.edge_index), expected, rtol=0, atol=1e-10)


@given(seed=st.integers(0, 99))
def test_permuting_states_permutes_the_result(seed):
    layer = make(seed=seed).float()
    s, order = torch.randn(5, 6), torch.randperm(5)
    relation = Relation.complete([0, 5], [0, 5])
    torch.testing.assert_close(layer(s[order], relation), layer(s, relation)[order])


def test_a_state_without_in_edges_receives_only_the_output_bias():
    layer = make()
    s = torch.randn(3, 6, dtype=torch.double)
    expected = layer.norm(s[2] + layer.lin_out.bias)
    edges = torch.tensor([[1, 2], [0, 1]])
    for given_edges in (edges, Relation.from_edge_index(edges, (3, 3))):
        torch.testing.assert_close(layer(s, given_edges)[2], expected)


R = Relation.complete([0, 5], [0, 5])
BAD = [
    (lambda c, s: c(s[:, :3], R), r"x must have shape \(nodes, 6\)"),
    (lambda c, s: c(s.long(), R), "x must be floating point"),
    (lambda c, s: c(s[:4], R), "relation goes from 5 nodes, but their features have 4"),
    (lambda c, s: c(s, R, bias=torch.zeros(3)), r"bias must have shape"),
    (lambda c, s: c(s, R, bias=torch.zeros(25, 3)), r"bias must have shape"),
    (lambda c, s: c(s, torch.tensor([[0], [7]])), "names a node outside the 5 source and 5 target"),
    (lambda c, s: c(s, R.to("meta")), "relation is on meta"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(StateCommunication(6, 2), torch.randn(5, 6))


def test_refuses_bad_options():
    with pytest.raises(ValueError, match="heads must divide"):
        StateCommunication(6, 4)
