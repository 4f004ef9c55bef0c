"""Token-to-state routing against the documented formula, written with explicit loops."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nsm_graph import Relation
from nsm_graph.nn import TokenToStateRouter

COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=4)


def ptr(counts):
    return [sum(counts[:i]) for i in range(len(counts) + 1)]


def documented_routing(router, x, importance, *, top_k=None, reduce="sum", slots=None):
    """One example: [L, C_t] -> routed [N, C] and weights [L, N], from the equation."""
    weight, bias = router.lin_logits.weight, router.lin_logits.bias
    heads, slots = router.heads, range(router.num_states) if slots is None else slots
    rows = []
    for x_i in x:
        per_head = []
        for h in range(heads):
            z = [weight[m * heads + h] @ x_i + bias[m * heads + h] for m in slots]
            z = torch.stack(z) + F.logsigmoid(importance[list(slots)])
            per_head.append(z.exp() / z.exp().sum())
        w = sum(per_head) / heads
        if top_k is not None:
            best = sorted(range(len(w)), key=lambda j: (-w[j].item(), j))[:top_k]
            kept = torch.tensor([float(j in best) for j in range(len(w))], dtype=w.dtype)
            w = w * kept / (w * kept).sum()
        rows.append(w)
    w = torch.stack(rows) if rows else x.new_zeros(0, len(slots))
    routed = w.T @ x
    if reduce == "mean":
        routed = routed / max(len(x), 1)
    return routed @ router.lin_out.weight.T + router.lin_out.bias, w


def make(num_states=3, heads=2, *, seed=0, **options):
    torch.manual_seed(seed)
    return TokenToStateRouter(4, 6, num_states, heads, **options).double()


@given(
    counts=COUNTS,
    num_states=st.integers(1, 4),
    heads=st.integers(1, 3),
    top_k=st.sampled_from([None, 1, 2]),
    reduce=st.sampled_from(["sum", "mean"]),
    seed=st.integers(0, 99),
)
def test_equals_the_documented_formula_and_its_gradients(
    counts, num_states, heads, top_k, reduce, seed
):
    top_k = None if top_k is None else min(top_k, num_states)
    router = make(num_states, heads, seed=seed, top_k=top_k, routing_reduce=reduce)
    x = torch.randn(sum(counts), 4, dtype=torch.double, requires_grad=True)
    importance = torch.randn(num_states, dtype=torch.double, requires_grad=True)
    relation = Relation.complete(ptr(counts), ptr([num_states] * len(counts)))
    out = router(x, relation, importance=importance)
    parts = x.split(counts)
    expected = torch.cat(
        [documented_routing(router, p, importance, top_k=top_k, reduce=reduce)[0] for p in parts]
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)

    probe = torch.randn_like(out)
    leaves = [x, importance, *router.parameters()]
    ours = torch.autograd.grad((out * probe).sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad((expected * probe).sum(), leaves, allow_unused=True)
    for a, b, leaf in zip(ours, theirs, leaves, strict=True):
        a = torch.zeros_like(leaf) if a is None else a
        b = torch.zeros_like(leaf) if b is None else b
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
def test_weights_come_back_in_the_documented_layout(dtype):
    router = make().to(dtype)
    x = torch.randn(8, 4, dtype=dtype)
    relation = Relation.complete([0, 4, 8], [0, 3, 6])
    _, (edge_index, weights) = router(x, relation, return_attention_weights=True)
    torch.testing.assert_close(edge_index, relation.edge_index)
    dense = relation.to_dense(weights).transpose(1, 2)
    assert dense.shape == (2, 4, 3)
    for b in range(2):
        expected = documented_routing(router, x[4 * b : 4 * b + 4], torch.zeros(3, dtype=dtype))[1]
        torch.testing.assert_close(dense[b], expected)
    torch.testing.assert_close(dense.sum(-1), torch.ones(2, 4, dtype=dtype))


def test_named_slots_read_their_own_logits():
    router = make(5)
    x = torch.randn(6, 4, dtype=torch.double)
    importance = torch.randn(5, dtype=torch.double)
    relation = Relation.complete([0, 4, 6], [0, 2, 5])
    slots = torch.tensor([4, 1, 0, 2, 3])
    out = router(x, relation, slots=slots, importance=importance)
    expected = [
        documented_routing(router, x[:4], importance, slots=[4, 1])[0],
        documented_routing(router, x[4:], importance, slots=[0, 2, 3])[0],
    ]
    torch.testing.assert_close(out, torch.cat(expected), rtol=0, atol=1e-10)


def test_equal_importances_change_nothing_and_unequal_ones_do():
    router, x = make(), torch.randn(4, 4, dtype=torch.double)
    relation = Relation.complete([0, 4], [0, 3])
    plain = router(x, relation)
    equal = router(x, relation, importance=torch.full((3,), -2.0, dtype=torch.double))
    torch.testing.assert_close(equal, plain, rtol=0, atol=1e-12)
    unequal = router(x, relation, importance=torch.tensor([3.0, 0.0, -3.0]).double())
    assert (unequal - plain).abs().max() > 1e-3


def test_top_k_gives_ties_to_the_lowest_slot():
    router = make(4, top_k=2)
    torch.nn.init.zeros_(router.lin_logits.weight)
    torch.nn.init.zeros_(router.lin_logits.bias)
    x = torch.randn(5, 4, dtype=torch.double)
    relation = Relation.complete([0, 3, 5], [0, 4, 8])
    _, (edge_index, weights) = router(x, relation, return_attention_weights=True)
    assert (edge_index[1] % 4).unique().tolist() == [0, 1]
    torch.testing.assert_close(weights, torch.full((10,), 0.5, dtype=torch.double))


def test_a_token_normalises_over_the_edges_that_leave_it():
    router = make(3)
    x = torch.randn(2, 4, dtype=torch.double)
    edges = torch.tensor([[0, 0, 1], [0, 2, 1]])
    _, (_, weights) = router(x, edges, size=(2, 3), return_attention_weights=True)
    torch.testing.assert_close(weights[0] + weights[1], torch.ones((), dtype=torch.double))
    torch.testing.assert_close(weights[2], torch.ones((), dtype=torch.double))


@given(counts=COUNTS, seed=st.integers(0, 99))
def test_edge_index_equals_the_complete_relation(counts, seed):
    router = make(3, seed=seed).float()
    x, states = torch.randn(sum(counts), 4), torch.randn(3 * len(counts), 6)
    relation = Relation.complete(ptr(counts), ptr([3] * len(counts)))
    out = router(x, relation)
    torch.testing.assert_close(router((x, states), relation.edge_index), out)
    if sum(counts) > 0:
        shuffled = relation.edge_index[:, torch.randperm(relation.num_edges)]
        torch.testing.assert_close(router((x, states), shuffled), out)


def test_routed_sum_grows_with_the_tokens_and_the_mean_does_not():
    x = torch.randn(1, 4, dtype=torch.double)
    for reduce, factor in (("sum", 4.0), ("mean", 1.0)):
        router = make(routing_reduce=reduce)
        torch.nn.init.zeros_(router.lin_out.bias)
        one = router(x, Relation.complete([0, 1], [0, 3]))
        four = router(x.repeat(4, 1), Relation.complete([0, 4], [0, 3]))
        torch.testing.assert_close(four, factor * one)


def test_hooks_see_the_messages_and_change_nothing():
    router, x = make(top_k=2), torch.randn(4, 4, dtype=torch.double)
    relation = Relation.complete([0, 4], [0, 3])
    plain, seen = router(x, relation), []
    handle = router.register_message_forward_hook(
        lambda module, inputs, out: seen.append((inputs[0]["alpha"], out))
    )
    torch.testing.assert_close(router(x, relation), plain)
    # Every edge is seen, as explainers count them; those that were dropped have weight zero.
    assert seen[0][0].shape == (12,)
    assert int((seen[0][0] > 0).sum()) == 8
    assert seen[0][1].shape == (12, 4)
    handle.remove()
    router(x, relation)
    assert len(seen) == 1


BAD = [
    (lambda r, x: r(x[:, :3], Relation.complete([0, 5], [0, 3])), r"x must have shape \(nodes, 4"),
    (lambda r, x: r(x.long(), Relation.complete([0, 5], [0, 3])), "must be floating point"),
    (lambda r, x: r(x, Relation.complete([0, 4], [0, 3])), "relation goes from 4 tokens, but x"),
    (lambda r, x: r(x, Relation.complete([0, 5], [0, 2])), "does not give every example 3 states"),
    (lambda r, x: r(x, torch.zeros(2, 1).long()), "edge_index alone does not say how many states"),
    (lambda r, x: r(x, torch.tensor([[5], [0]]), size=(5, 3)), "names source 5"),
    (lambda r, x: r(x, torch.tensor([[0], [3]]), size=(5, 3)), "names target 3"),
    (lambda r, x: r(x, torch.tensor([[-1], [0]]), size=(5, 3)), "negative index -1"),
    (lambda r, x: r(x, torch.tensor([[0.0], [0.0]]), size=(5, 3)), "must hold integers"),
    (lambda r, x: r(x, torch.tensor([0, 1]), size=(5, 3)), r"must be a tensor of shape \(2, E\)"),
    (
        lambda r, x: r(x, Relation.complete([0, 5], [0, 3]), slots=torch.tensor([0, 1, 3])),
        "slots names slot 3, but there are 3",
    ),
    (
        lambda r, x: r(x, Relation.complete([0, 5], [0, 3]), slots=torch.tensor([0, -1, 2])),
        "slots names slot -1",
    ),
    (
        lambda r, x: r(x, Relation.complete([0, 5], [0, 3]), slots=torch.tensor([0, 1])),
        "slots must have one entry for each of the 3 states",
    ),
    (
        lambda r, x: r(x, Relation.complete([0, 5], [0, 3]), importance=torch.zeros(2)),
        r"importance must have shape \(3,\)",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(TokenToStateRouter(4, 6, 3, 2), torch.randn(5, 4))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 6, 3, 2), {}, "token_channels must be a positive integer or -1"),
        ((4, 0, 3, 2), {}, "state_channels, num_states and heads must be positive"),
        ((4, 6, 0, 2), {}, "must be positive"),
        ((4, 6, 3, 0), {}, "must be positive"),
        ((4, 6, 3, 2), {"top_k": 4}, re.escape("top_k must lie in 1..3")),
        ((4, 6, 3, 2), {"top_k": 0}, "top_k must lie in"),
        ((4, 6, 3, 2), {"routing_reduce": "max"}, "routing_reduce must be one of 'sum', 'mean'"),
    ],
)
def test_refuses_bad_options(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        TokenToStateRouter(*arguments, **options)
