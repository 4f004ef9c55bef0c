"""The steps of one segment, applied to the states of its example."""

from __future__ import annotations

import numba

from nsm_graph.ops.cpu import vectors
from nsm_graph.ops.cpu.compiled import INLINE, INNER
from nsm_graph.ops.cpu.rows import copy
from nsm_graph.ops.delta_scan.cpu import columns


@numba.njit(**INLINE)
def slots_of(layout):  # type: ignore[no-untyped-def]
    """Memories that a token leaves in transition heads: corrected, and then decayed and written."""
    return 2 if layout.decays or layout.writes else 1


@numba.njit(**INLINE)
def _compose(layout, steps, memories, token, row, reads):  # type: ignore[no-untyped-def]
    """A token in transition heads. Heads take turns: none waits for the sums of another."""
    numbers, width, reflections = steps.rows[row], layout.width, layout.reflections
    one, zero = numbers.dtype.type(1), numbers.dtype.type(0)
    slots = slots_of(layout)
    first, corrected, after = slots * token, slots * token + 1, slots * (token + 1)
    for r in range(reflections):
        for head in range(layout.transition):
            place = head * reflections + r
            memory = memories.states[head]
            columns.correct(
                memory[corrected], memories.state_errors[head, token * reflections + r],
                memory[first if r == 0 else corrected],
                numbers[place * width : (place + 1) * width],
                numbers[layout.gates + place] + numbers[layout.gates + place], memories.mean,
            )  # fmt: skip
    if slots > 1:
        for head in range(layout.transition):
            decay, share, value = one, zero, numbers[:width]
            if layout.decays:
                decay = numbers[layout.decay + head]
            if layout.writes:
                share = numbers[layout.write + head]
                place = layout.value + head * width
                value = numbers[place : place + width]
            memory = memories.states[head]
            columns.decay_and_write(
                memory[after], memory[corrected], decay, share, value, steps.weights[row]
            )
    if reads.shape[0] > 0:
        for head in range(layout.transition):
            along = memories.mean if layout.reads == 1 else steps.weights[row]
            columns.contract(memories.numbers, memories.states[head, after], along)
            copy(reads[row, head * width : (head + 1) * width], memories.numbers)


@numba.njit(**INLINE)
def _recall(layout, steps, memories, token, row, reads):  # type: ignore[no-untyped-def]
    """A token in memory heads: holds its value under its key, then reads with its query."""
    numbers, width, size = steps.rows[row], layout.width, layout.num_states
    line = memories.line
    for head in range(layout.memory):
        memory = memories.held[head]
        line[:] = line.dtype.type(0)  # what stands behind must not come near a memory
        copy(line[:width], numbers[layout.memory_value + head * width :])
        key = numbers[layout.memory_key + head * size : layout.memory_key + (head + 1) * size]
        columns.correct_to(
            memory[token + 1], memories.held_errors[head, token], memory[token], key,
            numbers[layout.memory_beta + head], line,
        )  # fmt: skip
        if reads.shape[0] > 0:
            query = numbers[layout.query + head * size : layout.query + (head + 1) * size]
            columns.combine(line, query, memory[token + 1])
            place = (layout.transition + head) * width
            copy(reads[row, place : place + width], line)


@numba.njit(**INNER)
def load(layout, states, held, first, rows):  # type: ignore[no-untyped-def]
    """Slot ``first`` of the memories, from an example's rows, ``[N, C]``."""
    width = layout.width
    for head in range(layout.transition):
        own = rows[:, head * width : (head + 1) * width]
        vectors.transpose(states[head, first], own)
    for head in range(layout.memory):
        place = (layout.transition + head) * width
        for n in range(layout.num_states):
            copy(held[head, first, n, :width], rows[n, place : place + width])


@numba.njit(**INNER)
def store(layout, rows, states, last, held, last_held, others):  # type: ignore[no-untyped-def]
    """An example's rows from these slots; channels that no head owns from ``others``."""
    width, size = layout.width, layout.num_states
    for head in range(layout.transition):
        out = rows[:, head * width : (head + 1) * width]
        vectors.transpose(out, states[head, last, :width, :size])
    rest = (layout.transition + layout.memory) * width
    for n in range(size):
        for head in range(layout.memory):
            place = (layout.transition + head) * width
            copy(rows[n, place : place + width], held[head, last_held, n])
        copy(rows[n, rest:], others[n, rest:])


@numba.njit(**INNER)
def scan(layout, steps, memories, after, before, first, count, reads):  # type: ignore[no-untyped-def]
    """``count`` tokens of one example, from row ``first`` on: its states ``[N, C]`` after them.

    Leaves in ``memories`` what backward needs. Channels that no head of the scan owns are copied.
    Without ``reads`` (no rows) nobody asks for what is read.
    """
    load(layout, memories.states, memories.held, 0, before)
    for token in range(count):
        _compose(layout, steps, memories, token, first + token, reads)
        _recall(layout, steps, memories, token, first + token, reads)
    last = slots_of(layout) * count
    store(layout, after, memories.states, last, memories.held, count, before)
