"""Machines with a scan of one layer in one kernel: the numbers of the scan's own modules."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from small_machines import make_machine, run
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

from nsm_graph.models import fused, sequence
from nsm_graph.nn import SegmentScan, StateSnap
from nsm_graph.nn.scan_heads import TransitionHeads
from nsm_graph.testing import assert_close_to_norm

#: Over four heads of four channels.
SCANS = {
    "transition": {"gated_heads": 1},
    "memory": {"memory_heads": 3, "stretch": 0.0},
    "both": {"memory_heads": 1, "gated_heads": 2, "decay": True, "write": True},
    "routed reads": {"memory_heads": 1, "read": "routed", "reflections": 3},
    "no convolution": {"memory_heads": 1, "convolution": False, "reflections": 1, "stretch": 2.0},
    "all written": {"memory_heads": 1, "gated_heads": None, "write": True},
}
scans = pytest.mark.parametrize("scan", SCANS.values(), ids=SCANS)
heads = pytest.mark.parametrize("head", ["example", "token", "next_token"])
cells = pytest.mark.parametrize("cell", ["gru", "lstm"])


def make(scan=None, seed=0, channels=16, **options):
    """A machine with a scan; every number is drawn from the seed."""
    torch.manual_seed(seed)
    num_slots = options.get("max_states") or options.get("num_states", 3)
    scan = SegmentScan(channels, channels, num_slots, 4, **(scan or SCANS["both"]))
    machine = make_machine(seed, scan=scan, state_channels=channels, **options)
    with torch.no_grad():  # away from the neutral start, where mistakes could hide
        if scan.convolution is not None:
            for p in scan.convolution.parameters():
                p.normal_(0.0, 0.3)
        if getattr(machine.head, "gains", None) is not None:
            machine.head.gains.normal_()
    return machine


# The same numbers ##################################################################


@scans
@heads
@cells
def test_in_one_kernel_equals_step_by_step(cell, head, scan):
    assert_is_right(make(scan, cell=cell, head=head))


@pytest.mark.parametrize("checkpoint_segments", [None, 2])
@heads
def test_a_machine_of_usual_size(head, checkpoint_segments):
    machine = make(
        channels=32, num_states=16, heads=4, segment_length=16, head=head,
        checkpoint_segments=checkpoint_segments,
    )  # fmt: skip
    assert_is_right(machine, (50, 0, 33, 64, 1))


@pytest.mark.parametrize(
    "options",
    [{"communication": None}, {"separate_values": True}, {"position": "sinusoidal"}, {"heads": 1}],
    ids=str,
)
def test_other_machines(options):
    assert_is_right(make(head="token", **options))


@pytest.mark.parametrize("segment_length", [1, 2, 7, 30])
@heads
def test_segments_of_any_length(head, segment_length):
    machine = make(SCANS["routed reads"], head=head)
    assert_is_right(machine, (5, 0, 17, 9), segment_length=segment_length)


@pytest.mark.parametrize("name", ["both", "memory"])
@pytest.mark.parametrize("head", ["example", "token"])
def test_after_edits_of_the_node_set(head, name):
    machine = make(SCANS[name], max_states=5, num_states=3, head=head)
    assert_is_right_after_edits(machine)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_gates_that_harden(share):
    machine = make(head="token")
    machine.cell.scan.harden(share)
    assert_is_right(machine)


@scans
def test_dropout_and_importance_in_training(scan):
    machine = make(scan, dropout=0.5, head="token").train()
    x, averages = torch.randn(14, 3), []

    def step():
        machine.manager.importance_ema.fill_(0.5)
        torch.manual_seed(7)
        found = results(machine, x, [5, 0, 7, 2])
        averages.append(machine.manager.importance_ema.clone())
        return found

    assert_same(*both_ways(step))
    torch.testing.assert_close(*averages, rtol=1e-6, atol=0)


@pytest.mark.parametrize("head", ["example", "token"])
def test_frozen_parts(head):
    machine = make(head=head)
    machine.cell.scan.requires_grad_(False)
    assert_is_right(machine)
    machine = make(head=head).requires_grad_(False)
    machine.cell.scan.layers[0].memory.lin_key.requires_grad_(True)
    assert_is_right(machine)
    machine.requires_grad_(False)
    with in_one_kernel(), torch.no_grad():
        assert not run(machine, torch.randn(5, 3), [5]).out.requires_grad


def test_second_derivatives_are_those_of_float64():
    grads = []
    for dtype in (torch.float32, torch.float64):
        machine = make().to(dtype)
        torch.manual_seed(0)
        x = torch.randn(7, 3).to(dtype).requires_grad_()
        (slope,) = torch.autograd.grad(machine(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found = [p.grad.flatten() for p in machine.parameters() if p.grad is not None]
        grads.append(torch.cat(found))
    assert_close_to_norm(*grads, 1e-4)


def test_batched_gradients_are_those_one_by_one():
    machine, x = make(SCANS["routed reads"]), torch.randn(7, 3, requires_grad=True)
    with in_one_kernel():
        out = run(machine, x, [4, 3]).out
    directions = torch.randn(3, *out.shape)
    (batched,) = torch.autograd.grad(out, x, directions, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, x, one, retain_graph=True)[0] for one in directions]
    torch.testing.assert_close(batched, torch.stack(single))


def test_batches_of_other_sizes_follow_each_other():
    machine = make(head="token")
    for counts in ((5, 7), (1,), (0, 12, 3), (5, 7), (2, 2, 2, 2)):
        assert_is_right(machine, counts)


# Streams ###########################################################################


PIECES = [[6, 0, 3, 3], [3, 0, 3, 0], [2, 0, 1, 0]]


def read_pieces(machine, xs):
    """Predictions for each piece of a stream, and the last state."""
    state, outs = None, []
    for x, counts in zip(xs, PIECES, strict=True):
        result = run(machine, x, counts, state=state)
        state = result.state
        outs.append(result.out)
    return outs, state


@scans
@cells
def test_a_stream_equals_the_stream_step_by_step(cell, scan):
    machine = make(scan, cell=cell, head="next_token")
    xs = [torch.randn(sum(counts), 3, requires_grad=True) for counts in PIECES]

    def read():
        machine.zero_grad()
        outs, state = read_pieces(machine, xs)
        # What is said last knows the first piece by the states that are carried, and their tail.
        grads = dict(enumerate(torch.autograd.grad(outs[-1].sum(), xs, retain_graph=True)))
        sum(out.square().sum() for out in outs).backward()
        found = {f"out {i}": out.detach() for i, out in enumerate(outs)}
        found |= {"states": state.states.detach(), "tail": state.tail.detach()}
        named = machine.named_parameters()
        return found, grads | {name: p.grad for name, p in named if p.grad is not None}

    assert_same(*both_ways(read))


@scans
@pytest.mark.parametrize("checkpoint_segments", [None, 1])
def test_a_stream_equals_the_whole(checkpoint_segments, scan):
    # Pieces end where segments do; an example may end before the others.
    machine = make(scan, head="token", checkpoint_segments=checkpoint_segments)
    lengths = [sum(counts) for counts in zip(*PIECES, strict=True)]
    whole = torch.randn(sum(lengths), 3)
    examples = [x.split(own) for x, own in zip(
        whole.split(lengths), zip(*PIECES, strict=True), strict=True)]  # fmt: skip
    xs = [torch.cat(parts) for parts in zip(*examples, strict=True)]
    with in_one_kernel():
        result = run(machine, whole, lengths)
        outs, state = read_pieces(machine, xs)
    parts = [out.split(counts) for out, counts in zip(outs, PIECES, strict=True)]
    out = torch.cat([torch.cat(own) for own in zip(*parts, strict=True)])
    assert_close_to_norm(out, result.out, 1e-6, "out")
    assert_close_to_norm(state.states, result.state.states, 1e-6, "states")
    assert_close_to_norm(state.tail, result.state.tail, 1e-6, "tail")
    grads = []
    for found in (out, result.out):
        machine.zero_grad()
        (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in machine.parameters()]))
    assert_close_to_norm(*grads, 1e-5)


def test_a_state_without_a_tail_begins_with_zeros():
    machine = make(head="token")
    x, state = torch.randn(5, 3), run(machine, torch.randn(5, 3), [5]).state.detach()
    zeros = torch.zeros_like(state.tail)
    with in_one_kernel():
        a, b = (run(machine, x, [5], state=replace(state, tail=t)).out for t in (None, zeros))
    assert torch.equal(a, b)


# When not ##########################################################################


@pytest.mark.parametrize(
    ("scan", "message"),
    [
        ({"layers": 2}, "later layers of a scan read what earlier ones found"),
        ({"routed": True}, "the scan's reflections are gated"),
        ({"backend": "chunked"}, "its backend was chosen"),
        ({"backend": "reference"}, "its backend was chosen"),
    ],
    ids=str,
)
def test_scans_that_go_step_by_step(scan, message):
    assert message in reason_of(make(scan))


@pytest.mark.parametrize("options", [{"position": "rotary"}, {"routing_reduce": "mean"}], ids=str)
def test_other_keys_and_sums_go_step_by_step_with_a_scan(options):
    message = "keys or routed sums are not the documented ones, and there is a scan"
    assert reason_of(make(**options)) == message
    assert reason_of(make_machine(**options)) is None


def test_memories_of_very_long_segments_go_step_by_step(monkeypatch):
    monkeypatch.setattr(fused, "SCAN_BYTES", 2 * 64 * 3 * 16 * 4)  # of 64 tokens
    machine = make()
    assert reason_of(machine, (64, 3), segment_length=64) is None
    assert "65 tokens would not fit" in reason_of(machine, (3, 65), segment_length=128)


def test_whatever_speaks_against_a_machine_without_a_scan():
    assert "float64" in reason_of(make().double())
    assert "not every token has an edge" in reason_of(make(top_k=1))
    assert "the history is cut" in reason_of(make(bptt_segments=2))
    assert "steps are recorded" in reason_of(make(), record=True)
    machine = make(SCANS["transition"])
    machine.cell.snap = StateSnap(torch.randn(3, 2, 12))
    with mock.patch.object(sequence, "why_not_fused", wraps=fused.why_not_fused) as ask:
        run(machine, torch.randn(5, 3), [5])
    assert "a snap acts" in fused.why_not_fused(*ask.call_args.args)


def parts_of(machine):
    return dict(machine.cell.scan.named_modules(prefix="scan"))


@pytest.mark.parametrize("name", parts_of(make()))
def test_a_hook_on_any_part_of_the_scan(name):
    machine = make(head="token")
    part = parts_of(machine)[name]
    for register in (
        part.register_forward_pre_hook, part.register_forward_hook,
        part.register_full_backward_hook, part.register_full_backward_pre_hook,
    ):  # fmt: skip
        handle = register(lambda *given: None)
        assert "a part of the scan was replaced, or a hook watches it" in reason_of(machine)
        handle.remove()
    assert reason_of(machine) is None


class OwnScan(SegmentScan):
    def advance(self, states, hoisted, relation):
        states, reads = super().advance(states, hoisted, relation)
        return -states, reads


class OwnHeads(TransitionHeads):
    def steps(self, *given):
        return super().steps(*given)._replace(decay_BSH=None)


def own_scan(machine):
    machine.cell.scan.__class__ = OwnScan


def own_heads(machine):
    machine.cell.scan.layers[0].transition.__class__ = OwnHeads


def own_linear(machine):
    machine.cell.scan.layers[0].transition.lin_key = torch.nn.Linear(16, 8)


def own_steps(machine):
    heads = machine.cell.scan.layers[0].memory
    heads.steps = lambda x, *given: type(heads).steps(heads, -x, *given)


def own_convolution(machine):
    scan = machine.cell.scan
    scan.convolve = lambda x, *given: 2 * SegmentScan.convolve(scan, x, *given)


def no_bias(machine):
    machine.cell.scan.layers[0].memory.lin_beta.bias = None


def other_stretch(machine):
    machine.cell.scan.layers[0].memory.stretch.fill_(0.0)


def parametrised(machine):
    parametrizations.weight_norm(machine.cell.scan.layers[0].memory.lin_value)


@pytest.mark.parametrize(
    "change",
    [own_scan, own_heads, own_linear, own_steps, own_convolution, no_bias, other_stretch,
     parametrised],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_a_part_that_was_replaced_is_the_one_that_acts(change):
    machine = make(head="token")
    change(machine)
    x = torch.randn(14, 3)
    with reasons() as found:
        actual = results(machine, x, [5, 0, 7, 2])
    assert found[0] is not None
    with step_by_step():
        assert_same(actual, results(machine, x, [5, 0, 7, 2]))
