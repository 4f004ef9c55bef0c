"""Reading sequences: hoist what depends on tokens only, then loop over segments."""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.models.cell import StateMachineCell
from nsm_graph.models.fused import read_fused, say_why_not, why_not_fused
from nsm_graph.models.loop import Trace, read_segments
from nsm_graph.models.segments import SegmentPlan
from nsm_graph.models.state import MachineState, Reading, Record, ScanTokens


def read_sequence(
    cell: StateMachineCell,
    tokens: Tensor,
    plan: SegmentPlan,
    state: MachineState,
    importance: Tensor,
    *,
    segment_length: int,
    scanned: ScanTokens | None,
    tokens_read: bool,
    bptt_segments: int | None,
    checkpoint_segments: int | str | None,
    record: Record | None,
) -> Reading:
    """Reads all segments of a batch.

    Args:
        cell: Reads one segment.
        tokens: Embedded tokens in input order, ``[T, C_t]``.
        plan: The reading order.
        state: The memory before, examples in input order.
        importance: Learnable importance of every slot.
        segment_length: Tokens of a full segment.
        scanned: What the scan reads; ``None`` without one.
        tokens_read: Whether tokens are to read, from states or a scan.
        bptt_segments: See :func:`nsm_graph.models.loop.read_segments`.
        checkpoint_segments: The same.
        record: To be filled, where given.
    """
    num_states = state.slots.numel()
    states = _reorder(state.states, plan.example_order, num_states)
    cell_states = None
    if state.cell is not None:
        cell_states = _reorder(state.cell, plan.example_order, num_states)
    reads: Tensor | None
    reason = why_not_fused(
        cell, states, record=record is not None, bptt_segments=bptt_segments,
        num_states=num_states, longest=plan.relation.sources.max_count,
    )  # fmt: skip
    if reason is None:
        keep = checkpoint_segments is None
        trace, mass, reads = read_fused(
            cell, states, cell_states, tokens, plan, importance, state.slots, keep,
            scanned=scanned, scan_reads=tokens_read,
        )  # fmt: skip
        tokens = tokens[plan.token_order] if tokens_read else tokens
    else:
        say_why_not(reason)
        tokens = tokens[plan.token_order]
        scan_tokens = None
        if scanned is not None:
            scan_tokens = cell.scan.convolve(*scanned)[plan.token_order]
        hoisted, weights = cell.hoist(
            tokens,
            plan.place[plan.token_order],
            plan.relation,
            importance,
            state.slots,
            scan_tokens=scan_tokens,
            scan_reads=tokens_read,
        )
        mass = cell.routing_mass(weights, hoisted.relation)
        first_step = 0
        if cell.topology is not None and cell.topology.is_dynamic:
            # Streams that are read together count their steps together, by the longest.
            first_step = -(-int(state.num_tokens.max()) // segment_length)
        inputs = cell.connect(cell.split(hoisted, plan.steps), state.slots, first_step)
        trace = read_segments(
            cell,
            states,
            cell_states,
            inputs,
            bptt_segments=bptt_segments,
            checkpoint_segments=checkpoint_segments,
            record=record is not None,
        )
        found = [read for read in trace.reads if read is not None]
        reads = plan.relation.sources.unpad(torch.cat(found)) if found else None
        if record is not None:
            _fill(record, plan, trace, weights, [step.relation for step in inputs])
    rank = torch.argsort(plan.example_order)
    num_read = torch.zeros_like(state.num_tokens).index_add(
        0, plan.group_example, plan.relation.sources.ptr.diff()
    )
    new_state = MachineState(
        _reorder(trace.states, rank, num_states),
        None if trace.cell is None else _reorder(trace.cell, rank, num_states),
        state.num_tokens + num_read,
        state.slots,
        state.tail,
    )
    return Reading(
        state=new_state,
        tokens=tokens,
        token_order=plan.token_order,
        relation=plan.relation,
        before=trace.before,
        after=trace.after,
        reads=reads,
        groups=plan.group_example,
        mass=mass,
    )


def _reorder(rows: Tensor, order: Tensor, num_states: int) -> Tensor:
    """Puts the examples of ``[B N, C]`` into another order."""
    if order.numel() <= 1:
        return rows
    # One gather of rows: the result is no view, whose base a compiled cell would look at, too.
    within = torch.arange(num_states, device=order.device)
    return rows[(order.unsqueeze(1) * num_states + within).flatten()]


def _fill(
    record: Record, plan: SegmentPlan, trace: Trace, weights: Tensor | None, relations: list
) -> None:
    num_steps = len(plan.steps)
    record.examples += [plan.example_order[: step.num_examples] for step in plan.steps]
    record.tokens += plan.token_order.split([step.num_src for step in plan.steps])
    record.relations += relations
    sizes = [relation.num_edges for relation in relations]
    record.routing += [None] * num_steps if weights is None else weights.split(sizes)
    record.attention += [output.attention for output in trace.outputs]
    record.gates += [output.propagated.gates for output in trace.outputs]
    record.states += trace.after
    record.topologies += [output.talks for output in trace.outputs]
    record.margins += [output.margin for output in trace.outputs]
