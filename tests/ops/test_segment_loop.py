"""The loop over segments as one operation: its values, and every gradient, against the oracle."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segment_loop_oracle import (
    RAGGED,
    SIZES,
    assert_equals_the_oracle,
    assert_same,
    gradients,
    keeps,
    make_case,
    sharing,
    sizes,
    talking,
)

from nsm_graph.ops.segment_loop import LoopSegments, segment_loop


@keeps
@sharing
@talking
@sizes
def test_equals_the_oracle_with_every_gradient(num_states, channels, heads, talks, is_shared, keep):
    options = {"talks": talks, "is_shared": is_shared}
    case = make_case(num_states, channels, heads, **options)
    assert_equals_the_oracle(case, 1e-10, keep=keep)
    assert_equals_the_oracle(case.to(torch.float32), 1e-5, keep=keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_equals_the_oracle(dtype):
    for talks in (True, False):
        case = make_case(talks=talks, is_shared=talks, dtype=dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-10
        assert_equals_the_oracle(case, tolerance, backend="reference")


@given(
    counts=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4),
    num_states=st.integers(1, 9),
    width=st.integers(1, 9),
    heads=st.integers(1, 3),
    idle=st.integers(0, 2),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 999),
)
def test_any_batch_equals_the_oracle(counts, num_states, width, heads, idle, flags, seed):
    talks, is_shared, keep = flags
    case = make_case(
        num_states, width * heads, heads, counts=sorted(counts, key=len, reverse=True),
        talks=talks, is_shared=is_shared, idle=idle, seed=seed,
    )  # fmt: skip
    assert_equals_the_oracle(case, 1e-10, keep=keep)


def test_more_examples_than_a_thread_takes_at_a_time_and_a_long_segment():
    counts = [[2, 70]] + [[1, 2]] * 15 + [[3]] * 5
    assert_equals_the_oracle(make_case(counts=counts), 1e-10)
    assert_equals_the_oracle(make_case(counts=counts), 1e-10, keep=False)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@keeps
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("idle", [0, 1, 3])
@pytest.mark.parametrize(
    "counts",
    [RAGGED, [[2, 70]] + [[1, 2]] * 15 + [[3]] * 5, [[3]] * 4, [[1] * 9]],
    ids=["ragged", "more than a chunk", "one step", "one example"],
)
def test_final_states_are_the_last_ones_of_each_example(counts, idle, dtype, keep, backend):
    case = make_case(counts=counts, idle=idle, dtype=dtype)
    after, final = case.run(keep=keep, backend=backend)
    num_states, groups = case.num_states, iter(after.split(case.num_states))
    wanted = list(case.rows["states"].split(num_states))  # whoever never reads keeps these
    for t in range(max(map(len, counts))):
        for b, row in enumerate(counts):
            if t < len(row):
                wanted[b] = next(groups)
    assert torch.equal(final, torch.cat(wanted))
    assert final.untyped_storage().data_ptr() not in (
        after.untyped_storage().data_ptr(), case.rows["states"].untyped_storage().data_ptr(),
    )  # fmt: skip


@keeps
def test_examples_that_never_read_reach_no_other(keep):
    case = make_case(idle=2)
    num_idle = 2 * case.num_states
    case.rows["states"].data[-num_idle:] = math.nan
    after, final = case.run(keep=keep)
    assert after.isfinite().all() and final[:-num_idle].isfinite().all()
    assert final[-num_idle:].isnan().all()
    found = gradients([after], case)
    assert (found["states"][-num_idle:] == 0).all()
    assert all(x.isfinite().all() for x in found.values())
    # Their final states are those they had.
    grads = torch.autograd.grad(case.run(keep=keep)[1].sum(), list(case.given.values()))
    assert (grads[0][-num_idle:] == 1).all()
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_example_does_not_reach_its_neighbours(bad):
    case = make_case()
    expected, last = case.run()
    num_states, broken = case.num_states, 1
    mine = slice(broken * num_states, (broken + 1) * num_states)
    case.rows["states"].data[mine] = bad
    out, final = case.run()
    active = case.segments.num_active.tolist()
    ranks = torch.cat([torch.arange(count) for count in active]).repeat_interleave(num_states)
    assert torch.equal(out[ranks != broken], expected[ranks != broken])
    assert out[ranks == broken].isnan().all()
    assert final[mine].isnan().all()
    assert torch.equal(final[: mine.start], last[: mine.start])
    assert torch.equal(final[mine.stop :], last[mine.stop :])


def test_keeping_and_making_again_give_the_same_bits():
    case = make_case(33, 20, 1, dtype=torch.float32)
    kept, again = case.run(keep=True), case.run(keep=False)
    assert_same(kept, again)
    assert_same(gradients(kept, case), gradients(again, case))


def test_the_kernel_is_for_float32_and_the_reference_for_the_rest(monkeypatch):
    calls = []
    from nsm_graph.ops.segment_loop import fused, reference

    for module in (fused, reference):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "segment_loop", lambda *given, name=name: calls.append(name))
    make_case(dtype=torch.float32).run(backend=None)
    make_case(dtype=torch.float64).run(backend=None)
    make_case(dtype=torch.float64).run()
    assert calls == ["fused", "reference", "fused"]


# Nothing to read ###################################################################


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_to_read(backend):
    case = make_case(counts=[], idle=2)
    after, final = case.run(backend=backend)
    assert after.shape == (0, 6)
    assert torch.equal(final, case.rows["states"])
    found = gradients([after], case)
    assert all((x == 0).all() for x in found.values())
    after, final = case.run(backend=backend)
    (slope,) = torch.autograd.grad((2 * final).sum(), case.rows["states"], retain_graph=True)
    assert (slope == 2).all()
    found = gradients([final], case)
    assert all((x == 0).all() for name, x in found.items() if name != "states")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_step_that_nobody_reads(backend):
    case = make_case(counts=[[2, 1], [3]])
    segments = case.segments
    longer = LoopSegments(segments.token_ptr, torch.cat([segments.num_active, torch.tensor([0])]))
    results = segment_loop(
        **case.rows, segments=longer, weights=case.weights, heads=2, backend=backend
    )
    torch.testing.assert_close(results, case.run(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        gradients(results, case), gradients(case.run(), case), rtol=1e-9, atol=1e-10
    )


def test_loops_of_other_sizes_follow_each_other():
    for num_states, channels, heads in (*SIZES, *SIZES[::-1]):
        case = make_case(num_states, channels, heads, dtype=torch.float32)
        assert_equals_the_oracle(case, 1e-5)
