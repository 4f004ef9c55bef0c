"""Pools over active states, and the read path from states back to tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsm_graph import Relation
from nsm_graph.nn import StatePool, TokenReadout

COUNTS = st.lists(st.integers(0, 4), min_size=1, max_size=4)


def ptr(counts):
    return [sum(counts[:i]) for i in range(len(counts) + 1)]


def batch_of(counts):
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


@given(counts=COUNTS, seed=st.integers(0, 99))
def test_mean_and_attention_pools_equal_their_formulas(counts, seed):
    torch.manual_seed(seed)
    x = torch.randn(sum(counts), 3, dtype=torch.double)
    mean = StatePool("mean")(x, batch_of(counts), len(counts))
    layer = StatePool("attention", state_channels=3).double()
    attention = layer(x, batch_of(counts), len(counts))
    assert mean.shape == attention.shape == (len(counts), 3)
    for b, part in enumerate(x.split(counts)):
        if len(part) == 0:
            assert torch.equal(mean[b], torch.zeros(3, dtype=torch.double))
            assert torch.equal(attention[b], torch.zeros(3, dtype=torch.double))
            continue
        torch.testing.assert_close(mean[b], part.mean(0), rtol=0, atol=1e-10)
        weight = (part @ layer.lin_gate.weight[0]).softmax(0)
        torch.testing.assert_close(attention[b], weight @ part, rtol=0, atol=1e-10)


def test_flatten_puts_states_into_their_slots_and_zeros_elsewhere():
    pool = StatePool("flatten", num_states=4)
    x = torch.randn(5, 3)
    out = pool(x, torch.tensor([0, 0, 0, 1, 1]), 2, slots=torch.tensor([0, 1, 3, 2, 0]))
    assert out.shape == (2, 12)
    expected = torch.zeros(2, 4, 3)
    expected[0, [0, 1, 3]] = x[:3]
    expected[1, [2, 0]] = x[3:]
    assert torch.equal(out, expected.flatten(1))
    whole = torch.randn(8, 3)
    full = pool(whole, torch.arange(2).repeat_interleave(4), 2)
    assert torch.equal(full, whole.view(2, 12))


def test_pools_of_a_single_example_need_no_batch():
    x = torch.randn(4, 3)
    torch.testing.assert_close(StatePool()(x), x.mean(0, keepdim=True))
    assert torch.equal(StatePool("flatten", num_states=4)(x), x.view(1, 12))


@pytest.mark.parametrize(("mode", "width"), [("mean", 3), ("attention", 3), ("flatten", 12)])
def test_pools_know_their_width(mode, width):
    pool = StatePool(mode, state_channels=3, num_states=4)
    assert pool.out_channels(3) == width
    assert pool(torch.randn(4, 3)).shape == (1, width)
    assert str(pool) == f"StatePool({mode!r})"


def test_pools_refuse_bad_input():
    pool, x = StatePool(), torch.randn(4, 3)
    with pytest.raises(ValueError, match="batch must have one entry per state, 4"):
        pool(x, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="x must be floating point"):
        pool(x.long())
    with pytest.raises(ValueError, match="x must have shape"):
        pool(x[0])
    with pytest.raises(ValueError, match="4 states are not 1 examples of 3 slots"):
        StatePool("flatten", num_states=3)(x)
    with pytest.raises(ValueError, match="mode must be one of 'mean', 'flatten', 'attention'"):
        StatePool("max")
    with pytest.raises(ValueError, match='"attention" needs state_channels'):
        StatePool("attention")
    with pytest.raises(ValueError, match='"flatten" needs num_states'):
        StatePool("flatten")


def documented_readout(layer, s, x):
    """One example: each token queries all its states."""
    key, value = (s @ layer.lin_state.weight.T + layer.lin_state.bias).chunk(2, 1)
    query = x @ layer.lin_query.weight.T + layer.lin_query.bias
    width = query.size(1) // layer.heads
    outs = []
    for h in range(layer.heads):
        part = slice(h * width, (h + 1) * width)
        outs.append((query[:, part] @ key[:, part].T / width**0.5).softmax(1) @ value[:, part])
    return torch.cat(outs, 1) @ layer.lin_out.weight.T + layer.lin_out.bias


@given(
    counts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=4),
    heads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 99),
)
def test_readout_equals_the_documented_formula_and_its_gradients(counts, heads, seed):
    torch.manual_seed(seed)
    layer = TokenReadout(4, 6, heads, out_channels=5).double()
    num_states, num_tokens = [n for n, _ in counts], [t for _, t in counts]
    s = torch.randn(sum(num_states), 6, dtype=torch.double, requires_grad=True)
    x = torch.randn(sum(num_tokens), 4, dtype=torch.double, requires_grad=True)
    out = layer((s, x), Relation.complete(ptr(num_states), ptr(num_tokens)))
    parts = zip(s.split(num_states), x.split(num_tokens), strict=True)
    expected = torch.cat([documented_readout(layer, a, b) for a, b in parts])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    probe = torch.randn_like(out)
    leaves = [s, x, *layer.parameters()]
    ours = torch.autograd.grad((out * probe).sum(), leaves)
    theirs = torch.autograd.grad((expected * probe).sum(), leaves, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


R = Relation.complete([0, 3], [0, 5])
BAD = [
    (lambda r, s, x: r((s[:, :3], x), R), r"x\[0\] \(states\) must have shape \(nodes, 6\)"),
    (lambda r, s, x: r((s, x[:, :3]), R), r"x\[1\] \(tokens\) must have shape \(nodes, 4\)"),
    (lambda r, s, x: r((s, x.long()), R), r"x\[1\] \(tokens\) must be floating point"),
    (lambda r, s, x: r((s[:2], x), R), "relation goes from 3 nodes, but their features have 2"),
    (lambda r, s, x: r((s, x), R.reverse()), "relation goes from 5 nodes"),
    (lambda r, s, x: r((s, x), torch.tensor([[3], [0]])), "outside the 3 source and 5 target"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_readout_refuses_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(TokenReadout(4, 6, 2), torch.randn(3, 6), torch.randn(5, 4))


def test_readout_refuses_bad_options():
    with pytest.raises(ValueError, match="heads must divide"):
        TokenReadout(4, 6, 4)
    with pytest.raises(ValueError, match="out_channels must be given where token_channels is"):
        TokenReadout(-1, 6, 2)
    with pytest.raises(ValueError, match="token_channels must be a positive integer or -1"):
        TokenReadout(0, 6, 2, out_channels=3)


def test_flatten_puts_states_where_batch_and_slots_say():
    pool, x = StatePool("flatten", num_states=2), torch.arange(4.0).view(4, 1)
    assert pool(x, torch.tensor([0, 1, 0, 1])).tolist() == [[0, 2], [1, 3]]
    slots = torch.tensor([1, 0, 0, 1])
    assert pool(x, torch.tensor([0, 0, 1, 1]), slots=slots).tolist() == [[1, 0], [2, 3]]


@pytest.mark.parametrize(
    ("batch", "slots", "message"),
    [
        ([0, 0, 0, 1], None, "hold the same slot"),
        ([0, 0, 1, 1], [0, 2, 1, 1], r"slots must lie in 0..1, but go from 0 to 2"),
        ([0, 0, 1, 1], [0, 1, -1, 1], r"slots must lie in 0..1, but go from -1 to 1"),
        ([0, 0, 1, 1], [0, 0, 1, 1], "hold the same slot"),
        ([0, 0, 1, 1], [0, 1], "slots must have one entry per state, 4"),
    ],
)
def test_flatten_refuses_places_that_do_not_fit(batch, slots, message):
    slots = None if slots is None else torch.tensor(slots)
    with pytest.raises(ValueError, match=message):
        StatePool("flatten", num_states=2)(torch.zeros(4, 1), torch.tensor(batch), slots=slots)


def test_many_examples_need_a_batch():
    with pytest.raises(ValueError, match="3 examples need batch="):
        StatePool()(torch.zeros(6, 2), None, 3)
