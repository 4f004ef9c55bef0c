"""The segment loop backward: one step, and all of them from the last to the first.

Legend as in `forward.py`; the equations stand in the README beside this package, numbered.
"""

from __future__ import annotations

from functools import partial

import numba

from nsm_graph.ops.cpu import vectors
from nsm_graph.ops.cpu.compiled import BORROWING, INNER, Kernel
from nsm_graph.ops.cpu.matmul import add_product, multiply
from nsm_graph.ops.cpu.rows import add, add_columns, add_rows, copy, copy_rows
from nsm_graph.ops.hoist.cpu import hoist_block, hoist_block_backward, project, route
from nsm_graph.ops.segment_loop.cpu.arrays import (
    Array,
    Cells,
    Made,
    Rows,
    Scratch,
    Segments,
    TokenGrads,
    Tokens,
    Weights,
)
from nsm_graph.ops.segment_loop.cpu.forward import take_step, update_cell
from nsm_graph.ops.segment_loop.cpu.history import recall, recall_scan
from nsm_graph.ops.segment_loop.cpu.scan import (
    Block,
    Scan,
    ScanGrads,
    make_block,
    read_tokens,
    scan_block,
    scan_block_backward,
    share_weights,
)

# One step ##########################################################################


@numba.njit(**INNER)
def _attend_backward(  # type: ignore[no-untyped-def]
    d_query, d_key, d_value, d_out, weights, query, key, value, turned, slopes, is_shared
):
    """Gradients of the three operands; a key that is the value, too, has the sum of both."""
    turned = turned[: d_out.shape[1]]
    vectors.transpose(turned, d_out)
    multiply(slopes, value, turned)
    vectors.softmax_columns_backward(slopes, weights)
    multiply(d_value, weights, d_out)
    multiply(d_query, slopes.T, key)
    if is_shared:
        add_product(d_key, slopes, query)
    else:
        multiply(d_key, slopes, query)


@numba.njit(**INNER)
def _talk_backward(  # type: ignore[no-untyped-def]
    w, t, made, scratch, grads, count, num_states, heads
):
    """From the gradient of the step's result to that of the propagated state, in place."""
    channels, gated = scratch.d_state.shape[1], made.mixed.shape[1]
    others = channels - gated
    width = gated // heads
    num_rows = count * num_states
    d_state, d_qkv = scratch.d_state[:num_rows], scratch.d_qkv[:num_rows]
    d_mixed, turned, slopes = scratch.d_mixed[:num_rows], scratch.turned, scratch.slopes
    one = d_state.dtype.type(1)
    share = one / d_state.dtype.type(gated)
    for i in range(num_rows):
        d, normal, inverse = d_state[i, others:], made.normal[i], made.inverse[i]
        mean = one - one
        along = one - one
        for j in range(gated):
            grads.scale[j] += d[j] * normal[j]
        for j in range(gated):
            grads.shift[j] += d[j]
        for j in range(gated):
            d[j] *= w.scale[j]
            mean += d[j]
            along += d[j] * normal[j]
        mean *= share
        along *= share
        for j in range(gated):
            d[j] = inverse * (d[j] - mean - normal[j] * along)
        for j in range(gated):
            grads.mix_bias[j] += d[j]
    qkv, d_gated = made.qkv[:num_rows], d_state[:, others:]
    add_product(grads.mix, made.mixed[:num_rows].T, d_gated)
    multiply(d_mixed, d_gated, t.mix)
    size = num_states * num_states
    place = 0
    for example in range(count):
        mine = slice(example * num_states, (example + 1) * num_states)
        for head in range(heads):
            first = head * width
            q = slice(first, first + width)
            k = slice(gated + first, gated + first + width)
            v = slice(2 * gated + first, 2 * gated + first + width)
            weights = made.talk[place : place + size].reshape(num_states, num_states)
            place += size
            _attend_backward(
                d_qkv[mine, q], d_qkv[mine, k], d_qkv[mine, v], d_mixed[mine, q], weights,
                qkv[mine, q], qkv[mine, k], qkv[mine, v], turned,
                slopes[:size].reshape(num_states, num_states), False,
            )  # fmt: skip
    add_columns(grads.qkv_bias, d_qkv, 0)
    propagated = made.x[:num_rows, 2 * channels + gated : 2 * channels + 2 * gated]
    add_product(grads.qkv, propagated.T, d_qkv)
    add_product(d_gated, d_qkv, t.qkv)


@numba.njit(**INNER)
def _gru_backward(t, made, scratch, grads, num_rows):  # type: ignore[no-untyped-def]
    """From the gradient of the propagated state to those of state before and update, in ``d_x``."""
    channels, gated = made.query.shape[1], made.mixed.shape[1]
    others = channels - gated
    one = made.x.dtype.type(1)
    x = made.x[:num_rows]
    d_state, dg, dx = (
        scratch.d_state[:num_rows], scratch.d_gates[:num_rows], scratch.d_x[:num_rows],
    )  # fmt: skip
    for i in range(num_rows):
        state, gates, d = x[i, :gated], made.gates[i], d_state[i, others:]
        mix, candidate = gates[gated : 2 * gated], gates[2 * gated :]
        d_mix, d_candidate = dg[i, gated : 2 * gated], dg[i, 2 * gated :]
        for j in range(gated):
            d_candidate[j] = d[j] * mix[j] * (one - candidate[j] * candidate[j])
        for j in range(gated):
            d_mix[j] = d[j] * (candidate[j] - state[j]) * mix[j] * (one - mix[j])
        for j in range(gated):
            d[j] *= one - mix[j]
    # Columns of dx: gated, kept, update, reset * gated.
    add_product(grads.candidate, x[:, gated : gated + 2 * channels].T, dg[:, 2 * gated :])
    multiply(dx[:, gated:], dg[:, 2 * gated :], t.candidate)
    for i in range(num_rows):
        state, reset, d = x[i, :gated], made.gates[i, :gated], d_state[i, others:]
        d_reset, d_both = dg[i, :gated], dx[i, 2 * channels :]
        for j in range(gated):
            d_reset[j] = d_both[j] * state[j] * reset[j] * (one - reset[j])
        d_before = dx[i, :gated]
        for j in range(gated):
            d_before[j] = d[j] + d_both[j] * reset[j]
    add_columns(grads.gates_bias, dg, 0)
    add_columns(grads.candidate_bias, dg, 2 * gated)
    add_product(grads.gates, x[:, : 2 * channels].T, dg[:, : 2 * gated])
    add_product(dx[:, : 2 * channels], dg[:, : 2 * gated], t.gates)


@numba.njit(**INNER)
def _lstm_backward(t, made, scratch, grads, found, num_rows):  # type: ignore[no-untyped-def]
    """The same of an LSTM that ``found`` these cells, and from their gradient to that before."""
    channels, gated = made.query.shape[1], made.mixed.shape[1]
    others = channels - gated
    zero, one = made.x.dtype.type(0), made.x.dtype.type(1)
    dg, dx = scratch.d_gates[:num_rows], scratch.d_x[:num_rows, : 2 * channels]
    for i in range(num_rows):
        gates, row = made.gates[i], dg[i]
        input_gate, forget_gate = gates[:gated], gates[gated : 2 * gated]
        output_gate, candidate = gates[2 * gated : 3 * gated], gates[3 * gated :]
        d_input_gate, d_forget_gate = row[:gated], row[gated : 2 * gated]
        d_output_gate, d_candidate = row[2 * gated : 3 * gated], row[3 * gated :]
        tanh_cell = made.x[i, 2 * channels : 2 * channels + gated]
        before = found[i * gated : (i + 1) * gated]
        d, d_cell = scratch.d_state[i, others:], scratch.d_cell[i]
        for j in range(gated):
            d_output_gate[j] = d[j] * tanh_cell[j] * output_gate[j] * (one - output_gate[j])
        for j in range(gated):
            d_cell[j] += d[j] * output_gate[j] * (one - tanh_cell[j] * tanh_cell[j])
        for j in range(gated):
            d_input_gate[j] = d_cell[j] * candidate[j] * input_gate[j] * (one - input_gate[j])
        for j in range(gated):
            d_forget_gate[j] = d_cell[j] * before[j] * forget_gate[j] * (one - forget_gate[j])
        for j in range(gated):
            d_candidate[j] = d_cell[j] * input_gate[j] * (one - candidate[j] * candidate[j])
        for j in range(gated):
            d_cell[j] *= forget_gate[j]
    add_columns(grads.gates_bias, dg, 0)
    add_product(grads.gates, made.x[:num_rows, : 2 * channels].T, dg)
    dx[:] = zero
    add_product(dx, dg, t.gates)


@numba.njit(**INNER)
def _read_backward(  # type: ignore[no-untyped-def]
    t, made, scratch, grads, found, key, value, d_key, d_value, d_routed, token_ptr, group, count,
    num_states, heads, is_shared,
):  # fmt: skip
    """From the gradient of the propagated state to that of the state before, in place.

    Kept channels hand on what they were handed back, and add what the step read of them.
    """
    channels, gated = key.shape[1], made.mixed.shape[1]
    others = channels - gated
    width = channels // heads
    num_rows = count * num_states
    x = made.x[:num_rows]
    d_state, dx = scratch.d_state[:num_rows], scratch.d_x[:num_rows]
    d_query, d_attended = scratch.d_query[:num_rows], scratch.d_attended[:num_rows]
    turned, slopes = scratch.turned, scratch.slopes
    query, attended = made.query[:num_rows], made.attended[:num_rows]
    if t.candidate.shape[0] > 0:
        _gru_backward(t, made, scratch, grads, num_rows)
    else:
        _lstm_backward(t, made, scratch, grads, found, num_rows)
    d_update = dx[:, channels : 2 * channels]
    for i in range(num_rows):
        copy(d_routed[i, :channels], dx[i, channels : 2 * channels])
    add_columns(grads.out_bias, dx, channels)
    add_product(grads.out, attended.T, d_update)
    multiply(d_attended, d_update, t.out)
    for example in range(count):
        first = token_ptr[group + example] - token_ptr[group]
        end = token_ptr[group + example + 1] - token_ptr[group]
        mine = slice(example * num_states, (example + 1) * num_states)
        place = first * heads * num_states
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            size = (end - first) * num_states
            weights = made.weights[place : place + size].reshape(end - first, num_states)
            place += size
            _attend_backward(
                d_query[mine, columns], d_key[first:end, columns], d_value[first:end, columns],
                d_attended[mine, columns], weights, query[mine, columns],
                key[first:end, columns], value[first:end, columns], turned,
                slopes[:size].reshape(end - first, num_states), is_shared,
            )  # fmt: skip
    add_columns(grads.query_bias, d_query, 0)
    add_product(grads.query, x[:, :channels].T, d_query)
    add_product(dx[:, :channels], d_query, t.query)
    for i in range(num_rows):
        copy(d_state[i, others:], dx[i, :gated])
        add(d_state[i, :others], dx[i, gated:channels])


# All steps #########################################################################


@numba.njit(**INNER)
def _fill_rows(rows, numbers, count):  # type: ignore[no-untyped-def]
    """``rows[:count] = numbers``, row after row."""
    channels = rows.shape[1]
    for i in range(count):
        copy(rows[i], numbers[i * channels : (i + 1) * channels])


@partial(Kernel, options=BORROWING)
def backward_kernel(
    d_after: Array,
    d_final: Array,
    d_final_cell: Array,
    states: Array,
    cells: Cells,
    rows: Rows,
    tokens: Tokens,
    scan: Scan,
    segments: Segments,
    w: Weights,
    t: Weights,
    made: Made,
    scratch: Scratch,
    kept: Array,
    places: Array,
    after: Array,
    grads: Weights,
    d_states: Array,
    d_cells: Array,
    d_rows: Rows,
    d_tokens: TokenGrads,
    d_scan: ScanGrads,
    heads: int,
    talk_heads: int,
    num_states: int,
    chunks: Array,
    is_shared: bool,
) -> None:
    """Gradients of everything, of the chunks of examples named; adds to ``grads``.

    ``d_after``, ``d_final``, ``d_final_cell`` may be empty: nobody asked for that result.
    """
    channels, gated, ptr = states.shape[1], made.mixed.shape[1], segments.token_ptr
    has_tokens = tokens.x.shape[0] > 0
    zero = states.dtype.type(0)
    d_state, d_cell = scratch.d_state, scratch.d_cell
    is_lstm = w.candidate.shape[0] == 0
    for chunk in range(chunks.shape[0]):
        example = chunks[chunk, 0]
        known = 0  # examples whose gradient has been carried here from a later step
        for step in range(segments.num_active.shape[0] - 1, -1, -1):
            count = min(chunks[chunk, 1], segments.num_active[step]) - example
            if count <= 0:
                continue
            group = segments.first_group[step] + example
            first, end = ptr[group], ptr[group + count]
            num_rows = count * num_states
            before = states[example * num_states :]
            if step > 0:
                before = after[(segments.first_group[step - 1] + example) * num_states :]
            key, value, routed = scratch.rows.key, scratch.rows.value, scratch.rows.routed
            d_key, d_value, d_routed = (
                scratch.d_rows.key, scratch.d_rows.value, scratch.d_rows.routed,
            )  # fmt: skip
            if not has_tokens:
                key, value = rows.key[first:end], rows.value[first:end]
                routed = rows.routed[group * num_states :]
                d_key, d_value = d_rows.key[first:end], d_rows.value[first:end]
                d_routed = d_rows.routed[group * num_states :]
            elif kept.shape[0] > 0:
                route(
                    tokens.weights, scratch.hoist, tokens.x, tokens.first, ptr, group,
                    group + count, tokens.heads, num_states,
                )  # fmt: skip
                project(tokens.weights, scratch.hoist, end - first, key, value)
            else:
                hoist_block(
                    tokens.weights, scratch.hoist, tokens.x, tokens.first, ptr, group,
                    group + count, key, value, routed, tokens.heads, num_states,
                )  # fmt: skip
            block = Block(step, example, group, group + count)
            read = before  # the states that the step reads
            if scan.x.shape[0] > 0:
                read_tokens(scan, scratch.scan, tokens.first, segments, block)
                share_weights(scratch.scan, scratch.hoist.weights, segments, block)
                if kept.shape[0] == 0:
                    make_block(scan, scratch.scan, segments, block)
                    scan_block(scan, scratch.scan, segments, block, before)
                read = scratch.scan.states
            found = cells.found[group * num_states * gated :]
            if is_lstm:
                _fill_rows(scratch.cell, found, num_rows)
            if kept.shape[0] > 0:
                place = recall_scan(scratch.scan, kept, places[chunk, step], num_rows, end - first)
                recall(
                    made, kept, place, read, num_rows, end - first, num_states,
                    heads, talk_heads,
                )  # fmt: skip
                if is_lstm:
                    update_cell(scratch.cell, made, num_rows)
            else:
                take_step(
                    scratch.after[:num_rows], w, made, read, scratch.cell, key, value, routed,
                    ptr, group, count, num_states, heads, talk_heads, scratch.turned,
                )  # fmt: skip
            if count > known:
                d_state[known * num_states : num_rows] = zero
                if scan.x.shape[0] > 0:
                    scratch.scan.carry[known:count] = zero
                if d_final.shape[0] > 0:
                    add_rows(
                        d_state[known * num_states :],
                        d_final[(example + known) * num_states : (example + count) * num_states],
                    )
                if is_lstm:
                    d_cell[known * num_states : num_rows] = zero
                if d_final_cell.shape[0] > 0:
                    add_rows(
                        d_cell[known * num_states :],
                        d_final_cell[
                            (example + known) * num_states : (example + count) * num_states
                        ],
                    )
                known = count
            if d_after.shape[0] > 0:
                add_rows(d_state, d_after[group * num_states : group * num_states + num_rows])
            if w.qkv.shape[0] > 0:
                _talk_backward(w, t, made, scratch, grads, count, num_states, talk_heads)
            _read_backward(
                t, made, scratch, grads, found, key, value, d_key, d_value, d_routed,
                ptr, group, count, num_states, heads, is_shared,
            )  # fmt: skip
            if scan.x.shape[0] == 0:
                scratch.hoist.d_weights[:] = zero
            else:
                scan_block_backward(
                    scan, d_scan, scratch.scan, scratch.hoist.d_weights, tokens.first, segments,
                    block, before, d_state,
                )  # fmt: skip
            if has_tokens:
                hoist_block_backward(
                    tokens.weights, d_tokens.turned, scratch.hoist, d_tokens.weights, tokens.first,
                    ptr, group, group + count, d_key, d_value, d_routed, d_tokens.x, tokens.heads,
                    num_states,
                )  # fmt: skip
        copy_rows(d_states[example * num_states :], d_state[: known * num_states], 0, channels)
        if is_lstm:
            copy_rows(d_cells[example * num_states :], d_cell[: known * num_states], 0, gated)
