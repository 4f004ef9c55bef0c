"""The loop over segments for processors: forward and backward of the whole sequence in one kernel.

Examples never exchange data, so each thread takes a few at a time through all their segments,
with everything a step touches in the second-level cache. Every product goes through the register
tile of :mod:`nsm_graph.ops.cpu.matmul`; attention keeps its weights as [keys, queries], so that a
softmax runs down columns, lane by lane. What a step made is kept for backward, or made again.

Legend: N states of an example, C channels, H heads, D = C / H; a *group* is one segment of one
example, groups stand step by step, and rows of group g are g N .. g N + N - 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numba
import numpy as np

from nsm_graph.ops.cpu import vectors
from nsm_graph.ops.cpu.compiled import BORROWING, Kernel
from nsm_graph.ops.cpu.matmul import add_product, affine, multiply

Array = Any  # numpy arrays in Python, Numba's in kernels


class Weights(NamedTuple):
    """The cell's parameters; matrices are [in, out], or [out, in] where backward needs them so."""

    query: Array
    query_bias: Array
    out: Array
    out_bias: Array
    gates: Array
    gates_bias: Array
    candidate: Array
    candidate_bias: Array
    qkv: Array
    qkv_bias: Array
    mix: Array
    mix_bias: Array
    scale: Array
    shift: Array


class Segments(NamedTuple):
    """Which tokens and which rows each step of the loop concerns."""

    token_ptr: Array  #: [groups + 1]
    first_group: Array  #: [steps], the group of the first example
    num_active: Array  #: [steps], examples that still read; the first ones, longest first


class Saved(NamedTuple):
    """What a step makes, one row per state; backward reads it."""

    x: Array  #: [rows, >= 4 C]: state, update, reset * state, candidate mixed in
    query: Array  #: [rows, C]
    attended: Array  #: [rows, C]
    weights: Array  #: [tokens H N], by group and head [tokens, N]
    gates: Array  #: [rows, 3 C]: reset, update, candidate
    qkv: Array  #: [rows, 3 C]
    talk: Array  #: [rows H N], by example and head [N, N]
    mixed: Array  #: [rows, C]
    normal: Array  #: [rows, C], normalised
    inverse: Array  #: [rows], one over the standard deviation


class Scratch(NamedTuple):
    """Where a thread works; as many rows as the states of the examples that it takes at a time."""

    turned: Array  #: [D, N], an operand of attention, transposed
    slopes: Array  #: [longest segment N], gradients of attention's weights
    after: Array  #: [rows, C], a step's result that is made again
    d_state: Array  #: [rows, C]; gradients, by the names of `Saved`
    d_mixed: Array  #: [rows, C]
    d_query: Array  #: [rows, C]
    d_attended: Array  #: [rows, C]
    d_gates: Array  #: [rows, 3 C]
    d_x: Array  #: [rows, 3 C]
    d_qkv: Array  #: [rows, 3 C]


# One step ##########################################################################


@numba.njit(**BORROWING)
def _attend(out, weights, query, key, value, turned):  # type: ignore[no-untyped-def]
    """One head of one example: ``out = softmax(query key') value``, weights as [keys, queries]."""
    vectors.transpose(turned, query)
    multiply(weights, key, turned)
    vectors.softmax_columns(weights)
    multiply(out, weights.T, value)


@numba.njit(**BORROWING)
def _attend_backward(  # type: ignore[no-untyped-def]
    d_query, d_key, d_value, d_out, weights, query, key, value, turned, slopes, is_shared
):
    """Gradients of the three operands; a key that is the value, too, has the sum of both."""
    vectors.transpose(turned, d_out)
    multiply(slopes, value, turned)
    vectors.softmax_columns_backward(slopes, weights)
    multiply(d_value, weights, d_out)
    multiply(d_query, slopes.T, key)
    if is_shared:
        add_product(d_key, slopes, query)
    else:
        multiply(d_key, slopes, query)


@numba.njit(**BORROWING)
def _read(  # type: ignore[no-untyped-def]
    w, saved, key, value, routed, token_ptr, group, count, num_states, heads, row, token, turned
):
    """One segment of ``count`` examples, whose states stand in ``saved.x`` from ``row`` on."""
    channels = key.shape[1]
    width = channels // heads
    num_rows = count * num_states
    x = saved.x[row : row + num_rows]
    query = saved.query[row : row + num_rows]
    attended = saved.attended[row : row + num_rows]
    gates = saved.gates[row : row + num_rows]
    affine(query, x[:, :channels], w.query, w.query_bias)
    for example in range(count):
        first, end = token_ptr[group + example], token_ptr[group + example + 1]
        mine = slice(example * num_states, (example + 1) * num_states)
        place = (token + first - token_ptr[group]) * heads * num_states
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            size = (end - first) * num_states
            weights = saved.weights[place : place + size].reshape(end - first, num_states)
            place += size
            _attend(
                attended[mine, columns], weights, query[mine, columns],
                key[first:end, columns], value[first:end, columns], turned,
            )  # fmt: skip
    for i in range(num_rows):
        # Views of one row: what has no other stride than one is what becomes vector code.
        start, routed_row = x[i, channels : 2 * channels], routed[group * num_states + i]
        for j in range(channels):
            start[j] = routed_row[j] + w.out_bias[j]
    add_product(x[:, channels : 2 * channels], attended, w.out)

    affine(gates[:, : 2 * channels], x[:, : 2 * channels], w.gates, w.gates_bias)
    for i in range(num_rows):
        vectors.sigmoid(gates, i, 0, 2 * channels)
        state, reset, both = x[i, :channels], gates[i, :channels], x[i, 2 * channels : 3 * channels]
        for j in range(channels):
            both[j] = reset[j] * state[j]
    affine(gates[:, 2 * channels :], x[:, channels : 3 * channels], w.candidate, w.candidate_bias)
    for i in range(num_rows):
        vectors.tanh(gates, i, 2 * channels, channels)
        mix, candidate = gates[i, channels : 2 * channels], gates[i, 2 * channels :]
        state, new = x[i, :channels], x[i, 3 * channels : 4 * channels]
        for j in range(channels):
            new[j] = state[j] + mix[j] * (candidate[j] - state[j])


@numba.njit(**BORROWING)
def _talk(w, saved, out, count, num_states, heads, row, turned):  # type: ignore[no-untyped-def]
    """States attend to the states of their example, residual, norm; into ``out``."""
    channels = out.shape[1]
    width = channels // heads
    num_rows = count * num_states
    qkv = saved.qkv[row : row + num_rows]
    mixed = saved.mixed[row : row + num_rows]
    affine(qkv, saved.x[row : row + num_rows, 3 * channels : 4 * channels], w.qkv, w.qkv_bias)
    size = num_states * num_states
    place = row * heads * num_states
    for example in range(count):
        mine = slice(example * num_states, (example + 1) * num_states)
        for head in range(heads):
            first = head * width
            weights = saved.talk[place : place + size].reshape(num_states, num_states)
            place += size
            _attend(
                mixed[mine, first : first + width], weights, qkv[mine, first : first + width],
                qkv[mine, channels + first : channels + first + width],
                qkv[mine, 2 * channels + first : 2 * channels + first + width], turned,
            )  # fmt: skip
    for i in range(num_rows):
        y, new = out[i], saved.x[row + i, 3 * channels : 4 * channels]
        for j in range(channels):
            y[j] = new[j] + w.mix_bias[j]
    add_product(out, mixed, w.mix)
    one = out.dtype.type(1)
    share = one / out.dtype.type(channels)
    epsilon = out.dtype.type(1e-5)
    for i in range(num_rows):
        y, normal = out[i], saved.normal[row + i]
        mean = one - one
        for j in range(channels):
            mean += y[j]
        mean *= share
        variance = one - one
        for j in range(channels):
            variance += (y[j] - mean) * (y[j] - mean)
        inverse = one / np.sqrt(variance * share + epsilon)
        saved.inverse[row + i] = inverse
        for j in range(channels):
            normal[j] = (y[j] - mean) * inverse
        for j in range(channels):
            y[j] = normal[j] * w.scale[j] + w.shift[j]


@numba.njit(**BORROWING)
def _add_rows(total, rows, first):  # type: ignore[no-untyped-def]
    """Adds up the columns of ``rows`` from ``first`` on, as many as ``total`` has."""
    for i in range(rows.shape[0]):
        row = rows[i, first : first + total.shape[0]]
        for j in range(total.shape[0]):
            total[j] += row[j]


@numba.njit(**BORROWING)
def _talk_backward(  # type: ignore[no-untyped-def]
    w, t, saved, scratch, grads, count, num_states, heads, row
):
    """From the gradient of the step's result to that of the propagated state, in place."""
    channels = scratch.d_state.shape[1]
    width = channels // heads
    num_rows = count * num_states
    d_state, d_qkv = scratch.d_state[:num_rows], scratch.d_qkv[:num_rows]
    d_mixed, turned, slopes = scratch.d_mixed[:num_rows], scratch.turned, scratch.slopes
    one = d_state.dtype.type(1)
    share = one / d_state.dtype.type(channels)
    for i in range(num_rows):
        d, normal, inverse = d_state[i], saved.normal[row + i], saved.inverse[row + i]
        mean = one - one
        along = one - one
        for j in range(channels):
            grads.scale[j] += d[j] * normal[j]
        for j in range(channels):
            grads.shift[j] += d[j]
        for j in range(channels):
            d[j] *= w.scale[j]
            mean += d[j]
            along += d[j] * normal[j]
        mean *= share
        along *= share
        for j in range(channels):
            d[j] = inverse * (d[j] - mean - normal[j] * along)
        for j in range(channels):
            grads.mix_bias[j] += d[j]
    qkv = saved.qkv[row : row + num_rows]
    add_product(grads.mix, saved.mixed[row : row + num_rows].T, d_state)
    multiply(d_mixed, d_state, t.mix)
    size = num_states * num_states
    place = row * heads * num_states
    for example in range(count):
        mine = slice(example * num_states, (example + 1) * num_states)
        for head in range(heads):
            first = head * width
            q = slice(first, first + width)
            k = slice(channels + first, channels + first + width)
            v = slice(2 * channels + first, 2 * channels + first + width)
            weights = saved.talk[place : place + size].reshape(num_states, num_states)
            place += size
            _attend_backward(
                d_qkv[mine, q], d_qkv[mine, k], d_qkv[mine, v], d_mixed[mine, q], weights,
                qkv[mine, q], qkv[mine, k], qkv[mine, v], turned,
                slopes[:size].reshape(num_states, num_states), False,
            )  # fmt: skip
    _add_rows(grads.qkv_bias, d_qkv, 0)
    add_product(grads.qkv, saved.x[row : row + num_rows, 3 * channels : 4 * channels].T, d_qkv)
    add_product(d_state, d_qkv, t.qkv)


@numba.njit(**BORROWING)
def _read_backward(  # type: ignore[no-untyped-def]
    t, saved, scratch, grads, key, value, d_key, d_value, d_routed, token_ptr, group, count,
    num_states, heads, row, token, is_shared,
):  # fmt: skip
    """From the gradient of the propagated state to that of the state before, in place."""
    channels = key.shape[1]
    width = channels // heads
    num_rows = count * num_states
    one = key.dtype.type(1)
    x = saved.x[row : row + num_rows]
    d_state, dg, dx = (
        scratch.d_state[:num_rows], scratch.d_gates[:num_rows], scratch.d_x[:num_rows],
    )  # fmt: skip
    d_query, d_attended = scratch.d_query[:num_rows], scratch.d_attended[:num_rows]
    turned, slopes = scratch.turned, scratch.slopes
    query, attended = saved.query[row : row + num_rows], saved.attended[row : row + num_rows]
    for i in range(num_rows):
        state, gates, d = x[i, :channels], saved.gates[row + i], d_state[i]
        mix, candidate = gates[channels : 2 * channels], gates[2 * channels :]
        d_mix, d_candidate = dg[i, channels : 2 * channels], dg[i, 2 * channels :]
        for j in range(channels):
            d_candidate[j] = d[j] * mix[j] * (one - candidate[j] * candidate[j])
        for j in range(channels):
            d_mix[j] = d[j] * (candidate[j] - state[j]) * mix[j] * (one - mix[j])
        for j in range(channels):
            d[j] *= one - mix[j]
    # Columns of dx: state, update, reset * state.
    add_product(grads.candidate, x[:, channels : 3 * channels].T, dg[:, 2 * channels :])
    multiply(dx[:, channels:], dg[:, 2 * channels :], t.candidate)
    for i in range(num_rows):
        state, reset, d = x[i, :channels], saved.gates[row + i, :channels], d_state[i]
        d_reset, d_both = dg[i, :channels], dx[i, 2 * channels :]
        for j in range(channels):
            d_reset[j] = d_both[j] * state[j] * reset[j] * (one - reset[j])
        d_before = dx[i, :channels]
        for j in range(channels):
            d_before[j] = d[j] + d_both[j] * reset[j]
    _add_rows(grads.gates_bias, dg, 0)
    _add_rows(grads.candidate_bias, dg, 2 * channels)
    add_product(grads.gates, x[:, : 2 * channels].T, dg[:, : 2 * channels])
    add_product(dx[:, : 2 * channels], dg[:, : 2 * channels], t.gates)
    d_update = dx[:, channels : 2 * channels]
    for i in range(num_rows):
        source, target = dx[i, channels : 2 * channels], d_routed[group * num_states + i]
        for j in range(channels):
            target[j] = source[j]
    _add_rows(grads.out_bias, dx, channels)
    add_product(grads.out, attended.T, d_update)
    multiply(d_attended, d_update, t.out)
    for example in range(count):
        first, end = token_ptr[group + example], token_ptr[group + example + 1]
        mine = slice(example * num_states, (example + 1) * num_states)
        place = (token + first - token_ptr[group]) * heads * num_states
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            size = (end - first) * num_states
            weights = saved.weights[place : place + size].reshape(end - first, num_states)
            place += size
            _attend_backward(
                d_query[mine, columns], d_key[first:end, columns], d_value[first:end, columns],
                d_attended[mine, columns], weights, query[mine, columns],
                key[first:end, columns], value[first:end, columns], turned,
                slopes[:size].reshape(end - first, num_states), is_shared,
            )  # fmt: skip
    _add_rows(grads.query_bias, d_query, 0)
    add_product(grads.query, x[:, :channels].T, d_query)
    for i in range(num_rows):
        d, d_before = d_state[i], dx[i, :channels]
        for j in range(channels):
            d[j] = d_before[j]
    add_product(d_state, d_query, t.query)


# All steps #########################################################################


@numba.njit(**BORROWING)
def _step(  # type: ignore[no-untyped-def]
    out, w, saved, states, after, key, value, routed, segments, step, example, count, num_states,
    heads, row, token, turned,
):  # fmt: skip
    """One step of ``count`` examples: from the states that it finds to those it leaves, ``out``."""
    channels = states.shape[1]
    num_rows = count * num_states
    if step == 0:
        before = states[example * num_states :]
    else:
        before = after[(segments.first_group[step - 1] + example) * num_states :]
    for i in range(num_rows):
        source, target = before[i], saved.x[row + i, :channels]
        for j in range(channels):
            target[j] = source[j]
    _read(
        w, saved, key, value, routed, segments.token_ptr, segments.first_group[step] + example,
        count, num_states, heads, row, token, turned,
    )  # fmt: skip
    if w.qkv.shape[0] > 0:
        _talk(w, saved, out, count, num_states, heads, row, turned)
        return
    for i in range(num_rows):
        source, target = saved.x[row + i, 3 * channels : 4 * channels], out[i]
        for j in range(channels):
            target[j] = source[j]


@partial(Kernel, options=BORROWING)
def forward_kernel(
    states: Array,
    routed: Array,
    key: Array,
    value: Array,
    segments: Segments,
    w: Weights,
    saved: Saved,
    scratch: Scratch,
    after: Array,
    heads: int,
    num_states: int,
    chunks: Array,
    is_kept: bool,
) -> None:
    """The states after every step, ``after[groups N, C]``, of the chunks of examples named."""
    for chunk in range(chunks.shape[0]):
        example = chunks[chunk, 0]
        for step in range(segments.num_active.shape[0]):
            count = min(chunks[chunk, 1], segments.num_active[step]) - example
            if count <= 0:
                break
            group = segments.first_group[step] + example
            rows = count * num_states
            row, token = (group * num_states, segments.token_ptr[group]) if is_kept else (0, 0)
            out = after[group * num_states : group * num_states + rows]
            _step(
                out, w, saved, states, after, key, value, routed, segments, step, example, count,
                num_states, heads, row, token, scratch.turned,
            )  # fmt: skip


@partial(Kernel, options=BORROWING)
def backward_kernel(
    d_after: Array,
    states: Array,
    routed: Array,
    key: Array,
    value: Array,
    segments: Segments,
    w: Weights,
    t: Weights,
    saved: Saved,
    scratch: Scratch,
    after: Array,
    grads: Weights,
    d_states: Array,
    d_routed: Array,
    d_key: Array,
    d_value: Array,
    heads: int,
    num_states: int,
    chunks: Array,
    is_kept: bool,
    is_shared: bool,
) -> None:
    """Gradients of everything, of the chunks of examples named; adds to ``grads``."""
    channels = states.shape[1]
    zero = states.dtype.type(0)
    talks = w.qkv.shape[0] > 0
    d_state = scratch.d_state
    for chunk in range(chunks.shape[0]):
        example = chunks[chunk, 0]
        d_state[:] = zero
        for step in range(segments.num_active.shape[0] - 1, -1, -1):
            count = min(chunks[chunk, 1], segments.num_active[step]) - example
            if count <= 0:
                continue
            group = segments.first_group[step] + example
            rows = count * num_states
            row, token = (group * num_states, segments.token_ptr[group]) if is_kept else (0, 0)
            if not is_kept:
                _step(
                    scratch.after[:rows], w, saved, states, after, key, value, routed, segments,
                    step, example, count, num_states, heads, row, token, scratch.turned,
                )  # fmt: skip
            for i in range(rows):
                total, own = d_state[i], d_after[group * num_states + i]
                for j in range(channels):
                    total[j] += own[j]
            if talks:
                _talk_backward(
                    w, t, saved, scratch, grads, count, num_states, heads, row,
                )  # fmt: skip
            _read_backward(
                t, saved, scratch, grads, key, value, d_key, d_value, d_routed,
                segments.token_ptr, group, count, num_states, heads, row, token, is_shared,
            )  # fmt: skip
        for i in range((chunks[chunk, 1] - example) * num_states):
            for j in range(channels):
                d_states[example * num_states + i, j] = d_state[i, j]
