"""States query tokens: against the documented matrix formula."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsm_graph import Relation
from nsm_graph.nn import HybridAttention

COUNTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=4)


def ptr(counts):
    return [sum(counts[:i]) for i in range(len(counts) + 1)]


def documented_attention(layer, x, s):
    """One example, dense: attended [N, C] and weights [H, N, L]."""
    query = s @ layer.lin_query.weight.T + layer.lin_query.bias
    key = value = x @ layer.lin_token.weight.T + layer.lin_token.bias
    if layer.lin_value is not None:
        value = x @ layer.lin_value.weight.T + layer.lin_value.bias
    width = query.size(1) // layer.heads
    outs, weights = [], []
    for h in range(layer.heads):
        part = slice(h * width, (h + 1) * width)
        a = (query[:, part] @ key[:, part].T / width**0.5).softmax(1)
        outs.append(a @ value[:, part])
        weights.append(a)
    out = torch.cat(outs, 1) @ layer.lin_out.weight.T + layer.lin_out.bias
    return out, torch.stack(weights)


def make(heads=2, *, seed=0, **options):
    torch.manual_seed(seed)
    return HybridAttention((4, 6), heads, **options).double()


@given(
    counts=COUNTS,
    heads=st.sampled_from([1, 2, 3, 6]),
    separate_values=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_the_documented_formula_and_its_gradients(counts, heads, separate_values, seed):
    layer = make(heads, seed=seed, separate_values=separate_values)
    num_tokens, num_states = [t for t, _ in counts], [n for _, n in counts]
    x = torch.randn(sum(num_tokens), 4, dtype=torch.double, requires_grad=True)
    s = torch.randn(sum(num_states), 6, dtype=torch.double, requires_grad=True)
    out = layer((x, s), Relation.complete(ptr(num_tokens), ptr(num_states)))
    parts = zip(x.split(num_tokens), s.split(num_states), strict=True)
    expected = torch.cat([documented_attention(layer, a, b)[0] for a, b in parts])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)

    probe = torch.randn_like(out)
    leaves = [x, s, *layer.parameters()]
    ours = torch.autograd.grad((out * probe).sum(), leaves)
    theirs = torch.autograd.grad((expected * probe).sum(), leaves, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_weights_come_back_in_the_documented_layout(dtype):
    layer = make().to(dtype)
    x, s = torch.randn(8, 4, dtype=dtype), torch.randn(6, 6, dtype=dtype)
    relation = Relation.complete([0, 4, 8], [0, 3, 6])
    _, (edge_index, alpha) = layer((x, s), relation, return_attention_weights=True)
    torch.testing.assert_close(edge_index, relation.edge_index)
    dense = relation.to_dense(alpha).permute(0, 3, 1, 2)
    assert dense.shape == (2, 2, 3, 4)
    for b in range(2):
        expected = documented_attention(layer, x[4 * b : 4 * b + 4], s[3 * b : 3 * b + 3])[1]
        torch.testing.assert_close(dense[b], expected)


@given(seed=st.integers(0, 99))
def test_permuting_tokens_changes_nothing_and_permuting_states_permutes(seed):
    layer = make(seed=seed).float()
    x, s = torch.randn(5, 4), torch.randn(3, 6)
    relation = Relation.complete([0, 5], [0, 3])
    out = layer((x, s), relation)
    torch.testing.assert_close(layer((x[torch.randperm(5)], s), relation), out)
    order = torch.randperm(3)
    torch.testing.assert_close(layer((x, s[order]), relation), out[order])


def test_bias_removes_edges_and_a_fully_masked_state_gets_the_output_bias():
    layer = make()
    x, s = torch.randn(3, 4, dtype=torch.double), torch.randn(2, 6, dtype=torch.double)
    relation = Relation.complete([0, 3], [0, 2])
    bias = torch.zeros(6, dtype=torch.double)
    bias[1] = bias[3:] = -torch.inf  # state 0 keeps tokens 0 and 2, state 1 keeps none
    for edges in (relation, relation.edge_index):
        out = layer((x, s), edges, bias=bias)
        expected = documented_attention(layer, x[[0, 2]], s[:1])[0]
        torch.testing.assert_close(out[:1], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(out[1], layer.lin_out.bias.detach())


def test_a_finite_bias_moves_the_weights():
    layer = make()
    x, s = torch.randn(3, 4, dtype=torch.double), torch.randn(2, 6, dtype=torch.double)
    relation, bias = Relation.complete([0, 3], [0, 2]), torch.randn(6, 2, dtype=torch.double)
    _, (_, plain) = layer((x, s), relation, return_attention_weights=True)
    _, (_, biased) = layer((x, s), relation, bias=bias, return_attention_weights=True)
    expected = (plain.log() + bias).view(2, 3, 2).softmax(1).flatten(0, 1)
    torch.testing.assert_close(biased, expected)


def test_one_number_stands_for_both_sizes():
    assert HybridAttention(8, heads=2).in_channels == (8, 8)


R = Relation.complete([0, 5], [0, 3])
BAD = [
    (lambda a, x, s: a((x[:, :3], s), R), r"x\[0\] \(tokens\) must have shape \(nodes, 4\)"),
    (lambda a, x, s: a((x, s[:, :3]), R), r"x\[1\] \(states\) must have shape \(nodes, 6\)"),
    (lambda a, x, s: a((x.long(), s), R), r"x\[0\] \(tokens\) must be floating point"),
    (lambda a, x, s: a((x[0], s), R), r"must have shape"),
    (lambda a, x, s: a((x[:4], s), R), "relation goes from 5 nodes, but their features have 4"),
    (lambda a, x, s: a((x, s[:2]), R), "relation goes to 3 nodes, but their features have 2"),
    (lambda a, x, s: a((x, s), R, bias=torch.zeros(4)), r"bias must have shape \(15,\)"),
    (lambda a, x, s: a((x, s), R.to("meta")), "relation is on meta, but query is on cpu"),
    (
        lambda a, x, s: a((x, s), torch.tensor([[5], [0]])),
        "names a node outside the 5 source and 3",
    ),
    (lambda a, x, s: a((x, s), torch.tensor([[0], [3]])), "names a node outside"),
    (lambda a, x, s: a((x, s), torch.tensor([[-1], [0]])), "outside|negative"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(HybridAttention((4, 6), 2), torch.randn(5, 4), torch.randn(3, 6))


@pytest.mark.parametrize(
    ("channels", "heads", "message"),
    [
        ((4, 6), 4, "heads must divide the state channels, but 6 channels and 4 heads"),
        ((4, 6), 0, "heads must divide"),
        ((4, 0), 1, "heads must divide"),
        ((0, 6), 2, "token_channels must be a positive integer or -1"),
    ],
)
def test_refuses_bad_options(channels, heads, message):
    with pytest.raises(ValueError, match=message):
        HybridAttention(channels, heads)


@pytest.mark.parametrize(
    "bias", [torch.zeros(1), torch.zeros(3, 2), torch.zeros(4).bool(), torch.zeros(4, 1, 1)]
)
def test_a_bias_on_plain_edges_is_checked_as_on_a_relation(bias):
    layer, tokens, states = HybridAttention((3, 8)), torch.randn(4, 3), torch.randn(2, 8)
    edge_index = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 1]])
    with pytest.raises(ValueError, match="bias must"):
        layer((tokens, states), edge_index, bias=bias)


def test_other_dtypes_are_named():
    layer, edge_index = HybridAttention((3, 8)), torch.tensor([[0, 1], [0, 0]])
    with pytest.raises(ValueError, match="but the layer is"):
        layer((torch.randn(4, 3).double(), torch.randn(2, 8)), edge_index)
    x = (torch.randn(4, 3), torch.randn(2, 8))
    torch.testing.assert_close(layer(x, edge_index.int()), layer(x, edge_index))
