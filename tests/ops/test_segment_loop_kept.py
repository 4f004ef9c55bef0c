"""The loop over segments with kept channels, and with heads of communication of its own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segment_loop_oracle import (
    CROWD,
    assert_close,
    assert_equals_the_oracle,
    assert_same,
    gradients,
    keeps,
    make_case,
    oracle,
    sharing,
    talking,
)

from nsm_graph.models.cell import StateMachineCell
from nsm_graph.models.fused import loop_weights
from nsm_graph.models.loop import read_segments
from nsm_graph.models.segments import plan_segments
from nsm_graph.ops.segment_loop import LoopSegments, LoopWeights, fused, segment_loop
from nsm_graph.topology.base import Complete

#: States, channels, kept channels, heads, heads of communication. Either head may be the wider.
SIZES = [
    (1, 2, 1, 1, 1), (5, 6, 2, 2, 1), (5, 6, 5, 3, 1), (1, 14, 4, 2, 5), (33, 32, 12, 2, 4),
    (33, 20, 15, 1, 5), (5, 40, 8, 4, 1), (5, 40, 32, 2, 2),
]  # fmt: skip
sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)
kinds = pytest.mark.parametrize("is_lstm", [False, True], ids=["gru", "lstm"])


def make(sizes=(5, 6, 2, 2, 1), **options):
    num_states, channels, kept, heads, talk_heads = sizes
    return make_case(num_states, channels, heads, kept=kept, talk_heads=talk_heads, **options)


# The same numbers ##################################################################


@keeps
@sharing
@talking
@kinds
@sizes
def test_equals_the_oracle_with_every_gradient(sizes, is_lstm, talks, is_shared, keep):
    case = make(sizes, is_lstm=is_lstm, talks=talks, is_shared=is_shared)
    assert_equals_the_oracle(case, 1e-10, keep=keep)
    assert_equals_the_oracle(case.to(torch.float32), 1e-5, keep=keep)


@talking
@kinds
@sizes
def test_the_reference_equals_the_oracle(sizes, is_lstm, talks):
    assert_equals_the_oracle(make(sizes, is_lstm=is_lstm, talks=talks), 1e-10, backend="reference")


@given(
    counts=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4),
    num_states=st.integers(1, 9),
    width=st.integers(1, 9),
    heads=st.integers(1, 3),
    talk_heads=st.integers(1, 3),
    talk_width=st.integers(1, 5),
    flags=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 999),
)
def test_any_batch_equals_the_oracle(
    counts, num_states, width, heads, talk_heads, talk_width, flags, seed
):
    is_lstm, talks, is_shared, keep = flags
    gated = talk_heads * talk_width
    channels = heads * max(width, -(-gated // heads))
    case = make(
        (num_states, channels, channels - gated, heads, talk_heads), is_lstm=is_lstm, talks=talks,
        counts=sorted(counts, key=len, reverse=True), is_shared=is_shared, seed=seed,
    )  # fmt: skip
    assert_equals_the_oracle(case, 1e-10, keep=keep)


@keeps
@kinds
@pytest.mark.parametrize("asked", [(0,), (1,)], ids=["after", "final"])
def test_a_loss_on_either_result_of_any_batch(asked, is_lstm, keep):
    for counts in (CROWD, [[2, 70]] + [[1, 2]] * 15 + [[3]] * 5, [[3]] * 4, [[1] * 9]):
        case = make(counts=counts, is_lstm=is_lstm, idle=2)
        assert_equals_the_oracle(case, 1e-10, asked=asked, keep=keep)


@keeps
@kinds
@pytest.mark.parametrize("talk_heads", [1, 3, 6])
def test_heads_of_communication_where_nothing_is_kept(talk_heads, is_lstm, keep):
    case = make((5, 6, 0, 2, talk_heads), is_lstm=is_lstm)
    assert_equals_the_oracle(case, 1e-10, keep=keep)


@kinds
def test_communication_has_the_heads_of_attention_unless_told(is_lstm):
    cases = [make((5, 6, kept, 2, 2), is_lstm=is_lstm, dtype=torch.float32) for kept in (0, 2)]
    for case in cases:
        for backend in ("cpu", "reference"):
            results = [case.run(talk_heads=heads, backend=backend) for heads in (None, 2)]
            assert_same(*results)
            assert_same(*(gradients(result, case) for result in results))


@kinds
def test_heads_do_not_matter_where_states_do_not_talk(is_lstm):
    case = make(is_lstm=is_lstm, talks=False, dtype=torch.float32)
    results = [case.run(talk_heads=heads) for heads in (None, 1, 3)]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


# Kept channels #####################################################################


@keeps
@talking
@kinds
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_they_pass_through_every_step(backend, is_lstm, talks, keep):
    case = make(is_lstm=is_lstm, talks=talks, idle=2, dtype=torch.float32)
    after, final, *_ = case.run(keep=keep, backend=backend)
    states, num_states = case.rows["states"], case.num_states
    reading = [states[: count * num_states] for count in case.segments.num_active]
    assert torch.equal(after[:, :2], torch.cat(reading)[:, :2])
    assert torch.equal(final[:, :2], states[:, :2])
    # A loss that reads these alone goes back to them alone.
    (after[:, :2].sum() + 3 * final[:, :2].sum()).backward()
    reads = [sum(t < len(row) for t in range(9)) for row in case.counts] + [0, 0]
    wanted = torch.zeros_like(states)
    wanted[:, :2] = 3 + torch.tensor(reads).repeat_interleave(num_states).unsqueeze(1)
    assert torch.equal(states.grad, wanted)
    others = [x.grad for name, x in case.given.items() if name != "states"]
    assert all((grad == 0).all() for grad in others)


@keeps
@kinds
def test_query_gates_and_candidate_read_them(is_lstm, keep):
    for reader in ("query", "gates", "candidate"):
        if is_lstm and reader == "candidate":
            continue
        case = make(is_lstm=is_lstm)
        with torch.no_grad():  # nobody else does
            case.weights.query[:, :2] *= reader == "query"
            case.weights.gates[:, -2:] *= reader == "gates"
            if not is_lstm:
                case.weights.candidate[:, -2:] *= reader == "candidate"
        results, wanted = case.run(keep=keep), oracle(case)
        found = [
            torch.autograd.grad(out[0][:, 2:].square().sum(), case.rows["states"])[0]
            for out in (results, wanted)
        ]
        assert found[1][: 5 * len(case.counts), :2].abs().min() > 0
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@kinds
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_to_read(backend, is_lstm):
    case = make(counts=[], idle=2, is_lstm=is_lstm)
    after, *rest = case.run(backend=backend)
    assert after.shape == (0, 6)
    assert_same(rest, [case.rows[name] for name in ("states", "cell") if name in case.rows])


# How it is run #####################################################################


@talking
@kinds
@sizes
def test_keeping_and_making_again_give_the_same_bits(sizes, is_lstm, talks):
    case = make(sizes, is_lstm=is_lstm, talks=talks, counts=CROWD, dtype=torch.float32)
    kept, again = case.run(keep=True), case.run(keep=False)
    assert_same(kept, again)
    assert_same(gradients(kept, case), gradients(again, case))


@keeps
@kinds
def test_any_number_of_threads_gives_the_same_states(is_lstm, keep, num_threads):
    case = make((33, 32, 12, 2, 4), is_lstm=is_lstm, counts=CROWD, dtype=torch.float32)
    wanted = case.run(keep=keep)
    grads = gradients(wanted, case)
    for count in (1, 3, 100):
        num_threads(count)
        results = case.run(keep=keep)
        assert_same(results, wanted)
        found = gradients(results, case)
        for name in ("states", "cell", "routed", "key"):  # what belongs to an example
            assert name not in grads or torch.equal(found[name], grads[name]), name
        assert_close(found, grads, 1e-5)


@keeps
@kinds
def test_no_result_depends_on_memory_that_was_never_written(poisoned_memory, is_lstm, keep):
    for talks in (True, False):
        for sizes in SIZES:
            case = make(sizes, is_lstm=is_lstm, talks=talks, dtype=torch.float32)
            for asked in ((0,), (1,), (0, 1)):
                fused._spare.clear()  # what the last backward left would do
                results = case.run(keep=keep)
                assert all(x.isfinite().all() for x in results)
                found = gradients([results[i] for i in asked], case)
                assert all(x.isfinite().all() for x in found.values())


@keeps
@kinds
def test_examples_that_never_read_reach_no_other(is_lstm, keep):
    case = make(is_lstm=is_lstm, idle=2)
    case.rows["states"].data[-10:] = math.nan
    after, final, *_ = case.run(keep=keep)
    assert after.isfinite().all() and final[:-10].isfinite().all() and final[-10:].isnan().all()
    found = gradients([after, final], case)
    assert all(x.isfinite().all() for x in found.values())


@kinds
@pytest.mark.parametrize("keep", [True, False])
def test_second_derivatives(is_lstm, keep):
    # Keys made of states, a loss that is not linear.
    case = make((2, 4, 2, 2, 1), counts=[[2, 1], [1]], is_lstm=is_lstm)

    def second(run):
        states, tensors = case.rows["states"], list(case.given.values())
        results = run(case.but(key=case.rows["key"] + states[:, :2].mean()))
        loss = sum(x.square().sum() for x in results)
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), tensors)

    for a, b in zip(second(lambda case: case.run(keep=keep)), second(oracle), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# A cell's own modules ##############################################################


class Keeper(torch.nn.Module):
    """As much of a scan as tells a cell that half of its channels are kept."""

    gated_channels = 4
    gated_dropout = 0.0


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("topology", [Complete(), None], ids=["talk", "silent"])
def test_equals_the_cell_step_by_step(topology, kind):
    torch.manual_seed(0)
    cell = StateMachineCell(
        6, 8, 3, 4, segment_length=4, cell=kind, mix="sum", communication=topology, position=None,
        top_k=None, routing_reduce="sum", separate_values=False, scan=Keeper(),
    ).double()  # fmt: skip
    cell.scan = None  # what it would write is another's concern
    importance, slots = torch.randn(3).double(), torch.arange(3)
    plan = plan_segments([9, 6, 2], 4, 3, torch.device("cpu"))
    tokens, states = torch.randn(17, 6).double(), torch.randn(9, 8).double().requires_grad_()
    cells = torch.randn(9, 4).double().requires_grad_() if kind == "lstm" else None
    inputs, _ = cell.hoist(tokens, plan.place, plan.relation, importance, None)
    steps = cell.connect(cell.split(inputs, plan.steps), slots)
    trace = read_segments(cell, states, cells, steps)
    wanted = [torch.cat(trace.after), trace.states, trace.cell]
    num_active = torch.tensor([relation.num_examples for relation in plan.steps])
    found = segment_loop(
        states, inputs.routed, inputs.key, inputs.value,
        LoopSegments(plan.groups.ptr, num_active), loop_weights(cell), 4,
        talk_heads=None if topology is None else cell.communication.heads, cell=cells,
        backend="cpu",
    )  # fmt: skip
    given = [states, *([] if cells is None else [cells]), *cell.parameters()]
    slopes = []
    for results in (found, wanted):
        loss = sum(x.square().sum() for x in results if x is not None)
        grads = torch.autograd.grad(loss, given, retain_graph=True, allow_unused=True)
        slopes.append([x for x in grads if x is not None])
    assert topology is None or cell.communication.heads == 2
    for a, b in zip([*found, *slopes[0]], [*wanted[: len(found)], *slopes[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# Arguments #########################################################################

zeros = torch.zeros


@pytest.mark.parametrize(
    ("is_lstm", "changes", "message"),
    [
        (False, {"talk_heads": 3}, "talk_heads=3 .* must divide the 4 channels"),
        (False, {"talk_heads": 0}, "talk_heads=0 .* must divide the 4 channels"),
        (False, {"heads": 3, "talk_heads": None}, r"talk_heads=3 \(heads, unless given\) must"),
        (False, {"gates": zeros(7, 12)}, r"weights\.gates must have shape \(12, 12\) .* 2 rows"),
        (False, {"gates": zeros(0, 12)}, r"weights\.gates must have shape \(12, 12\) .* 2 rows"),
        (False, {"gates": zeros(14, 12)}, r"weights\.gates must .* but has \(14, 12\)"),
        (False, {"gates": zeros(8)}, r"weights\.gates must have shape .* but has \(8,\)"),
        (False, {"gates": None}, r"weights\.gates is missing"),
        (
            False,
            {"gates": zeros(8, 10)},
            r"weights\.gates must have shape \(8, 12\) .* write 4 of 6 channels, but has \(8, 10\)",
        ),
        (False, {"gates_bias": zeros(12)}, r"weights\.gates_bias must have shape \(8,\)"),
        (False, {"candidate": zeros(6, 12)}, r"weights\.candidate must have shape \(4, 12\)"),
        (False, {"qkv": zeros(18, 6)}, r"weights\.qkv must have shape \(12, 4\) .* write 4 of 6"),
        (False, {"mix": zeros(6, 6)}, r"weights\.mix must have shape \(4, 4\)"),
        (False, {"scale": zeros(6)}, r"weights\.scale must have shape \(4,\)"),
        (False, {"query": zeros(4, 4)}, r"weights\.query must have shape \(6, 6\)"),
        (True, {"cell": zeros(18, 6)}, r"cell must be .* \(18, 4\) .* write 4 .* is \(18, 6\)"),
        (True, {"gates": zeros(18, 12)}, r"weights\.gates must have shape \(24, 12\) .* 4 rows"),
        (True, {"gates_bias": zeros(24)}, r"weights\.gates_bias must have shape \(16,\)"),
    ],
)
def test_wrong_arguments(is_lstm, changes, message):
    case = make((3, 6, 2, 3, 2), is_lstm=is_lstm, dtype=torch.float32)
    weights = {name: changes[name] for name in LoopWeights._fields if name in changes}
    options = {"heads": 3, "talk_heads": 2, "segments": case.segments, **case.rows, **changes}
    options = {name: x for name, x in options.items() if name not in weights}
    with pytest.raises(ValueError, match=message):
        segment_loop(**options, weights=case.weights._replace(**weights))
