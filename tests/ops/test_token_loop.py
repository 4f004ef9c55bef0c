"""From tokens to states in one operation, against the plain loops of its two halves."""

import pytest
import torch
from hoist_oracle import assert_close, assert_same
from segment_loop_oracle import CROWD, asks, keeps, sharing, talking
from token_loop_oracle import Case, gradients


def assert_equals_the_oracle(options, asked=(0, 1), keep=True, backend="cpu"):
    exact = Case(**options)
    expected = exact.oracle()
    wanted = gradients(exact, [expected[i] for i in asked])
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        case = Case(**options, dtype=dtype)
        results = case.run(keep=keep, backend=backend)
        assert not results[2].requires_grad
        for name, a, b in zip(("after", "final", "mass"), results, expected, strict=True):
            assert_close({name: a}, {name: b.detach()}, tolerance)
        assert_close(gradients(case, [results[i] for i in asked]), wanted, tolerance)


@keeps
@sharing
@talking
@asks
def test_equals_the_oracle_with_every_gradient(asked, talks, is_shared, keep):
    assert_equals_the_oracle({"talks": talks, "is_shared": is_shared}, asked, keep)


@sharing
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 17, 14, 2), (17, 20, 33, 3)])
def test_other_sizes_and_the_reference(sizes, is_shared):
    names = ("num_states", "width", "channels", "heads")
    options = dict(zip(names, sizes, strict=True)) | {"is_shared": is_shared, "gaps": (0,)}
    options["talks"] = sizes[2] > 1  # the norm of one channel is a constant
    for keep, backend in ((True, "cpu"), (False, "cpu"), (True, "reference")):
        assert_equals_the_oracle(options, keep=keep, backend=backend)


@keeps
@sharing
@talking
@pytest.mark.parametrize(("kept", "talk_heads"), [(3, 5), (4, 1), (0, 4)])
def test_kept_channels(kept, talk_heads, talks, is_shared, keep):
    options = {"talks": talks, "is_shared": is_shared, "kept": kept, "talk_heads": talk_heads}
    options["channels"] = 8  # the norm of two or three is steep
    assert_equals_the_oracle(options, keep=keep)
    assert_equals_the_oracle(options, backend="reference")


@keeps
def test_any_number_of_threads_and_whatever_is_kept(keep, num_threads):
    case = Case(5, 7, 14, 2, counts=CROWD, dtype=torch.float32)
    wanted = case.run()
    grads = gradients(case, wanted[:2])
    for count in (1, 2, 3, 100):
        num_threads(count)
        results = case.run(keep=keep)
        assert_same(results, wanted)
        found = gradients(case, results[:2])
        for name in ("states", "tokens.x"):  # what belongs to an example
            assert torch.equal(found[name], grads[name]), name
        assert_close(found, grads, 1e-5)


@keeps
@sharing
def test_no_result_depends_on_memory_that_was_never_written(poisoned_memory, is_shared, keep):
    for gaps in ((0,), (0, 2, 1)):
        case = Case(5, 7, 14, 2, is_shared=is_shared, gaps=gaps, dtype=torch.float32)
        results = case.run(keep=keep)
        assert all(x.isfinite().all() for x in results)
        assert all(x.isfinite().all() for x in gradients(case, results[:2]).values())


@sharing
def test_second_derivatives(is_shared):
    case = Case(2, 3, 4, 2, counts=[[2, 1], [1]], is_shared=is_shared)
    given = list(case.given.values())

    def second(results):
        loss = sum(x.square().sum() for x in results[:2])
        first = torch.autograd.grad(loss, given, create_graph=True, allow_unused=True)
        return torch.autograd.grad(
            sum(x.square().sum() for x in first if x is not None), given, allow_unused=True
        )

    for a, b in zip(second(case.run()), second(case.oracle()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@keeps
def test_a_second_backward_through_the_same_graph(keep):
    case = Case()
    results = case.run(keep=keep)[:2]
    first = gradients(case, results, retain_graph=True)
    gradients(case, case.run()[:2])
    assert_same(gradients(case, results), first)


def test_tokens_that_two_groups_share():
    case = Case()
    case.tokens.first[1] = case.tokens.first[0]
    with pytest.raises(ValueError, match="a token may belong to one group"):
        case.run()
