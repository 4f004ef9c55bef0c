"""The segment loop forward: one step, and all of them.

Legend: N states of an example, C channels, of which the gates write the last G and keep the first
(`others` = C - G of them), H heads, D = C / H; a *group* is one segment of one example, groups
stand step by step, and rows of group g are g N .. g N + N - 1.
"""

from __future__ import annotations

from functools import partial

import numba
import numpy as np

from nsm_graph.ops.cpu import vectors
from nsm_graph.ops.cpu.compiled import BORROWING, INNER, Kernel
from nsm_graph.ops.cpu.matmul import add_product, affine, multiply
from nsm_graph.ops.cpu.rows import copy_rows
from nsm_graph.ops.hoist.cpu import hoist_block, write_mass
from nsm_graph.ops.segment_loop.cpu.arrays import (
    Array,
    Cells,
    Made,
    Rows,
    Scratch,
    Segments,
    Tokens,
    Weights,
)
from nsm_graph.ops.segment_loop.cpu.history import keep, keep_scan, place_states
from nsm_graph.ops.segment_loop.cpu.scan import (
    Block,
    Scan,
    make_block,
    read_tokens,
    scan_block,
    share_weights,
)

# One step ##########################################################################


@numba.njit(**INNER)
def _attend(out, weights, query, key, value, turned):  # type: ignore[no-untyped-def]
    """One head of one example: ``out = softmax(query key') value``, weights as [keys, queries]."""
    turned = turned[: query.shape[1]]
    vectors.transpose(turned, query)
    multiply(weights, key, turned)
    vectors.softmax_columns(weights)
    multiply(out, weights.T, value)


@numba.njit(**INNER)
def _read(  # type: ignore[no-untyped-def]
    w, made, cell, key, value, routed, token_ptr, group, count, num_states, heads, turned
):
    """One segment of ``count`` examples, whose states stand in ``made.x``."""
    channels = key.shape[1]
    width = channels // heads
    num_rows = count * num_states
    x = made.x[:num_rows]
    query = made.query[:num_rows]
    attended = made.attended[:num_rows]
    affine(query, x[:, :channels], w.query, w.query_bias)
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
            _attend(
                attended[mine, columns], weights, query[mine, columns],
                key[first:end, columns], value[first:end, columns], turned,
            )  # fmt: skip
    for i in range(num_rows):
        # Views of one row: what has no other stride than one is what becomes vector code.
        start, routed_row = x[i, channels : 2 * channels], routed[i]
        for j in range(channels):
            start[j] = routed_row[j] + w.out_bias[j]
    add_product(x[:, channels : 2 * channels], attended, w.out)
    if w.candidate.shape[0] > 0:
        _gru(w, x, made.gates[:num_rows])
    else:
        _lstm(w, x, made.gates[:num_rows])
        update_cell(cell, made, num_rows)


@numba.njit(**INNER)
def _gru(w, x, gates):  # type: ignore[no-untyped-def]
    """Gates of states and updates, and the propagated states."""
    channels, gated = w.query_bias.shape[0], gates.shape[1] // 3
    after = 2 * channels + gated  # what the gates and what the candidate reads end here
    affine(gates[:, : 2 * gated], x[:, : 2 * channels], w.gates, w.gates_bias)
    for i in range(x.shape[0]):
        vectors.sigmoid(gates, i, 0, 2 * gated)
        state, reset, both = x[i, :gated], gates[i, :gated], x[i, 2 * channels : after]
        for j in range(gated):
            both[j] = reset[j] * state[j]
    affine(gates[:, 2 * gated :], x[:, gated:after], w.candidate, w.candidate_bias)
    for i in range(x.shape[0]):
        vectors.tanh(gates, i, 2 * gated, gated)
        mix, candidate = gates[i, gated : 2 * gated], gates[i, 2 * gated :]
        state, new = x[i, :gated], x[i, after : after + gated]
        for j in range(gated):
            new[j] = state[j] + mix[j] * (candidate[j] - state[j])


@numba.njit(**INNER)
def _lstm(w, x, gates):  # type: ignore[no-untyped-def]
    """Gates of states and updates."""
    channels, gated = w.query_bias.shape[0], gates.shape[1] // 4
    affine(gates, x[:, : 2 * channels], w.gates, w.gates_bias)
    for i in range(x.shape[0]):
        vectors.sigmoid(gates, i, 0, 3 * gated)
        vectors.tanh(gates, i, 3 * gated, gated)


@numba.njit(**INNER)
def update_cell(cell, made, num_rows):  # type: ignore[no-untyped-def]
    """From gates and the cell that a step finds: the new one in its place, its tanh, the states."""
    channels, gated = made.query.shape[1], cell.shape[1]
    after = 2 * channels + gated
    for i in range(num_rows):
        own, gates, x = cell[i], made.gates[i], made.x[i]
        input_gate, forget_gate = gates[:gated], gates[gated : 2 * gated]
        output_gate, candidate = gates[2 * gated : 3 * gated], gates[3 * gated :]
        tanh_cell, new = x[2 * channels : after], x[after : after + gated]
        for j in range(gated):
            own[j] = forget_gate[j] * own[j] + input_gate[j] * candidate[j]
        for j in range(gated):
            tanh_cell[j] = own[j]
        vectors.tanh(made.x, i, 2 * channels, gated)
        for j in range(gated):
            new[j] = output_gate[j] * tanh_cell[j]


@numba.njit(**INNER)
def _talk(w, made, out, count, num_states, heads, turned):  # type: ignore[no-untyped-def]
    """Gated channels attend to those of their example, residual, norm; into those of ``out``."""
    channels, gated = out.shape[1], made.mixed.shape[1]
    others, place = channels - gated, 2 * channels + gated
    width = gated // heads
    num_rows = count * num_states
    qkv = made.qkv[:num_rows]
    mixed = made.mixed[:num_rows]
    affine(qkv, made.x[:num_rows, place : place + gated], w.qkv, w.qkv_bias)
    size = num_states * num_states
    start = 0
    for example in range(count):
        mine = slice(example * num_states, (example + 1) * num_states)
        for head in range(heads):
            first = head * width
            weights = made.talk[start : start + size].reshape(num_states, num_states)
            start += size
            _attend(
                mixed[mine, first : first + width], weights, qkv[mine, first : first + width],
                qkv[mine, gated + first : gated + first + width],
                qkv[mine, 2 * gated + first : 2 * gated + first + width], turned,
            )  # fmt: skip
    for i in range(num_rows):
        y, new = out[i, others:], made.x[i, place : place + gated]
        for j in range(gated):
            y[j] = new[j] + w.mix_bias[j]
    add_product(out[:, others:], mixed, w.mix)
    one = out.dtype.type(1)
    share = one / out.dtype.type(gated)
    epsilon = out.dtype.type(1e-5)
    for i in range(num_rows):
        y, normal = out[i, others:], made.normal[i]
        mean = one - one
        for j in range(gated):
            mean += y[j]
        mean *= share
        variance = one - one
        for j in range(gated):
            variance += (y[j] - mean) * (y[j] - mean)
        inverse = one / np.sqrt(variance * share + epsilon)
        made.inverse[i] = inverse
        for j in range(gated):
            normal[j] = (y[j] - mean) * inverse
        for j in range(gated):
            y[j] = normal[j] * w.scale[j] + w.shift[j]


@numba.njit(**INNER)
def take_step(  # type: ignore[no-untyped-def]
    out, w, made, before, cell, key, value, routed, token_ptr, group, count, num_states, heads,
    talk_heads, turned,
):  # fmt: skip
    """One step of ``count`` examples: from the states that it finds to those it leaves, ``out``.

    An LSTM's ``cell`` is written over. Keys, values and routed sums are this step's alone.
    """
    channels, gated = before.shape[1], made.mixed.shape[1]
    others = channels - gated
    for i in range(count * num_states):
        place_states(made.x[i], before[i], gated)
        found, left = before[i], out[i]
        for j in range(others):
            left[j] = found[j]
    _read(w, made, cell, key, value, routed, token_ptr, group, count, num_states, heads, turned)
    if w.qkv.shape[0] > 0:
        _talk(w, made, out, count, num_states, talk_heads, turned)
    else:
        for i in range(count * num_states):
            new, target = made.x[i, 2 * channels + gated :], out[i, others:]
            for j in range(gated):
                target[j] = new[j]


# All steps #########################################################################


@partial(Kernel, options=BORROWING)
def forward_kernel(
    states: Array,
    cells: Cells,
    rows: Rows,
    tokens: Tokens,
    scan: Scan,
    segments: Segments,
    w: Weights,
    made: Made,
    scratch: Scratch,
    kept: Array,
    places: Array,
    after: Array,
    final: Array,
    heads: int,
    talk_heads: int,
    num_states: int,
    chunks: Array,
) -> None:
    """Reads all segments of the chunks of examples named.

    Fills ``after[groups N, C]``, the states after every step, ``final[examples N, C]``, those after
    an example's last, ``cells``, and ``kept``, unless it is empty.
    """
    channels, gated, ptr = states.shape[1], made.mixed.shape[1], segments.token_ptr
    for chunk in range(chunks.shape[0]):
        example = chunks[chunk, 0]
        for step in range(segments.num_active.shape[0]):
            count = min(chunks[chunk, 1], segments.num_active[step]) - example
            if count <= 0:
                break
            group = segments.first_group[step] + example
            before = states[example * num_states :]
            if step > 0:
                before = after[(segments.first_group[step - 1] + example) * num_states :]
            out = after[group * num_states : (group + count) * num_states]
            first, end = ptr[group], ptr[group + count]
            key, value, routed = scratch.rows.key, scratch.rows.value, scratch.rows.routed
            if tokens.x.shape[0] > 0:
                hoist_block(
                    tokens.weights, scratch.hoist, tokens.x, tokens.first, ptr, group,
                    group + count, key, value, routed, tokens.heads, num_states,
                )  # fmt: skip
                write_mass(tokens.mass, scratch.hoist, ptr, group, group + count, num_states)
            else:
                key, value = rows.key[first:end], rows.value[first:end]
                routed = rows.routed[group * num_states :]
            if scan.x.shape[0] > 0:
                block = Block(step, example, group, group + count)
                read_tokens(scan, scratch.scan, tokens.first, segments, block)
                make_block(scan, scratch.scan, segments, block)
                share_weights(scratch.scan, scratch.hoist.weights, segments, block)
                scan_block(scan, scratch.scan, segments, block, before)
                before = scratch.scan.states
            cell = cells.now[example * num_states : (example + count) * num_states]
            if cells.found.shape[0] > 0:
                place = group * num_states * gated
                vectors.write_past(cells.found, place, cell.reshape(-1))
            take_step(
                out, w, made, before, cell, key, value, routed, ptr, group, count, num_states,
                heads, talk_heads, scratch.turned,
            )  # fmt: skip
            if kept.shape[0] > 0:
                place = keep_scan(
                    kept, places[chunk, step], scratch.scan, count * num_states, end - first
                )
                keep(
                    kept, place, made, count * num_states, end - first, num_states,
                    heads, talk_heads,
                )  # fmt: skip
            # Those that read on overwrite this.
            copy_rows(final[example * num_states :], out, 0, channels)
    if cells.found.shape[0] > 0:
        vectors.settle()
