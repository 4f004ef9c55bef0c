"""What is hoisted as one operation: its values, and every gradient, against plain loops."""

import math

import pytest
import torch
from hoist_oracle import (
    LONG,
    RAGGED,
    Case,
    assert_equals_the_oracle,
    assert_same,
    gradients,
    loss_of,
    make_case,
    sharing,
    sizes,
)
from hypothesis import given
from hypothesis import strategies as st

from nsm_graph.ops.hoist import TokenGroups, hoist

backends = pytest.mark.parametrize("backend", ["cpu", "reference"])


@sharing
@sizes
def test_equals_the_oracle_with_every_gradient(num_states, width, channels, heads, is_shared):
    case = make_case(num_states, width, channels, heads, is_shared=is_shared)
    assert_equals_the_oracle(case, 1e-10)
    assert_equals_the_oracle(case.to(torch.float32), 1e-5)


@sharing
@sizes
def test_the_reference_equals_the_oracle(num_states, width, channels, heads, is_shared):
    case = make_case(num_states, width, channels, heads, is_shared=is_shared)
    assert_equals_the_oracle(case, 1e-10, backend="reference")
    assert_equals_the_oracle(case.to(torch.float32), 1e-5, backend="reference")


@given(
    counts=st.lists(st.integers(1, 8) | st.integers(1, 70), min_size=1, max_size=5),
    gaps=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    num_states=st.integers(1, 6) | st.integers(1, 33),
    width=st.integers(1, 40),
    channels=st.integers(1, 40),
    heads=st.integers(1, 3),
    is_shared=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_batch_equals_the_oracle(
    counts, gaps, num_states, width, channels, heads, is_shared, seed
):
    case = make_case(
        num_states, width, channels, heads, counts=counts, gaps=gaps, is_shared=is_shared, seed=seed
    )
    assert_equals_the_oracle(case, 1e-10)
    assert_equals_the_oracle(case.to(torch.float32), 1e-5)


@pytest.mark.parametrize("counts", [LONG, LONG[::-1], [1] * 300, [128, 128], [129], [64] * 5])
def test_more_groups_than_a_block_holds_and_groups_longer_than_a_block(counts):
    case = make_case(3, 5, 4, 2, counts=counts)
    assert_equals_the_oracle(case, 1e-10)
    assert_equals_the_oracle(case.to(torch.float32), 1e-5)


@backends
def test_where_values_are_keys_they_are_the_same_tensor(backend):
    out = make_case(is_shared=True).run(backend=backend)
    assert out.value is out.key
    assert make_case().run(backend=backend).value is not out.key


@backends
def test_weights_of_a_token_add_up_to_one_and_are_constants(backend):
    case = make_case(7)
    out = case.run(backend=backend)
    assert not out.weights.requires_grad
    end = 0
    for count in case.counts:
        own = out.weights[end : end + 7 * count].view(7, count)
        torch.testing.assert_close(own.sum(0), own.new_ones(count))
        end += 7 * count
    assert end == len(out.weights)


@pytest.mark.parametrize("size", [1.0, 1e3, 1e30])
def test_logits_far_apart(size):
    case = make_case(5, 6, 4, 2, dtype=torch.float32)
    case.weights.logits.data.mul_(size)
    out = case.run()
    assert all(x.isfinite().all() for x in out)
    assert all(x.isfinite().all() for x in gradients(out, case).values())


# Groups ############################################################################


def places_of(case, group, num_states):
    """The rows of a group among keys, among routed sums, among weights, and among tokens."""
    start, count = sum(case.counts[:group]), case.counts[group]
    first = case.first[group]
    return (
        slice(start, start + count),
        slice(group * num_states, (group + 1) * num_states),
        slice(start * num_states, (start + count) * num_states),
        slice(first, first + count),
    )


def parts_of(case, out, num_states, group):
    """Everything that belongs to one group, the gradient of its tokens included."""
    tokens, states, edges, mine = places_of(case, group, num_states)
    (grad,) = torch.autograd.grad(out[0].square().sum() + out[2].square().sum(), case.x)
    return [out.key[tokens], out.value[tokens], out.routed[states], out.weights[edges], grad[mine]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_groups_in_another_order_give_the_same_rows(dtype):
    case = make_case(5, 17, 9, 2, counts=LONG, dtype=dtype)
    order = torch.randperm(len(LONG)).tolist()
    other = Case(
        case.x, case.weights, [case.first[g] for g in order], [LONG[g] for g in order], case.heads
    )
    wanted, found = case.run(), other.run()
    for place, group in enumerate(order):
        assert_same(parts_of(other, other.run(), 5, place), parts_of(case, case.run(), 5, group))
    assert found.key.shape == wanted.key.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_group_alone_gives_the_same_rows(dtype):
    case = make_case(5, 17, 9, 2, counts=LONG, dtype=dtype)
    for group in range(len(LONG)):
        alone = Case(case.x, case.weights, [case.first[group]], [LONG[group]], case.heads)
        assert_same(parts_of(alone, alone.run(), 5, 0), parts_of(case, case.run(), 5, group))


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_group_does_not_reach_its_neighbours(bad, backend):
    case = make_case(counts=RAGGED)
    broken = 1
    expected = [parts_of(case, case.run(backend=backend), 5, group) for group in range(5)]
    case.x.data[case.first[broken] + 1] = bad
    for group in range(5):
        found = parts_of(case, case.run(backend=backend), 5, group)
        if group != broken:
            assert_same(found, expected[group])
            continue
        key, value, routed, weights, grad = found
        assert not key[1].isfinite().any() and not value[1].isfinite().any()
        assert not routed.isfinite().any()
        assert not weights.view(5, -1)[:, 1].isfinite().any()
        # Its other tokens have keys of their own.
        assert_same((key[0], value[0]), [part[0] for part in expected[group][:2]])
        assert not grad.isfinite().any()


@backends
def test_tokens_of_no_group_have_no_part(backend):
    case = make_case(gaps=(3, 0, 1), dtype=torch.float32)
    assert not case.is_grouped.all()
    expected = case.run(backend=backend)
    wanted = gradients(expected, case)
    case.x.data[~case.is_grouped] = math.nan
    out = case.run(backend=backend)
    assert_same(out, expected)
    found = gradients(out, case)
    assert (found["x"][~case.is_grouped] == 0).all()
    assert_same(found, wanted)


@backends
@sharing
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_groups(num_tokens, is_shared, backend):
    case = make_case(counts=[], gaps=(0, num_tokens), is_shared=is_shared)
    assert case.x.shape == (num_tokens, 6)
    out = case.run(backend=backend)
    assert [tuple(x.shape) for x in out] == [(0, 4), (0, 4), (0, 4), (0,)]
    assert all((x == 0).all() for x in gradients(out, case).values())


# Which backend #####################################################################


def test_the_kernel_is_for_float32_and_the_reference_for_the_rest(monkeypatch):
    calls = []
    from nsm_graph.ops.hoist import fused, reference

    for module in (fused, reference):
        name, own = module.__name__.rpartition(".")[2], module.hoist
        monkeypatch.setattr(
            module, "hoist", lambda *given, name=name, own=own: calls.append(name) or own(*given)
        )
    make_case(dtype=torch.float32).run(backend=None)
    make_case(dtype=torch.float64).run(backend=None)
    make_case(dtype=torch.float64).run()
    make_case(dtype=torch.bfloat16).run(backend=None)
    assert calls == ["fused", "reference", "fused", "reference"]


def test_groups_of_other_sizes_follow_each_other():
    for counts in ([3], LONG, [1, 1], RAGGED, [200], [2, 5]):
        case = make_case(counts=counts, dtype=torch.float32)
        assert_equals_the_oracle(case, 1e-5)


def test_a_view_of_the_pointers_serves_as_well():
    case = make_case()
    first, ptr = (torch.stack([x, x], 1)[:, 0] for x in case.groups)
    assert not first.is_contiguous()
    out = hoist(case.x, TokenGroups(first, ptr), case.weights, 2, backend="cpu")
    assert_same(out, case.run())
    assert torch.equal(loss_of(out), loss_of(case.run()))
