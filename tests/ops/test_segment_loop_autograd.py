"""The loop over segments: graphs that are kept, changed, thrown away, and memory."""

import math

import pytest
import torch
from segment_loop_oracle import (
    ROWS,
    SIZES,
    asks,
    assert_same,
    gradients,
    gradients_of,
    keeps,
    make_case,
    sharing,
)

from nsm_graph.bench.record import peak_mib
from nsm_graph.ops.segment_loop import LoopWeights, fused

# Graphs ############################################################################


@keeps
@asks
def test_a_second_backward_through_the_same_graph(asked, keep):
    case = make_case()
    results = case.run(keep=keep)
    out, given = [results[i] for i in asked], list(case.given.values())
    first = gradients_of(out, *given, retain_graph=True)
    case.run()[0].sum().backward()  # may take what the first one gave back
    second = gradients_of(out, *given, retain_graph=True)
    third = gradients_of(out, *given)
    assert_same(second, first)
    assert_same(third, first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients_of(out, *given)


def test_one_result_after_the_other_adds_up_to_both():
    case = make_case()
    given = list(case.given.values())
    after, final = case.run()
    both = torch.autograd.grad(after.sum() + final.sum(), given, retain_graph=True)
    apart = [torch.autograd.grad(x.sum(), given, retain_graph=True) for x in (after, final)]
    for whole, one, other in zip(both, *apart, strict=True):
        torch.testing.assert_close(one + other, whole, rtol=1e-9, atol=1e-10)


@keeps
def test_forwards_in_flight_share_no_memory(keep):
    cases = [make_case(seed=seed) for seed in range(3)]
    wanted = [gradients(case.run(keep=keep), case) for case in cases]
    outs = [case.run(keep=keep) for case in cases]
    for i in (1, 0, 2):
        assert_same(gradients(outs[i], cases[i]), wanted[i])


def test_results_stay_what_they_were():
    case, other = make_case(dtype=torch.float32), make_case(dtype=torch.float32, seed=1)
    out = case.run()
    found = gradients(out, case)
    before = [x.clone() for x in (*out, *found.values())]
    gradients(other.run(), other)
    assert_same((*out, *found.values()), before)


@asks
@pytest.mark.parametrize("name", [*ROWS, *LoopWeights._fields])
def test_an_input_changed_before_backward_is_noticed(name, asked):
    case = make_case(is_shared=False)
    case = case.but(**{n: x * 1 for n, x in case.given.items()})
    results = case.run()
    case.given[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(results[i].sum() for i in asked).backward()


def test_states_changed_before_backward_are_noticed():
    for asked in (0, 1):
        results = make_case().run()
        loss = results[asked].square().sum()
        with torch.no_grad():
            results[0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@keeps
def test_final_states_may_be_changed(keep):
    # Backward reads the states after every step, not these.
    case = make_case()
    given = list(case.given.values())
    wanted = torch.autograd.grad(2 * case.run(keep=keep)[1].sum(), given)
    final = case.run(keep=keep)[1]
    final.mul_(2)
    assert_same(torch.autograd.grad(final.sum(), given), wanted)


@sharing
def test_views_in_any_layout(is_shared):
    case = make_case(dtype=torch.float32, is_shared=is_shared)
    expected = case.run()
    wanted = gradients(expected, case)
    bases, views = {}, {}
    for name, x in case.given.items():
        if x.dim() == 2:  # columns of a wider matrix that stands on its side
            base = torch.full((2 * x.size(1), x.size(0)), math.nan)
            base[::2] = x.detach().T
            bases[name] = base.requires_grad_()
            views[name] = base[::2].T
        else:
            bases[name] = torch.stack([x.detach(), x.detach()], 1).requires_grad_()
            views[name] = bases[name][:, 1]
    case = case.but(**views)
    results = case.run()
    assert_same(results, expected)
    found = gradients_of(results, *views.values())
    for name, grad in zip(views, found, strict=True):
        assert torch.equal(grad, wanted[name]), name
    # Directions that are no tensors of their own size in memory.
    for out in case.run():
        turned = torch.ones(out.shape[::-1]).T
        grads = [
            torch.autograd.grad(out, list(views.values()), direction, retain_graph=True)
            for direction in (turned, torch.ones(()).expand(out.shape), torch.ones(out.shape))
        ]
        assert_same(grads[1], grads[0])
        assert_same(grads[2], grads[0])


# Memory ############################################################################


def test_without_gradients_nothing_is_kept():
    case = make_case(32, 64, 2, counts=[[8] * 100] * 4, dtype=torch.float32)
    num_bytes = 4 * case.rows["routed"].numel()

    def run():
        with torch.no_grad():
            case.run()

    run()
    peak = peak_mib(run)
    if peak is None:
        pytest.skip("this system does not tell")
    # The result itself, and what one step makes; a forward that keeps needs 15 times the result.
    assert peak * 2**20 < 4 * num_bytes


def test_a_graph_that_is_thrown_away_frees_what_it_kept():
    case = make_case(32, 64, 2, counts=[[8] * 100] * 4, dtype=torch.float32)
    num_bytes = 4 * case.rows["routed"].numel()
    case.run()[0].sum().backward()

    def run():
        for _ in range(8):
            case.run()

    peak = peak_mib(run)
    if peak is None:
        pytest.skip("this system does not tell")
    assert peak * 2**20 < 3 * 20 * num_bytes


@keeps
def test_no_result_depends_on_memory_that_was_never_written(poisoned_memory, keep):
    for talks in (True, False):
        for num_states, channels, heads in SIZES:
            case = make_case(num_states, channels, heads, talks=talks, dtype=torch.float32)
            for asked in ((0,), (1,), (0, 1)):
                fused._spare.clear()  # what the last backward left would do
                results = case.run(keep=keep)
                assert all(x.isfinite().all() for x in results)
                found = gradients([results[i] for i in asked], case)
                assert all(x.isfinite().all() for x in found.values())
