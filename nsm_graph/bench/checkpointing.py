"""What checkpoints along the segments save in memory and cost in time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from nsm_graph.bench.documented import (
    HEADS,
    SEGMENT,
    gradient,
    is_close,
    make_batch,
    make_machine,
    peak_of_first,
    step,
    whole_segments,
)
from nsm_graph.bench.record import BenchRecord, interleaved_medians
from nsm_graph.models import NeuralStateMachine
from nsm_graph.models.fused import loop_weights
from nsm_graph.models.loop import read_segments
from nsm_graph.models.segments import plan_segments
from nsm_graph.ops.segment_loop import LoopSegments, segment_loop

#: 64 segments.
EXAMPLES, LENGTH = 32, 1024
#: At most 1.4 times the time; at least 75 % less memory for what the loop makes.
TIME, MEMORY = 1 / 1.4, 4.0


def bench_checkpointing(*, repetitions: int = 5, scale: float = 1.0) -> list[BenchRecord]:
    """A step with `checkpoint_segments="sqrt"` beside one that keeps everything.

    Args:
        repetitions: Timed turns of each.
        scale: Share of the length; less than 1 for a quick look.
    """
    lengths = [whole_segments(LENGTH * scale)] * EXAMPLES
    return [
        record
        for fuse, form in ((True, "one kernel"), (False, "step by step"))
        for record in _compare(form, fuse, lengths, repetitions)
    ]


def _compare(form: str, fuse: bool, lengths: list[int], repetitions: int) -> list[BenchRecord]:
    x, batch = make_batch(lengths)
    machines = {"sqrt": make_machine(checkpoint_segments="sqrt"), "none": make_machine()}
    gradients = {}
    for name, machine in machines.items():
        machine.cell.fuse = fuse
        step(machine, x, batch)
        gradients[name] = gradient(machine)
    is_right = is_close(gradients["sqrt"], gradients["none"], 1e-6)

    steps = {name: partial(step, machine, x, batch) for name, machine in machines.items()}
    loops = {name: _loop_of(machine, lengths) for name, machine in machines.items()}
    time = interleaved_medians(steps, repetitions, untimed=1)
    loop_time = interleaved_medians(loops, 1)
    whole = {name: peak_of_first(run) for name, run in steps.items()}
    loop = {name: peak_of_first(run) for name, run in loops.items()}

    case = f"{lengths[0] // SEGMENT} segments, checkpoints, {form}"
    return [
        BenchRecord(
            f"{case}: {what}", "no checkpoints", ms["sqrt"], ms["none"], is_right, target,
            ours_mib=mib["sqrt"], peer_mib=mib["none"], measure=measure,
        )
        for what, ms, mib, measure, target in (
            ("time", time, whole, "ms", TIME),
            ("memory of the step", time, whole, "mib", 1.0),
            ("memory of the loop", loop_time, loop, "mib", MEMORY),
        )
    ]  # fmt: skip


def _loop_of(machine: NeuralStateMachine, lengths: list[int]) -> Callable[[], None]:
    """Forward and backward of the loop, without what is hoisted out of it.

    What it reads is there before; that its gradients need room is counted, with checkpoints or not.
    """
    cell, slots = machine.cell, machine.manager.slots
    plan = plan_segments(lengths, machine.segment_length or 1, slots.numel(), slots.device)
    tokens, _ = make_batch(lengths)
    with torch.no_grad():
        hoisted, _ = cell.hoist(tokens, plan.place, plan.relation, machine.manager.importance, None)
        states = machine.manager.initial(len(lengths))
    routed, key = hoisted.routed, hoisted.key  # the key is the value, too
    assert routed is not None
    assert key is not None
    routed.requires_grad_()
    key.requires_grad_()
    checkpoints = machine.checkpoint_segments
    num_active = torch.tensor([relation.num_examples for relation in plan.steps])
    segments = LoopSegments(plan.groups.ptr, num_active)

    def run() -> None:
        machine.zero_grad()
        key.grad = routed.grad = None
        if cell.fuse:
            _, final = segment_loop(
                states, routed, key, key, segments, loop_weights(cell), HEADS,
                keep=checkpoints is None,
            )  # fmt: skip
        else:
            inputs = cell.connect(cell.split(hoisted, plan.steps), slots)
            final = read_segments(
                cell, states, None, inputs, checkpoint_segments=checkpoints
            ).states
        final.square().sum().backward()

    return run
