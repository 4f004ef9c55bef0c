"""The causal convolution of width two, against plain loops."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm_graph import Partition
from nsm_graph.nn import TokenConvolution

COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=4)


def make(seed=0, dtype=torch.double):
    torch.manual_seed(seed)
    convolution = TokenConvolution(3).to(dtype)
    with torch.no_grad():  # it starts closed
        for p in convolution.parameters():
            p.normal_()
    return convolution


def layout(counts):
    return Partition.from_ptr(torch.tensor([0, *counts]).cumsum(0))


def draw(counts, seed=1, dtype=torch.double):
    generator = torch.Generator().manual_seed(seed)
    sizes = (sum(counts), len(counts))
    return [
        torch.randn(n, 3, generator=generator, dtype=torch.double).to(dtype).requires_grad_()
        for n in sizes
    ]


def loops(x, counts, tail):
    """What stands before each token, and what is left for the next call."""
    before, after, first = [], [], 0
    for b, count in enumerate(counts):
        last = torch.zeros_like(x[0]) if tail is None else tail[b]
        for i in range(first, first + count):
            before.append(last)
            last = x[i]
        after.append(last)
        first += count
    return torch.stack(before), torch.stack(after)


@given(counts=COUNTS.filter(lambda counts: sum(counts) > 0), has_tail=st.booleans())
def test_equals_plain_loops_with_every_gradient(counts, has_tail):
    convolution = make()
    x, tail = draw(counts)
    given_tail = tail if has_tail else None
    out = convolution(x, layout(counts), given_tail)
    before, after = loops(x, counts, given_tail)
    weight, bias = convolution.lin.weight, convolution.lin.bias
    expected = x + before @ weight[:, :3].T + x @ weight[:, 3:].T + bias
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(TokenConvolution.previous(x, layout(counts), given_tail), before)
    assert torch.equal(TokenConvolution.next_tail(x, layout(counts), given_tail), after)
    leaves = [x, weight, bias] + ([tail] if has_tail else [])
    direction = torch.cos(torch.arange(out.numel()) + 0.3).view_as(out)
    actual = torch.autograd.grad((out * direction).sum(), leaves)
    wanted = torch.autograd.grad((expected * direction).sum(), leaves)
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(pieces=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=4))
def test_pieces_with_their_tail_equal_the_whole_bit_for_bit(pieces):
    # What stands before a token is a copy: no piece can differ.
    lengths = [sum(counts[b] for counts in pieces) for b in range(2)]
    x, tail = draw(lengths, dtype=torch.float)
    xs = x.split(lengths)
    whole = TokenConvolution.previous(x, layout(lengths), tail)
    last = TokenConvolution.next_tail(x, layout(lengths), tail)
    out, read = [[], []], [0, 0]
    for counts in pieces:
        part = torch.cat([xs[b][read[b] : read[b] + counts[b]] for b in range(2)])
        before = TokenConvolution.previous(part, layout(counts), tail)
        tail = TokenConvolution.next_tail(part, layout(counts), tail)
        for b, rows in enumerate(before.split(counts)):
            out[b].append(rows)
        read = [read[b] + counts[b] for b in range(2)]
    assert torch.equal(torch.cat(out[0] + out[1]), whole)
    assert torch.equal(tail, last)


def test_a_token_sees_itself_and_the_one_before_only():
    convolution, (x, tail) = make(), draw([4, 3])
    out = convolution(x, layout([4, 3]), tail)
    for i in range(7):
        grads = torch.autograd.grad(out[i].sum(), [x, tail], retain_graph=True)
        seen, seen_tails = (grad.abs().sum(1) > 0 for grad in grads)
        before = [] if i in (0, 4) else [i - 1]
        assert seen.nonzero().flatten().tolist() == [*before, i]
        assert seen_tails.nonzero().flatten().tolist() == {0: [0], 4: [1]}.get(i, [])


def test_no_tokens_leave_the_tail():
    convolution, (x, tail) = make(), draw([0, 0])
    assert convolution(x, layout([0, 0]), tail).shape == (0, 3)
    assert torch.equal(TokenConvolution.next_tail(x, layout([0, 0]), tail), tail)
    assert (TokenConvolution.next_tail(x, layout([0, 0])) == 0).all()


def test_the_tail_takes_the_dtype_of_the_tokens():
    x, tail = draw([2, 0], dtype=torch.float)
    assert TokenConvolution.next_tail(x, layout([2, 0]), tail.double()).dtype == torch.float
    assert TokenConvolution.previous(x, layout([2, 0]), tail.double()).dtype == torch.float


def test_it_starts_closed_and_learns():
    convolution = TokenConvolution(3)
    x = torch.randn(4, 3)
    assert torch.equal(convolution(x, layout([4])), x)
    convolution(x, layout([4])).square().sum().backward()
    assert (convolution.lin.weight.grad.abs() > 0).all()
    with torch.no_grad():
        convolution.lin.weight.fill_(1.0)
    convolution.reset_parameters()
    assert torch.equal(convolution(x, layout([4])), x)


def test_a_state_dict_makes_the_round_trip():
    convolution, twin = make(0), make(1)
    x, tail = draw([3, 2])
    assert not torch.equal(convolution(x, layout([3, 2])), twin(x, layout([3, 2])))
    twin.load_state_dict(convolution.state_dict())
    for other in (twin, copy.deepcopy(convolution)):
        assert torch.equal(convolution(x, layout([3, 2]), tail), other(x, layout([3, 2]), tail))
    assert "TokenConvolution(" in str(convolution)


@pytest.mark.parametrize(
    ("x", "tail", "message"),
    [
        (torch.zeros(5, 4), None, r"x must have shape \(nodes, 3\), but got \(5, 4\)"),
        (torch.zeros(6, 3), None, "5.*6"),
        (torch.zeros(5, 3), torch.zeros(1, 3), r"tail .*\(2, 3\).*\(1, 3\)"),
        (torch.zeros(5, 3), torch.zeros(2, 4), r"tail .*\(2, 3\).*\(2, 4\)"),
    ],
    ids=["channels", "rows", "examples", "tail channels"],
)
def test_shapes_that_do_not_fit_are_refused(x, tail, message):
    with pytest.raises(ValueError, match=message):
        make(dtype=torch.float)(x, layout([3, 2]), tail)
