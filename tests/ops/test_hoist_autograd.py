"""What is hoisted: some inputs, some results, second order, kept graphs, layouts, memory."""

import math

import pytest
import torch
from hoist_oracle import (
    LONG,
    RESULTS,
    SIZES,
    Case,
    assert_equals_the_oracle,
    assert_same,
    gradients,
    loss_of,
    make_case,
    oracle,
    sharing,
)
from torch.autograd import gradcheck, gradgradcheck

from nsm_graph.ops.hoist import HoistWeights

#: What a loss may read: one result alone, or several.
ASKED = [("key",), ("value",), ("routed",), ("key", "routed"), RESULTS]
asks = pytest.mark.parametrize("asked", ASKED, ids="-".join)

# Which gradients ###################################################################


@sharing
@asks
def test_a_loss_on_some_results(asked, is_shared):
    case = make_case(is_shared=is_shared)
    assert_equals_the_oracle(case, 1e-10, asked=asked)
    assert_equals_the_oracle(case, 1e-10, asked=asked, backend="reference")
    assert_equals_the_oracle(case.to(torch.float32), 1e-5, asked=asked)


@sharing
@asks
def test_only_some_inputs_want_gradients(asked, is_shared):
    full = make_case(dtype=torch.float32, is_shared=is_shared)
    wanted = gradients(full.run(), full, asked)
    for name in full.given:
        case = full.detached(name)
        out = case.run()
        (found,) = torch.autograd.grad(loss_of(out, asked), [case.given[name]], allow_unused=True)
        found = torch.zeros_like(wanted[name]) if found is None else found
        assert torch.equal(found, wanted[name]), name


def test_nobody_wants_gradients():
    case = make_case(dtype=torch.float32)
    expected = case.run()
    assert [x.requires_grad for x in expected] == [True, True, True, False]
    out = case.detached().run()
    assert not any(x.requires_grad for x in out)
    assert_same(out, expected)
    with torch.no_grad():
        out = case.run()
    assert not any(x.requires_grad for x in out)
    assert_same(out, expected)


# Of second order ###################################################################


@sharing
@asks
def test_first_and_second_derivatives(asked, is_shared):
    case = make_case(2, 3, 2, 2, counts=[2, 1, 2], is_shared=is_shared)
    names = list(case.given)

    def function(*tensors):
        out = case.but(**dict(zip(names, tensors, strict=True))).run()
        return tuple(getattr(out, name) for name in asked)

    assert gradcheck(function, list(case.given.values()))
    assert gradgradcheck(function, list(case.given.values()))


@sharing
def test_second_derivatives_of_inputs_that_hang_together(is_shared):
    # Projections made of tokens, a loss that is not linear.
    case = make_case(2, 3, 2, 2, counts=[2, 1, 2], is_shared=is_shared)

    def entangled(run):
        changed = case.but(
            key=case.weights.key + case.x.mean(),
            logits=case.weights.logits * case.weights.out.square().mean(),
        )
        given = list(case.given.values())
        out = run(changed)
        first = torch.autograd.grad(
            sum(x.square().sum() for x in out[:3]), given, create_graph=True
        )
        return torch.autograd.grad(sum(x.square().sum() for x in first), given)

    reference = entangled(lambda changed: changed.run(backend="reference"))
    for actual, expected, wanted in zip(
        entangled(Case.run), reference, entangled(oracle), strict=True
    ):
        torch.testing.assert_close(expected, wanted, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


# Graphs ############################################################################


@asks
def test_a_second_backward_through_the_same_graph(asked):
    case = make_case(counts=LONG)
    out = case.run()
    first = gradients(out, case, asked, retain_graph=True)
    gradients(case.run(), case)
    assert_same(gradients(out, case, asked, retain_graph=True), first)
    assert_same(gradients(out, case, asked), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(out, case, asked)


def test_one_result_after_the_other_adds_up_to_all():
    case = make_case()
    out = case.run()
    whole = gradients(out, case, retain_graph=True)
    parts = [gradients(out, case, (name,), retain_graph=True) for name in RESULTS]
    for name, wanted in whole.items():
        total = sum(part[name] for part in parts)
        torch.testing.assert_close(total, wanted, rtol=1e-9, atol=1e-10)


def test_forwards_in_flight_share_no_memory():
    cases = [make_case(seed=seed) for seed in range(3)]
    wanted = [gradients(case.run(), case) for case in cases]
    outs = [case.run() for case in cases]
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
@pytest.mark.parametrize("name", ["x", *HoistWeights._fields])
def test_an_input_changed_before_backward_is_noticed(name, asked):
    case = make_case()
    case = case.but(**{n: x * 1 for n, x in case.given.items()})
    out = case.run()
    case.given[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(out, asked).backward()


# Layouts ###########################################################################


@sharing
def test_views_in_any_layout(is_shared):
    case = make_case(dtype=torch.float32, is_shared=is_shared)
    expected = case.run()
    wanted = gradients(expected, case)
    views = {}
    for name, x in case.given.items():
        if x.dim() == 2:  # columns of a wider matrix that stands on its side
            base = torch.full((2 * x.size(1), x.size(0)), math.nan)
            base[::2] = x.detach().T
            views[name] = base.requires_grad_()[::2].T
        else:
            views[name] = torch.stack([x.detach(), x.detach()], 1).requires_grad_()[:, 1]
    case = case.but(**views)
    out = case.run()
    assert_same(out, expected)
    assert_same(gradients(out, case), wanted)
    # Directions that are no tensors of their own size in memory.
    for name in RESULTS:
        rows = getattr(case.run(), name)
        turned = torch.ones(rows.shape[::-1]).T
        grads = [
            torch.autograd.grad(
                rows, list(views.values()), direction, retain_graph=True, allow_unused=True
            )
            for direction in (turned, torch.ones(()).expand(rows.shape), torch.ones(rows.shape))
        ]
        for a, b, c in zip(*grads, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


def test_weights_may_be_one_tensor():
    # As where keys and routed sums are projected alike.
    case = make_case(4, 6, 4, 1)
    key, bias = case.weights.key, case.weights.key_bias
    tied = case.but(out=key, out_bias=bias, logits=key, logits_bias=bias, value=key)
    found = torch.autograd.grad(loss_of(tied.run()), [key, bias, case.x])
    wanted = torch.autograd.grad(loss_of(oracle(tied)), [key, bias, case.x])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# Memory ############################################################################


@sharing
@pytest.mark.parametrize("gaps", [(0,), (0, 2, 1)], ids=["covered", "gaps"])
@pytest.mark.parametrize("count", [1, 3])
def test_no_result_depends_on_memory_that_was_never_written(
    poisoned_memory, gaps, is_shared, count, num_threads, monkeypatch
):
    monkeypatch.setattr("nsm_graph.ops.cpu.threads.MIN_WORK", 1)
    num_threads(count)
    for counts in ([1], [3, 1, 4], LONG):
        for size in SIZES:
            case = make_case(
                *size, counts=counts, gaps=gaps, is_shared=is_shared, dtype=torch.float32
            )
            assert case.is_grouped.all() == (gaps == (0,))
            for asked in ASKED:
                out = case.run()
                assert all(x.isfinite().all() for x in out)
                assert all(x.isfinite().all() for x in gradients(out, case, asked).values())


@sharing
def test_batched_gradients_are_those_one_by_one(is_shared):
    case = make_case(dtype=torch.float32, is_shared=is_shared)
    out, x = case.run()[2], case.given["x"]
    directions = torch.randn(3, *out.shape)
    (batched,) = torch.autograd.grad(out, x, directions, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, x, one, retain_graph=True)[0] for one in directions]
    torch.testing.assert_close(batched, torch.stack(single))
