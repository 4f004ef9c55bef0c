"""The one-line memory: against its equations graph by graph, and inside ordinary models."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch_geometric.nn import GCNConv, GINEConv, Sequential

from nsm_graph import Partition
from nsm_graph.nn import MemoryConv
from nsm_graph.testing import assert_batch_invariant, assert_close_to_norm

COUNTS = st.lists(st.integers(0, 6), min_size=1, max_size=4)


def batch_of(counts):
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def affine(lin, x):
    return x @ lin.weight.T + lin.bias


def attend(heads, q, k, v):
    width, outs = q.size(1) // heads, []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        outs.append((q[:, part] @ k[:, part].T / width**0.5).softmax(1) @ v[:, part])
    return torch.cat(outs, 1)


def documented_memory(m, x, s):
    """One graph with nodes, no conv."""
    logits = affine(m.router.lin_logits, x).view(len(x), m.num_states, m.heads)
    w = logits.softmax(1).mean(2)
    u = affine(m.router.lin_out, w.T @ x / len(x))
    k = affine(m.attention.lin_token, x)
    q = affine(m.attention.lin_query, s)
    u = u + affine(m.attention.lin_out, attend(m.heads, q, k, k))
    r, z = affine(m.propagator.lin_gates, torch.cat([s, u], 1)).sigmoid().chunk(2, 1)
    c = affine(m.propagator.lin_candidate, torch.cat([r * s, u], 1)).tanh()
    s = communicate(m, (1 - z) * s + z * c)
    key, value = affine(m.readout.lin_state, s).chunk(2, 1)
    read = attend(m.heads, affine(m.readout.lin_query, x), key, value)
    return norm(m.norm, x + affine(m.readout.lin_out, read)), s


def communicate(m, s):
    qkv = affine(m.communication.lin_qkv, s).chunk(3, 1)
    return norm(m.communication.norm, s + affine(m.communication.lin_out, attend(m.heads, *qkv)))


def norm(layer, x):
    centred = x - x.mean(1, keepdim=True)
    scale = (centred.square().mean(1, keepdim=True) + layer.eps).sqrt()
    return centred / scale * layer.weight + layer.bias


@given(counts=COUNTS, seed=st.integers(0, 99), is_carried=st.booleans())
def test_equals_its_equations_graph_by_graph(counts, seed, is_carried):
    torch.manual_seed(seed)
    m = MemoryConv(6, 3, heads=2).double()
    x = torch.randn(sum(counts), 6, dtype=torch.double)
    state = torch.randn(3 * len(counts), 6, dtype=torch.double) if is_carried else None
    out, after = m(x, batch=batch_of(counts), batch_size=len(counts), state=state)
    start = m.bank.repeat(len(counts), 1) if state is None else state
    for b, (part, s) in enumerate(zip(x.split(counts), start.split(3), strict=True)):
        rows = slice(3 * b, 3 * b + 3)
        if len(part) == 0:  # nothing is read, but states still talk
            torch.testing.assert_close(after[rows], communicate(m, s), rtol=0, atol=1e-10)
            continue
        nodes, states = documented_memory(m, part, s)
        first = sum(counts[:b])
        torch.testing.assert_close(out[first : first + len(part)], nodes, rtol=0, atol=1e-10)
        torch.testing.assert_close(after[rows], states, rtol=0, atol=1e-10)


@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_graphs_do_not_see_each_other(counts, seed):
    torch.manual_seed(seed)
    m = MemoryConv(6, 3, heads=2)
    graphs = [torch.randn(n, 6) for n in counts]
    assert_batch_invariant(
        lambda x, batch: m(x, batch=batch)[1].view(int(batch[-1]) + 1, -1), graphs
    )
    whole, _ = m(torch.cat(graphs), batch=batch_of(counts))
    for part, graph in zip(whole.split(counts), graphs, strict=True):
        assert_close_to_norm(part, m(graph)[0], 1e-5)


@given(seed=st.integers(0, 99))
def test_permuting_nodes_permutes_them_and_leaves_the_memory(seed):
    torch.manual_seed(seed)
    m, x, order = MemoryConv(6, 3, heads=2), torch.randn(5, 6), torch.randperm(5)
    out, state = m(x)
    permuted, same = m(x[order])
    torch.testing.assert_close(permuted, out[order])
    torch.testing.assert_close(same, state)


def test_the_memory_reaches_every_node_of_the_graph_and_no_other():
    torch.manual_seed(0)
    m = MemoryConv(6, 3, heads=2)
    x = torch.randn(7, 6, requires_grad=True)
    out, _ = m(x, batch=batch_of([4, 3]))
    out[0].square().sum().backward()
    assert (x.grad[:4].abs().sum(1) > 0).all()
    assert (x.grad[4:] == 0).all()


def test_conv_sees_edges_and_their_features():
    torch.manual_seed(0)
    x, edge_index = torch.randn(5, 6), torch.tensor([[0, 1, 2], [1, 2, 3]])
    m = MemoryConv(6, 3, heads=2, conv=GCNConv(6, 6))
    out, _ = m(x, edge_index)
    plain = MemoryConv(6, 3, heads=2)
    plain.load_state_dict({k: v for k, v in m.state_dict().items() if not k.startswith("conv")})
    torch.testing.assert_close(out, plain(x + m.conv(x, edge_index))[0])
    gine = MemoryConv(6, 3, heads=2, conv=GINEConv(nn.Linear(6, 6)))
    attr = torch.randn(3, 6)
    quiet, loud = (gine(x, edge_index, edge_attr=a)[0] for a in (attr, 9 * attr))
    assert not torch.allclose(quiet, loud)


def test_a_partition_serves_as_batch():
    m, x = MemoryConv(6, 3, heads=2), torch.randn(7, 6)
    nodes = Partition.from_ptr(torch.tensor([0, 4, 7]))
    assert torch.equal(m(x, batch=nodes)[0], m(x, batch=batch_of([4, 3]))[0])


def test_is_one_line_in_a_pyg_model():
    model = Sequential(
        "x, edge_index, batch",
        [
            (GCNConv(5, 6), "x, edge_index -> x"),
            (MemoryConv(6, 3, heads=2), "x, edge_index, batch -> x, state"),
            (MemoryConv(6, 3, heads=2), "x, edge_index, batch, state -> x, state"),
            (lambda x, state: x, "x, state -> x"),
        ],
    )
    out = model(torch.randn(5, 5), torch.tensor([[0, 3], [1, 4]]), batch_of([2, 3]))
    assert out.shape == (5, 6)


X = torch.zeros(5, 6)
BAD = [
    (lambda m: m(X[:, :4]), r"x must have shape \(nodes, 6\)"),
    (lambda m: m(X.long()), "x must be floating point"),
    (lambda m: m(X, batch=batch_of([2, 2])), "batch has 4 entries, but x has 5 rows"),
    (lambda m: m(X, batch=torch.tensor([0, 1, 0, 1, 1])), "batch must be sorted"),
    (lambda m: m(X, batch=torch.zeros(5)), "batch must be an integer vector"),
    (lambda m: m(X, batch=torch.zeros(5, 1).long()), "batch must be an integer vector"),
    (lambda m: m(X, batch=batch_of([2, 3]), batch_size=1), "batch holds the example 1, but"),
    (lambda m: m(X, state=torch.zeros(4, 6)), r"state must have shape \(3, 6\), but has \(4, 6\)"),
    (lambda m: m(X, batch=batch_of([2, 3]), state=torch.zeros(3, 6)), "batch holds the example 1"),
    (lambda m: m(X, state=torch.zeros(3, 5)), "state must have shape"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(MemoryConv(6, 3, heads=2))


def test_refuses_bad_options():
    with pytest.raises(ValueError, match="heads must divide"):
        MemoryConv(6, 3, heads=4)
    with pytest.raises(ValueError, match="num_states and heads must be positive"):
        MemoryConv(6, 0, heads=2)


def test_ragged_partition_compiles_without_a_graph_break():
    torch._dynamo.reset()
    layer = MemoryConv(8, num_states=4, heads=2)
    nodes = Partition.from_ptr(torch.tensor([0, 3, 9, 11]))
    explanation = torch._dynamo.explain(layer)(torch.randn(11, 8), None, nodes)
    torch._dynamo.reset()
    assert explanation.graph_break_count == 0, explanation.break_reasons


@pytest.mark.parametrize("batch", [None, Partition.uniform(2, 3)])
def test_refuses_another_number_of_graphs(batch):
    with pytest.raises(ValueError, match=r"batch_size is 7, but batch stands for \d graphs"):
        MemoryConv(8, 4, 2)(torch.randn(6, 8), None, batch, batch_size=7)
