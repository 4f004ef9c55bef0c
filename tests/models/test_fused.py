"""The machine with its loop in one kernel: the numbers of the loop step by step, or that loop."""

import logging
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_machines import COUNTS, SIZES, make_machine, run
from torch import nn
from torch.nn.utils import parametrizations
from two_ways import (
    assert_is_right,
    assert_is_right_after_edits,
    assert_same,
    both_ways,
    in_one_kernel,
    reason_of,
    reasons,
    results,
    step_by_step,
)

from nsm_graph import NeuralStateMachine, topology
from nsm_graph.bench.record import peak_mib
from nsm_graph.models import fused, sequence
from nsm_graph.nn import (
    HybridAttention,
    SegmentScan,
    StateCommunication,
    StatePropagator,
    StateSnap,
)
from nsm_graph.ops.segment_loop import fused as loop_in_one_kernel
from nsm_graph.ops.segment_loop import release_memory
from nsm_graph.testing import assert_close_to_norm


@st.composite
def fused_options(draw):
    """Machines that read in one kernel."""
    head = draw(st.sampled_from(["example", "token", "next_token"]))
    pools = ["mean", "flatten", "attention"]
    return {
        "cell": draw(st.sampled_from(["gru", "lstm"])),
        "head": head,
        "pool": draw(st.sampled_from(pools)) if head == "example" else "mean",
        "heads": draw(st.sampled_from([1, 2])),
        "position": draw(st.sampled_from(["learned", "sinusoidal", "rotary", None])),
        "communication": draw(st.sampled_from([topology.complete(), None])),
        "separate_values": draw(st.booleans()),
        "routing_reduce": draw(st.sampled_from(["sum", "mean"])),
        "segment_length": draw(st.sampled_from([1, 2, 3, 5])),
        "checkpoint_segments": draw(st.sampled_from([None, None, 1, "sqrt"])),
    }


# The same numbers ##################################################################


@given(counts=COUNTS, options=fused_options(), seed=st.integers(0, 999))
def test_in_one_kernel_equals_step_by_step(counts, options, seed):
    assert_is_right(make_machine(seed, **options), counts)


@pytest.mark.parametrize("checkpoint_segments", [None, 2])
@pytest.mark.parametrize("head", ["example", "token", "next_token"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_machine_of_usual_size(cell, head, checkpoint_segments):
    sizes = {"state_channels": 32, "num_states": 16, "heads": 4, "segment_length": 16}
    options = {"cell": cell, **sizes}
    machine = make_machine(head=head, checkpoint_segments=checkpoint_segments, **options)
    assert_is_right(machine, (50, 0, 33, 64, 1))


@given(
    options=fused_options(),
    pieces=st.lists(st.lists(st.integers(0, 7), min_size=2, max_size=2), min_size=2, max_size=3),
    seed=st.integers(0, 999),
)
def test_a_stream_equals_the_stream_step_by_step(options, pieces, seed):
    pieces = [counts for counts in pieces if sum(counts) > 0] or [[3, 0]]
    machine = make_machine(seed, **options)
    x = [torch.randn(sum(counts), 3) for counts in pieces]

    def read():
        state, machine_grads = None, []
        machine.zero_grad()
        for part, counts in zip(x, pieces, strict=True):
            result = run(machine, part, counts, state=state)
            state = result.state
            machine_grads.append(result.out)
        sum(out.square().sum() for out in machine_grads).backward()
        found = {f"out {i}": out.detach() for i, out in enumerate(machine_grads)}
        grads = {name: p.grad for name, p in machine.named_parameters() if p.grad is not None}
        found |= {"states": state.states.detach()}
        return found | ({} if state.cell is None else {"cell": state.cell.detach()}), grads

    assert_same(*both_ways(read))


@pytest.mark.parametrize("checkpoint_segments", [None, 1])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_stream_equals_the_whole(cell, checkpoint_segments):
    # Pieces end where segments do; an example may end before the others.
    machine = make_machine(cell=cell, checkpoint_segments=checkpoint_segments)
    counts, pieces = [11, 0, 7, 3], [[6, 0, 3, 3], [3, 0, 3, 0], [2, 0, 1, 0]]
    whole = list(torch.randn(sum(counts), 3).split(counts))
    parts = [list(x.split([piece[i] for piece in pieces])) for i, x in enumerate(whole)]

    def read(xs, counts, state=None):
        result = run(machine, torch.cat(xs), counts, state=state)
        return result.out, result.state

    with in_one_kernel():
        out, state = read(whole, counts)
        carried = None
        for t, piece in enumerate(pieces):
            last, carried = read([x[t] for x in parts], piece, carried)
    assert_close_to_norm(last, out, 1e-6, "out")
    assert_close_to_norm(carried.states, state.states, 1e-6, "states")
    assert (state.cell is None) == (carried.cell is None) == (cell == "gru")
    if cell == "lstm":
        assert_close_to_norm(carried.cell, state.cell, 1e-6, "cell")
    grads = []
    for found in (last, out):
        machine.zero_grad()
        found.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in machine.parameters()]))
    assert_close_to_norm(*grads, 1e-5)


@pytest.mark.parametrize("checkpoint_segments", [None, 1])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_after_edits_of_the_node_set(cell, checkpoint_segments):
    options = {"cell": cell, "checkpoint_segments": checkpoint_segments}
    machine = make_machine(max_states=5, **options)
    assert_is_right_after_edits(machine)


def test_dropout_and_importance_in_training():
    machine = make_machine(dropout=0.5).train()
    x, averages = torch.randn(14, 3), []

    def step():
        machine.manager.importance_ema.fill_(0.5)
        torch.manual_seed(7)
        found = results(machine, x, [5, 0, 7, 2])
        averages.append(machine.manager.importance_ema.clone())
        return found

    assert_same(*both_ways(step))
    assert torch.equal(*averages)


def test_second_derivatives_are_those_of_float64():
    grads = []
    for dtype in (torch.float32, torch.float64):
        machine, x = make_machine(dtype=dtype), torch.randn(7, 3).to(dtype).requires_grad_()
        torch.manual_seed(0)
        (slope,) = torch.autograd.grad(machine(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in machine.parameters()]))
    assert_close_to_norm(*grads, 1e-4)


def test_frozen_parts():
    machine = make_machine()
    for part in (machine.cell.communication, machine.cell.attention.lin_query, machine.manager):
        part.requires_grad_(False)
    assert_is_right(machine)
    machine.requires_grad_(False)
    with in_one_kernel(), torch.no_grad():
        assert not run(machine, torch.randn(5, 3), [5]).out.requires_grad


def test_batches_of_other_sizes_follow_each_other():
    machine = make_machine()
    for counts in ((5, 7), (1,), (0, 12, 3), (5, 7), (2, 2, 2, 2)):
        assert_is_right(machine, counts)


def test_checkpointing_keeps_less():
    options = {"state_channels": 64, "num_states": 32, "segment_length": 16}
    peaks = []
    for checkpoint_segments in (None, "sqrt"):
        machine = make_machine(checkpoint_segments=checkpoint_segments, **options)
        x = torch.randn(3200, 3)
        machine(x[:64])  # whatever is made once
        with in_one_kernel():
            peaks.append(peak_mib(lambda machine=machine, x=x: machine(x)))
    if None in peaks:
        pytest.skip("this system does not tell")
    assert peaks[1] < 0.5 * peaks[0]


# When not ##########################################################################


class OwnAttention(HybridAttention):
    pass


class OwnPropagator(StatePropagator):
    pass


class OwnCommunication(StateCommunication):
    pass


class Doubled(nn.Linear):
    """As adapters do: a layer that has a weight, and does more than multiply with it."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_nothing_speaks_against_the_documented_cell():
    assert reason_of(make_machine()) is None
    assert reason_of(make_machine(communication=None)) is None
    assert reason_of(make_machine(cell="lstm")) is None
    assert reason_of(make_machine(checkpoint_segments=2)) is None
    scan = SegmentScan(8, 8, 3)
    assert reason_of(make_machine(scan=scan, state_channels=8)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, "torch.float64 asks for the reference"),
        ({"scan": SegmentScan(8, 8, 3, 2, backend="chunked"), "state_channels": 8}, "scan"),
        ({"mix": "bias"}, "attention has a bias"),
        ({"mix": "attention"}, "routing and attention are not added"),
        ({"mix": "routing"}, "routing and attention are not added"),
        ({"position": "relative"}, "attention has a bias"),
        ({"top_k": 1}, "not every token has an edge"),
        ({"top_k": 2}, "not every token has an edge"),
        ({"communication": topology.ring()}, "states talk along ring"),
        ({"communication": topology.complete() - topology.self_loops()}, "states talk along"),
        ({"communication": topology.knn(2)}, "states talk along"),
        ({"bptt_segments": 2}, "the history is cut"),
    ],
    ids=lambda given: "-".join(given) if isinstance(given, dict) else "",
)
def test_options_that_go_step_by_step(options, message):
    assert message in reason_of(make_machine(**options))


def test_calls_that_go_step_by_step():
    machine = make_machine()
    assert "steps are recorded" in reason_of(machine, record=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in reason_of(machine)
    assert reason_of(machine) is None


def test_other_devices_and_a_snap_go_step_by_step():
    machine = make_machine()
    with mock.patch.object(sequence, "why_not_fused", wraps=fused.why_not_fused) as ask:
        run(machine, torch.randn(5, 3), [5])
    cell, states = ask.call_args.args
    assert fused.why_not_fused(cell, states) is None
    assert "no kernel for meta" in fused.why_not_fused(cell, states.to("meta"))
    cell.snap = StateSnap(torch.randn(2, 3, 4))
    assert "a snap acts" in fused.why_not_fused(cell, states)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_cell_stays_compiled():
    machine = make_machine()
    machine.cell.compile(backend="eager", dynamic=True)
    assert "compiled" in reason_of(machine)
    torch._dynamo.reset()


def parts_of(cell):
    return {
        "cell": cell,
        "propagator": cell.propagator,
        "gates": cell.propagator.lin_gates,
        "candidate": cell.propagator.lin_candidate,
        "query": cell.attention.lin_query,
        "attention's output": cell.attention.lin_out,
        "communication": cell.communication,
        "its projection": cell.communication.lin_qkv,
        "its norm": cell.communication.norm,
    }


@pytest.mark.parametrize("name", parts_of(make_machine().cell))
def test_hooks_are_called_as_often_as_there_are_steps(name):
    machine, calls = make_machine(), []
    part = parts_of(machine.cell)[name]
    for register in (
        part.register_forward_pre_hook,
        part.register_forward_hook,
        part.register_full_backward_hook,
    ):
        handle = register(lambda *given: calls.append(given[0]))
        calls.clear()
        with reasons() as found:
            run(machine, torch.randn(8, 3), [8]).out.sum().backward()
        assert "hook" in found[0]
        assert calls == [part] * 3  # eight tokens in segments of three
        handle.remove()
    assert reason_of(machine) is None


@pytest.mark.parametrize("layer", ["attention", "communication"])
def test_hooks_on_messages_are_called(layer):
    machine, calls = make_machine(), []
    part = getattr(machine.cell, layer)
    for stage in ("propagate", "message", "aggregate"):
        for when in ("forward_pre_hook", "forward_hook"):
            register = getattr(part, f"register_{stage}_{when}")
            handle = register(lambda *given: calls.append(given[0]))
            calls.clear()
            assert "hook" in reason_of(machine, (8,))
            assert calls == [part] * 3
            handle.remove()
    assert reason_of(machine) is None


def test_hooks_that_see_no_call_change_nothing():
    machine = make_machine()
    machine.cell.register_state_dict_post_hook(lambda *given: None)
    machine.cell.propagator.register_load_state_dict_post_hook(lambda *given: None)
    machine.register_forward_hook(lambda *given: None)
    machine.head.register_forward_hook(lambda *given: None)
    assert reason_of(machine) is None


REPLACED = {
    "attention": lambda cell: setattr(cell, "attention", OwnAttention((4, 4), 2)),
    "propagator": lambda cell: setattr(cell, "propagator", OwnPropagator(4)),
    "communication": lambda cell: setattr(cell, "communication", OwnCommunication(4, 2)),
    "epsilon": lambda cell: setattr(cell.communication.norm, "eps", 1e-2),
    "norm without parameters": lambda cell: setattr(
        cell.communication, "norm", nn.LayerNorm(4, elementwise_affine=False)
    ),
    "norm of another kind": lambda cell: setattr(cell.communication, "norm", nn.RMSNorm(4)),
    "query": lambda cell: setattr(cell.attention, "lin_query", Doubled(4, 4)),
    "gates": lambda cell: setattr(cell.propagator, "lin_gates", Doubled(8, 8)),
    "projection": lambda cell: setattr(cell.communication, "lin_qkv", Doubled(4, 12)),
    "no bias": lambda cell: setattr(cell.attention, "lin_query", nn.Linear(4, 4, bias=False)),
    "other heads": lambda cell: setattr(cell, "communication", StateCommunication(4, 1)),
    "a function": lambda cell: setattr(
        cell.propagator, "forward", lambda *given, **options: StatePropagator.forward(
            cell.propagator, -given[0], *given[1:], **options
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REPLACED)
def test_a_part_that_was_replaced_is_the_one_that_acts(name):
    machine = make_machine()
    REPLACED[name](machine.cell)
    with reasons():
        actual = results(machine, x := torch.randn(14, 3), [5, 0, 7, 2])
    with step_by_step():
        assert_same(actual, results(machine, x, [5, 0, 7, 2]))


def test_parametrised_weights_are_the_ones_that_act():
    machine = make_machine()
    for linear in (machine.cell.propagator.lin_gates, machine.cell.attention.lin_query):
        parametrizations.weight_norm(linear)
    with reasons():
        actual = results(machine, x := torch.randn(14, 3), [5, 0, 7, 2])
    with step_by_step():
        assert_same(actual, results(machine, x, [5, 0, 7, 2]))


def test_function_transforms():
    machine, x = make_machine(), torch.randn(7, 3)
    weights = {name: p.detach() for name, p in machine.named_parameters()}

    def loss(weights):
        return torch.func.functional_call(machine, weights, (x,)).square().sum()

    found = torch.func.grad(loss)(weights)
    machine(x).square().sum().backward()
    for name, parameter in machine.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


# What the log says #################################################################


def test_the_reason_is_logged_once_for_each(caplog, monkeypatch):
    monkeypatch.setattr(fused, "_said", set())
    caplog.set_level(logging.INFO, logger="nsm_graph")

    def messages():
        return [
            (record.levelname, record.getMessage())
            for record in caplog.records
            if "step by step" in record.getMessage()
        ]

    reason_of(make_machine())
    assert messages() == []
    for _ in range(2):
        reason = reason_of(make_machine(mix="bias"))
    assert messages() == [("INFO", messages()[0][1])]
    assert messages()[0][1].endswith(reason)
    reason_of(make_machine(top_k=1))
    reason_of(make_machine(mix="bias", seed=1))
    assert len(messages()) == 2


def test_nothing_to_read_takes_the_loop_and_needs_no_reason(caplog):
    caplog.set_level(logging.INFO, logger="nsm_graph")
    machine = make_machine()
    state = machine.run(torch.randn(6, 3)).state
    idle = machine.run(torch.zeros(0, 3), state=state)
    assert torch.equal(idle.state.states, state.states)
    assert not [record for record in caplog.records if "step by step" in record.getMessage()]


def test_graphs_are_not_asked():
    machine = NeuralStateMachine(**(SIZES | {"segment_length": None, "heads": 2}))
    with mock.patch.object(sequence, "why_not_fused") as ask:
        machine(torch.randn(5, 3))
    assert not ask.called


def test_batched_gradients_are_those_one_by_one():
    machine, x = make_machine(), torch.randn(7, 3, requires_grad=True)
    with in_one_kernel():
        out = run(machine, x, [4, 3]).out
    directions = torch.randn(3, *out.shape)
    (batched,) = torch.autograd.grad(out, x, directions, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, x, one, retain_graph=True)[0] for one in directions]
    torch.testing.assert_close(batched, torch.stack(single))


def test_a_global_hook_sees_every_module():
    machine, seen = make_machine(), []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module))
    )
    try:
        assert "hook watches" in reason_of(machine)
    finally:
        hook.remove()
    assert StatePropagator in seen
    assert reason_of(machine) is None


def test_the_memory_of_a_step_can_be_given_back():
    machine = make_machine()
    run(machine, torch.randn(7, 3), [4, 3]).out.sum().backward()
    assert loop_in_one_kernel._spare
    release_memory()
    assert not loop_in_one_kernel._spare
