"""The loop over segments with an LSTM's gates: a cell that is carried, and its gradients."""

import math

import hoist_oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segment_loop_oracle import (
    CROWD,
    RAGGED,
    SIZES,
    assert_close,
    assert_equals_the_oracle,
    assert_same,
    gradients,
    gradients_of,
    keeps,
    loss_of,
    make_case,
    oracle,
    sharing,
    sizes,
    talking,
)
from torch.autograd import gradcheck, gradgradcheck

from nsm_graph.bench.record import peak_mib
from nsm_graph.ops.hoist import hoist
from nsm_graph.ops.segment_loop import LoopWeights, fused, segment_loop, token_loop

#: Which results a loss reads: the states after every step, the final ones, the final cell.
asks = pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)], ids=str)


def lstm(*sizes, **options):
    return make_case(*sizes, is_lstm=True, **options)


# The same numbers ##################################################################


@keeps
@sharing
@talking
@sizes
def test_equals_the_oracle_with_every_gradient(num_states, channels, heads, talks, is_shared, keep):
    case = lstm(num_states, channels, heads, talks=talks, is_shared=is_shared)
    assert_equals_the_oracle(case, 1e-10, keep=keep)
    assert_equals_the_oracle(case.to(torch.float32), 1e-5, keep=keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@asks
def test_the_reference_equals_the_oracle(asked, dtype):
    for talks in (True, False):
        case = lstm(talks=talks, is_shared=talks, dtype=dtype, idle=2)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-10
        assert_equals_the_oracle(case, tolerance, asked=asked, backend="reference")


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
    case = lstm(
        num_states, width * heads, heads, counts=sorted(counts, key=len, reverse=True),
        talks=talks, is_shared=is_shared, idle=idle, seed=seed,
    )  # fmt: skip
    assert_equals_the_oracle(case, 1e-10, keep=keep)


@keeps
@talking
@asks
def test_a_loss_on_any_result(asked, talks, keep):
    for counts in (RAGGED, [[2, 70]] + [[1, 2]] * 15 + [[3]] * 5, [[3]] * 4, [[1] * 9]):
        case = lstm(counts=counts, talks=talks, idle=2)
        assert_equals_the_oracle(case, 1e-10, asked=asked, keep=keep)


@keeps
def test_examples_that_never_read_keep_their_cell(keep):
    case = lstm(idle=2)
    num_idle = 2 * case.num_states
    case.rows["cell"].data[-num_idle:] = math.nan
    after, final, cell = case.run(keep=keep)
    assert after.isfinite().all() and final.isfinite().all()
    assert cell[:-num_idle].isfinite().all() and cell[-num_idle:].isnan().all()
    found = dict(zip(case.given, torch.autograd.grad(cell.sum(), list(case.given.values()),
                                                     allow_unused=True), strict=True))  # fmt: skip
    assert (found["cell"][-num_idle:] == 1).all() and (found["states"][-num_idle:] == 0).all()
    assert all(x.isfinite().all() for x in found.values() if x is not None)


def test_a_cell_of_large_numbers_is_carried_on():
    # With open forget gates it grows without bound; states stay within one.
    case = lstm(counts=[[2] * 40] * 3, talks=False)
    case.weights.gates_bias.data[6:12] = 30.0  # forget gates of six channels
    case.rows["cell"].data.mul_(50)
    assert_equals_the_oracle(case, 1e-10)
    _, final, cell = case.run()
    assert cell.abs().max() > 50 and final[: 3 * case.num_states].abs().max() <= 1


# How it is run #####################################################################


@talking
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_states", "channels", "heads"), SIZES)
def test_keeping_and_making_again_give_the_same_bits(num_states, channels, heads, dtype, talks):
    case = lstm(num_states, channels, heads, counts=CROWD, dtype=dtype, talks=talks)
    kept, again = case.run(keep=True), case.run(keep=False)
    assert_same(kept, again)
    assert_same(gradients(kept, case), gradients(again, case))


@keeps
@pytest.mark.parametrize(("num_states", "channels", "heads"), [(1, 3, 1), (5, 14, 2), (33, 32, 2)])
def test_any_number_of_threads_gives_the_same_states(
    num_states, channels, heads, keep, num_threads
):
    case = lstm(num_states, channels, heads, counts=CROWD, dtype=torch.float32)
    results = []
    for count in (1, 2, 3, 16, 100):
        num_threads(count)
        outs = [case.run(keep=keep) for _ in range(2)]
        grads = [gradients(out, case) for out in outs]
        assert_same(*outs)
        assert_same(*grads)
        results.append((outs[0], grads[0]))
    for out, found in results[1:]:
        assert_same(out, results[0][0])
        for name in ("states", "cell", "routed", "key"):  # what belongs to an example
            assert torch.equal(found[name], results[0][1][name]), name
        assert_close(found, results[0][1], 1e-5)


@keeps
@asks
def test_a_second_backward_through_the_same_graph(asked, keep):
    case = lstm()
    results = case.run(keep=keep)
    out, names = [results[i] for i in asked], list(case.given.values())
    first = gradients_of(out, *names, retain_graph=True, allow_unused=True)
    loss_of(case.run()).backward()  # may take what the first one gave back
    second = gradients_of(out, *names, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)


@keeps
def test_loops_of_either_kind_follow_each_other(keep):
    cases = [make_case(seed=0), lstm(seed=1), make_case(seed=2), lstm(seed=3)]
    wanted = [gradients(case.run(keep=keep), case) for case in cases]
    outs = [case.run(keep=keep) for case in cases]
    for i in (1, 0, 3, 2):
        assert_same(gradients(outs[i], cases[i]), wanted[i])


@keeps
def test_only_the_cell_wants_a_gradient(keep):
    full = lstm(dtype=torch.float32)
    wanted = gradients(full.run(keep=keep), full)
    for name in full.given:
        case = full.detached(name)
        (found,) = gradients_of(case.run(keep=keep), case.given[name])
        assert torch.equal(found, wanted[name]), name
    results = full.detached().run(keep=keep)
    assert not any(x.requires_grad for x in results)
    assert_same(results, full.run(keep=keep))


def test_a_cell_changed_before_backward_is_noticed():
    case = lstm()
    case = case.but(**{n: x * 1 for n, x in case.given.items()})
    results = case.run()
    case.given["cell"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results[2].sum().backward()


@keeps
def test_the_final_cell_may_be_changed_and_is_nobody_elses(keep):
    case = lstm()
    given = [case.rows["cell"], case.weights.gates]
    before = case.rows["cell"].detach().clone()
    wanted = torch.autograd.grad(2 * case.run(keep=keep)[2].sum(), given)
    cell = case.run(keep=keep)[2]
    cell.mul_(2)
    assert torch.equal(case.rows["cell"], before)
    assert_same(torch.autograd.grad(cell.sum(), given), wanted)


def test_a_cell_in_any_layout():
    case = lstm(dtype=torch.float32)
    expected = case.run()
    base = torch.full((12, len(case.rows["cell"])), math.nan)
    base[::2] = case.rows["cell"].detach().T
    base.requires_grad_()
    results = case.but(cell=base[::2].T).run()
    assert_same(results, expected)
    (found,) = gradients_of(results, base)
    assert torch.equal(found[::2].T, gradients(expected, case)["cell"])


def test_without_gradients_no_cells_are_kept():
    case = lstm(32, 64, 2, counts=[[8] * 100] * 4, dtype=torch.float32)
    num_bytes = 4 * case.rows["routed"].numel()

    def run():
        with torch.no_grad():
            case.run()

    run()
    peak = peak_mib(run)
    if peak is None:
        pytest.skip("this system does not tell")
    assert peak * 2**20 < 4 * num_bytes


@keeps
def test_no_result_depends_on_memory_that_was_never_written(poisoned_memory, keep):
    for talks in (True, False):
        for num_states, channels, heads in SIZES:
            case = lstm(num_states, channels, heads, talks=talks, dtype=torch.float32)
            for asked in ((0,), (1,), (2,), (0, 1, 2)):
                fused._spare.clear()  # what the last backward left would do
                results = case.run(keep=keep)
                assert all(x.isfinite().all() for x in results)
                found = gradients([results[i] for i in asked], case)
                assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_to_read(backend):
    case = lstm(counts=[], idle=2)
    after, final, cell = case.run(backend=backend)
    assert after.shape == (0, 6)
    assert torch.equal(final, case.rows["states"]) and torch.equal(cell, case.rows["cell"])
    (slope,) = torch.autograd.grad((2 * cell).sum(), case.rows["cell"])
    assert (slope == 2).all()


# Of second order ###################################################################


@pytest.mark.slow
@talking
@sharing
@asks
def test_first_and_second_derivatives(asked, talks, is_shared):
    case = lstm(2, 4, 2, counts=[[2, 1], [1]], talks=talks, is_shared=is_shared)
    names = list(case.given)

    def function(*tensors):
        results = case.but(**dict(zip(names, tensors, strict=True))).run()
        return tuple(results[i] for i in asked)

    assert gradcheck(function, list(case.given.values()))
    assert gradgradcheck(function, list(case.given.values()), fast_mode=asked != (0, 1, 2))


@asks
def test_second_derivatives_of_inputs_that_hang_together(asked):
    case = lstm(2, 4, 2, counts=[[2, 1], [1]])

    def entangled(run):
        states = case.rows["states"]
        changes = {
            "key": case.rows["key"] + states.mean(),
            "cell": case.rows["cell"] * states.square().mean(),
        }
        given = list(case.given.values())
        results = run(case.but(**changes))
        loss = sum(results[i].square().sum() for i in asked)
        first = torch.autograd.grad(loss, given, create_graph=True, materialize_grads=True)
        return torch.autograd.grad(
            sum(x.square().sum() for x in first), given, materialize_grads=True
        )

    wanted = entangled(oracle)
    for backend in ("cpu", "reference"):
        found = entangled(lambda changed, backend=backend: changed.run(backend=backend))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


# From tokens #######################################################################


@keeps
@talking
@sharing
@pytest.mark.parametrize(
    ("num_states", "width", "channels", "heads", "kept", "talk_heads"),
    [(5, 7, 6, 2, 0, None), (3, 5, 20, 1, 0, None), (5, 7, 6, 2, 3, 3)],
)
def test_tokens_give_what_their_rows_give(
    num_states, width, channels, heads, kept, talk_heads, is_shared, talks, keep, num_threads
):
    case = lstm(
        num_states, channels, heads, counts=CROWD, talks=talks, kept=kept, talk_heads=talk_heads
    )
    counts = case.segments.token_ptr.diff().tolist()
    tokens = hoist_oracle.make_case(
        num_states, width, channels, heads, counts=counts, is_shared=is_shared
    )
    given = {**case.weights._asdict(), **tokens.given}
    given |= {name: case.rows[name] for name in ("states", "cell")}
    given = {f"{name} {i}": x for i, (name, x) in enumerate(given.items()) if x is not None}
    num_threads(2)
    after, final, mass, cell, _ = token_loop(
        case.rows["states"], tokens.x, torch.tensor(tokens.first), tokens.weights, case.segments,
        case.weights, heads, talk_heads=talk_heads, cell=case.rows["cell"], keep=keep,
        backend="cpu",
    )  # fmt: skip
    key, value, routed, _ = hoist(tokens.x, tokens.groups, tokens.weights, heads, backend="cpu")
    expected = oracle(case.but(key=key, value=value, routed=routed))
    assert mass.shape == (len(counts) * num_states,)
    for found, wanted in zip((after, final, cell), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    actual = gradients_of((after, final, cell), *given.values())
    wanted = gradients_of(expected, *given.values())
    names = list(given)
    assert_close(
        dict(zip(names, actual, strict=True)), dict(zip(names, wanted, strict=True)), 1e-10
    )


# Arguments #########################################################################


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cell": torch.zeros(6, 3)}, r"cell must be like states, \(6, 4\) .* is \(6, 3\)"),
        ({"cell": torch.zeros(6, 4).double()}, "cell must be like states, .* in torch.float64"),
        ({"cell": None}, r"weights\.gates must have shape \(8, 8\) .* has \(16, 8\)"),
        ({"gates": torch.zeros(10, 8)}, r"weights\.gates must have shape \(16, 8\)"),
        ({"gates": torch.zeros(8, 8)}, r"cell must .* \(6, 2\) .* weights\.gates write 2 channels"),
        ({"gates_bias": torch.zeros(8)}, r"weights\.gates_bias must have shape \(16,\)"),
        ({"candidate": torch.zeros(4, 8)}, r"an LSTM, .*, has no weights\.candidate"),
        ({"candidate_bias": torch.zeros(4)}, r"an LSTM, .*, has no weights\.candidate"),
        ({"mix": None}, r"weights\.mix is missing"),
    ],
)
def test_wrong_arguments(changes, message):
    case = lstm(3, 4, 2, counts=[[2, 3], [2]], idle=0, dtype=torch.float32)
    weights = {name: changes.pop(name) for name in LoopWeights._fields if name in changes}
    rows = case.rows | changes
    with pytest.raises(ValueError, match=message):
        segment_loop(
            **rows, segments=case.segments, weights=case.weights._replace(**weights), heads=2
        )
