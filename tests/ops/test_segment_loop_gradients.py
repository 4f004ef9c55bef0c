"""The loop over segments: gradients through either result, of some inputs, of second order."""

import pytest
import torch
from segment_loop_oracle import (
    Case,
    asks,
    assert_equals_the_oracle,
    assert_same,
    gradients,
    gradients_of,
    keeps,
    make_case,
    oracle,
    sharing,
    sizes,
    talking,
)
from torch.autograd import gradcheck, gradgradcheck

from nsm_graph.ops.segment_loop import fused

# Through which results #############################################################


@keeps
@talking
@asks
@sizes
def test_a_loss_on_either_result_or_both(num_states, channels, heads, asked, talks, keep):
    case = make_case(num_states, channels, heads, talks=talks, is_shared=talks, idle=2)
    assert_equals_the_oracle(case, 1e-10, asked=asked, keep=keep)
    assert_equals_the_oracle(case.to(torch.float32), 1e-5, asked=asked, keep=keep)


@keeps
@asks
@pytest.mark.parametrize(
    "counts", [[[2, 70]] + [[1, 2]] * 15 + [[3]] * 5, [[3]] * 4, [[1] * 9], [[2, 1]] * 9 + [[2]]]
)
def test_a_loss_on_either_result_of_any_batch(counts, asked, keep):
    assert_equals_the_oracle(make_case(counts=counts), 1e-10, asked=asked, keep=keep)


@asks
def test_the_reference_has_gradients_through_either_result(asked):
    assert_equals_the_oracle(make_case(idle=2), 1e-10, asked=asked, backend="reference")


@keeps
def test_a_loss_on_the_last_step_only(keep):
    case = make_case()
    assert_equals_the_oracle(case, 1e-10, asked=(0,), last=case.num_states, keep=keep)


@keeps
def test_what_nobody_asks_for_is_not_made_up(keep, monkeypatch):
    asked, backward = [], fused._Run.backward

    def watched(run, d_after, d_final, *rest):
        asked.append((d_after is not None, d_final is not None))
        return backward(run, d_after, d_final, *rest)

    monkeypatch.setattr(fused._Run, "backward", watched)
    case = make_case()
    for results in ((0,), (1,), (0, 1)):
        out = case.run(keep=keep)
        gradients([out[i] for i in results], case)
    assert asked == [(True, False), (False, True), (True, True)]


class Silent(torch.autograd.Function):
    """Hands on what it gets, and no gradient back."""

    @staticmethod
    def forward(ctx, *tensors):
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx, *grads):
        return (None,) * len(grads)


@keeps
@pytest.mark.parametrize("create_graph", [False, True])
def test_nobody_asks_for_either_result(create_graph, keep):
    case = make_case()
    states = case.rows["states"]
    after, final = case.run(keep=keep)
    total = sum(x.sum() for x in Silent.apply(after, final)) + states.sum()
    (slope,) = torch.autograd.grad(total, states, create_graph=create_graph)
    assert (slope == 1).all()


# Of which inputs ###################################################################


@sharing
@asks
@keeps
def test_only_some_inputs_want_gradients(keep, asked, is_shared):
    full = make_case(dtype=torch.float32, is_shared=is_shared)

    def run(case):
        results = case.run(keep=keep)
        return [results[i] for i in asked]

    wanted = gradients(run(full), full)
    for name in full.given:
        case = full.detached(name)
        (found,) = gradients_of(run(case), case.given[name])
        assert torch.equal(found, wanted[name]), name


def test_nobody_wants_gradients():
    case = make_case(dtype=torch.float32)
    expected = case.run()
    assert all(x.requires_grad for x in expected)
    results = case.detached().run()
    assert not any(x.requires_grad for x in results)
    assert_same(results, expected)
    with torch.no_grad():
        results = case.run()
    assert not any(x.requires_grad for x in results)
    assert_same(results, expected)


# Of second order ###################################################################


@talking
@sharing
@pytest.mark.parametrize(
    "asked",
    [(0, 1), *(pytest.param(asked, marks=pytest.mark.slow) for asked in ((0,), (1,)))],
    ids=["both", "after", "final"],
)
def test_first_and_second_derivatives(asked, talks, is_shared):
    counts = [[2, 1], [1]]
    case = make_case(2, 4, 2, counts=counts, talks=talks, is_shared=is_shared)
    names = list(case.given)

    def function(*tensors):
        results = case.but(**dict(zip(names, tensors, strict=True))).run()
        return tuple(results[i] for i in asked)

    assert gradcheck(function, list(case.given.values()))
    assert gradgradcheck(function, list(case.given.values()), fast_mode=asked != (0,))


@sharing
@asks
def test_second_derivatives_of_inputs_that_hang_together(asked, is_shared):
    # Keys and routed sums made of states, a loss that is not linear.
    case = make_case(2, 4, 2, counts=[[2, 1], [1]], is_shared=is_shared)

    def entangled(run):
        states = case.rows["states"]
        changes = {
            "key": case.rows["key"] + states.mean(),
            "routed": case.rows["routed"] * states.square().mean(),
        }
        given = list(case.given.values())
        results = run(case.but(**changes))
        first = torch.autograd.grad(
            sum(results[i].square().sum() for i in asked), given, create_graph=True
        )
        return torch.autograd.grad(sum(x.square().sum() for x in first), given)

    reference = entangled(lambda changed: changed.run(backend="reference"))
    for actual, expected, wanted in zip(
        entangled(Case.run), reference, entangled(oracle), strict=True
    ):
        torch.testing.assert_close(expected, wanted, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@asks
def test_gradgradcheck_where_keys_depend_on_states(asked):
    case = make_case(2, 2, 1, counts=[[2, 1], [1]])

    def function(states, key):
        key = key + states.mean()
        results = case.but(states=states, key=key, value=key).run()
        return tuple(results[i] for i in asked)

    given = [case.rows["states"], case.rows["key"]]
    assert gradcheck(function, given)
    assert gradgradcheck(function, given)
