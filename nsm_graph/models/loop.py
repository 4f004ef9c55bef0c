"""The loop over segments: one function; how its history is kept is decided here.

Every driver computes the same numbers: *eager* keeps all activations, *checkpointed* keeps only
chunk boundaries and recomputes inside backward, *truncated* cuts the history every few segments.
A compiled cell (`cell.compile()`) fits any of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsm_graph.models.cell import CellOutput, SegmentInputs, StateMachineCell


@dataclass
class Trace:
    """What the loop leaves behind, rows in reading order."""

    states: Tensor  #: ``[B N, C]``, final
    cell: Tensor | None  #: ``[B N, C]``, final
    before: list[Tensor] = field(default_factory=list)  #: states as each step found them
    after: list[Tensor] = field(default_factory=list)  #: states as each step left them
    reads: list[Tensor | None] = field(default_factory=list)  #: the scan's per-token reads
    outputs: list[CellOutput] = field(default_factory=list)  #: where ``record=True``


def read_segments(
    cell: StateMachineCell,
    states: Tensor,
    cell_states: Tensor | None,
    inputs: list[SegmentInputs],
    *,
    bptt_segments: int | None = None,
    checkpoint_segments: int | str | None = None,
    record: bool = False,
) -> Trace:
    """Reads segment after segment into the states.

    Args:
        cell: Reads one segment.
        states: ``[B N, C]``, examples in reading order.
        cell_states: The same of an LSTM's cell.
        inputs: What each step reads; step t concerns the first rows only.
        bptt_segments: Cut the history after so many segments.
        checkpoint_segments: Recompute chunks of so many segments in backward; ``"sqrt"`` for the
            square root of their number.
        record: Keep every output of the cell.
    """
    chunk = chunk_size(checkpoint_segments, len(inputs))
    trace = Trace(states, cell_states)
    finished: list[tuple[Tensor, Tensor | None]] = []
    for start in range(0, len(inputs), chunk):
        part = inputs[start : start + chunk]
        arguments = (cell, states, cell_states, part, start, bptt_segments, record)
        if checkpoint_segments is None or not torch.is_grad_enabled():
            result = _read_chunk(*arguments)
        else:
            result = checkpoint(_read_chunk, *arguments, use_reentrant=False)
        states, cell_states, done, after, before, reads, outputs = result
        finished += done
        trace.after += after
        trace.before += before
        trace.reads += reads
        trace.outputs += outputs
    # Examples finish from the back; put them behind those that read to the end.
    finished.append((states, cell_states))
    trace.states = torch.cat([rows for rows, _ in reversed(finished)])
    if cell_states is not None:
        trace.cell = torch.cat([rows for _, rows in reversed(finished) if rows is not None])
    return trace


def _read_chunk(
    cell: StateMachineCell,
    states: Tensor,
    cell_states: Tensor | None,
    inputs: list[SegmentInputs],
    first_step: int,
    bptt_segments: int | None,
    record: bool,
) -> tuple:
    finished, before, after, reads, outputs = [], [], [], [], []
    for step, segment in enumerate(inputs, first_step):
        num_rows = segment.relation.num_dst
        if num_rows < states.size(0):
            rest = None if cell_states is None else cell_states[num_rows:]
            finished.append((states[num_rows:], rest))
            states = states[:num_rows]
            cell_states = None if cell_states is None else cell_states[:num_rows]
        if bptt_segments is not None and step > 0 and step % bptt_segments == 0:
            states = states.detach()
            cell_states = None if cell_states is None else cell_states.detach()
        before.append(states)
        output = cell(states, cell_states, segment, record)
        states, cell_states = output.states, output.propagated.cell
        after.append(states)
        reads.append(output.reads)
        if record:
            outputs.append(output)
    return states, cell_states, finished, after, before, reads, outputs


def chunk_size(checkpoint_segments: int | str | None, num_segments: int) -> int:
    """How many segments are read, or recomputed, in one piece."""
    if checkpoint_segments is None:
        return max(num_segments, 1)
    if checkpoint_segments == "sqrt":
        return max(math.isqrt(num_segments), 1)
    return int(checkpoint_segments)
