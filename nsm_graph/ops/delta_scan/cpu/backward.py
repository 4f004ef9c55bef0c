"""The gradients of one segment's steps and of the states that they found, token by token back.

The equations stand in the README beside this package.
"""

from __future__ import annotations

import numba

from nsm_graph.ops.cpu.compiled import INLINE, INNER
from nsm_graph.ops.cpu.rows import add, copy
from nsm_graph.ops.delta_scan.cpu import columns
from nsm_graph.ops.delta_scan.cpu.forward import load, slots_of, store


@numba.njit(**INLINE)
def _reads_backward(layout, steps, memories, token, row, d_reads):  # type: ignore[no-untyped-def]
    """Of what a token read."""
    numbers, width, size = steps.rows[row], layout.width, layout.num_states
    one = numbers.dtype.type(1)
    after = slots_of(layout) * (token + 1)
    for head in range(layout.transition):
        slope = d_reads[row, head * width : (head + 1) * width]
        d_memory = memories.d_states[head, 0]
        if layout.reads == 1:
            columns.decay_and_write(d_memory, d_memory, one, one, slope, memories.mean)
        else:
            columns.decay_and_write(d_memory, d_memory, one, one, slope, steps.weights[row])
            columns.combine(memories.line, slope, memories.states[head, after])
            add(steps.d_weights[row, :size], memories.line)
    for head in range(layout.memory):
        place, query = (layout.transition + head) * width, layout.query + head * size
        memories.line[:] = one - one
        copy(memories.line[:width], d_reads[row, place : place + width])
        columns.contract(memories.numbers, memories.held[head, token + 1], memories.line)
        copy(steps.d_rows[row, query : query + size], memories.numbers)
        d_memory = memories.d_held[head, 0]
        columns.decay_and_write(
            d_memory, d_memory, one, one, numbers[query : query + size], memories.line
        )


@numba.njit(**INLINE)
def _write_backward(layout, steps, memories, token, row):  # type: ignore[no-untyped-def]
    """Of what a token wrote, and of its decay."""
    numbers, d_numbers, width = steps.rows[row], steps.d_rows[row], layout.width
    one, zero = numbers.dtype.type(1), numbers.dtype.type(0)
    corrected = slots_of(layout) * token + 1
    for head in range(layout.transition):
        d_memory = memories.d_states[head, 0]
        if layout.writes:
            place, share = layout.value + head * width, numbers[layout.write + head]
            value, d_value = numbers[place : place + width], d_numbers[place : place + width]
            columns.contract(memories.numbers, d_memory, steps.weights[row])
            columns.mix(d_value, memories.numbers, share, value, zero)
            d_numbers[layout.write + head] = columns.dot(value, memories.numbers)
            columns.combine(memories.line, value, d_memory)
            d_weights = steps.d_weights[row, : layout.num_states]
            columns.mix(d_weights, d_weights, one, memories.line, share)
        if layout.decays:
            own = d_memory[:width]
            found = memories.states[head, corrected]
            d_numbers[layout.decay + head] = columns.inner(own, found)
            decay = numbers[layout.decay + head]
            columns.decay_and_write(own, own, decay, zero, numbers[:width], memories.mean)


@numba.njit(**INLINE)
def _compose_backward(layout, steps, memories, token, row):  # type: ignore[no-untyped-def]
    """Of a token's reflections, the last one first.

    The memory that a reflection found is the token's less what those before it took.
    """
    numbers, d_numbers = steps.rows[row], steps.d_rows[row]
    width, reflections = layout.width, layout.reflections
    one, slopes = numbers.dtype.type(1), memories.slopes
    first = slots_of(layout) * token
    for r in range(reflections - 1, -1, -1):
        for head in range(layout.transition):
            d_memory, found = memories.d_states[head, 0], memories.states[head, first]
            errors = memories.state_errors[head, token * reflections : (token + 1) * reflections]
            place = head * reflections + r
            key = numbers[place * width : (place + 1) * width]
            d_key = d_numbers[place * width : (place + 1) * width]
            beta = numbers[layout.gates + place] + numbers[layout.gates + place]
            columns.correct(d_memory, slopes, d_memory, key, beta, memories.mean)
            columns.contract_both(memories.numbers, d_memory, errors[r], found, slopes)
            along = columns.dot(errors[r], slopes)
            columns.mix(d_key, memories.numbers, -beta, key, -beta * beta * along)
            for other in range(r):
                place = head * reflections + other
                taken = numbers[layout.gates + place] + numbers[layout.gates + place]
                taken *= beta * columns.dot(errors[other], slopes)
                columns.mix(d_key, d_key, one, numbers[place * width : (place + 1) * width], taken)
            d_numbers[layout.gates + head * reflections + r] = -(along + along)


@numba.njit(**INLINE)
def _recall_backward(layout, steps, memories, token, row):  # type: ignore[no-untyped-def]
    """Of what a token held in memory heads."""
    numbers, d_numbers = steps.rows[row], steps.d_rows[row]
    width, size, slopes = layout.width, layout.num_states, memories.slopes
    for head in range(layout.memory):
        d_memory, errors = memories.d_held[head, 0], memories.held_errors[head, token]
        place = layout.memory_key + head * size
        key, d_key = numbers[place : place + size], d_numbers[place : place + size]
        beta = numbers[layout.memory_beta + head]
        columns.correct(d_memory, slopes, d_memory, key, beta, memories.mean)
        columns.contract_both(
            memories.numbers, d_memory, errors, memories.held[head, token], slopes
        )
        along = columns.dot(errors, slopes)
        columns.mix(d_key, memories.numbers, -beta, key, -beta * beta * along)
        d_numbers[layout.memory_beta + head] = -along
        place = layout.memory_value + head * width
        d_value = d_numbers[place : place + width]
        for j in range(width):
            d_value[j] = beta * slopes[j]


@numba.njit(**INNER)
def scan_backward(layout, steps, memories, d_after, d_before, first, count, d_reads):  # type: ignore[no-untyped-def]
    """Gradients of rows ``first`` to ``first + count`` of the steps, and of the states before.

    ``memories`` are those that :func:`scan` has just left. Adds to ``steps.d_weights``. Both state
    gradients may be one array. Without ``d_reads`` (no rows) nobody asked for what was read.
    """
    # What stands behind them as well: an example before, of no numbers, may have left its own.
    memories.d_states[:] = memories.d_states.dtype.type(0)
    memories.d_held[:] = memories.d_held.dtype.type(0)
    load(layout, memories.d_states, memories.d_held, 0, d_after)
    for token in range(count - 1, -1, -1):
        row = first + token
        if d_reads.shape[0] > 0:
            _reads_backward(layout, steps, memories, token, row, d_reads)
        else:
            queries = slice(layout.query, layout.query + layout.memory * layout.num_states)
            steps.d_rows[row, queries] = steps.d_rows.dtype.type(0)
        if slots_of(layout) > 1:
            _write_backward(layout, steps, memories, token, row)
        _compose_backward(layout, steps, memories, token, row)
        _recall_backward(layout, steps, memories, token, row)
    store(layout, d_before, memories.d_states, 0, memories.d_held, 0, d_after)
