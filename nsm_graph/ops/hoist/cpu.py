"""Hoisting for processors: one pass forward and one backward over blocks of tokens.

A block is a few groups, so that their tokens stay in the first-level cache while keys, logits,
softmax and routed sums are made of them. Logits stand as [heads and states, tokens]: a softmax over
states runs down columns, lane by lane, and products are those of the segment loop.

Legend: n tokens and m groups of a block, N states of an example, H heads, C_t channels of tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numba

from nsm_graph.ops.cpu import vectors
from nsm_graph.ops.cpu.compiled import BORROWING, INNER, Kernel
from nsm_graph.ops.cpu.matmul import add_product, affine, multiply
from nsm_graph.ops.cpu.rows import add_columns

Array = Any  # numpy arrays in Python, Numba's in kernels


class Weights(NamedTuple):
    """Projections; `logits` is [H N, C_t], the other matrices are [in, out] or, turned, [out, in].

    `value` is empty where values are keys.
    """

    key: Array
    key_bias: Array
    value: Array
    value_bias: Array
    logits: Array
    logits_bias: Array
    out: Array
    out_bias: Array


class Scratch(NamedTuple):
    """Where a thread works, for one block."""

    x: Array  #: [n, C_t]
    x_turned: Array  #: [C_t, n]
    heads: Array  #: [H N, n], logits, then weights of every head
    weights: Array  #: [N, n], their mean
    sums: Array  #: [m N, C_t], routed sums before their projection
    d_sums: Array  #: [m N, C_t]
    d_weights: Array  #: [N, n]
    d_heads: Array  #: [H N, n]
    d_x: Array  #: [n, C_t]


@numba.njit(**INNER)
def _end_of_block(ptr, group, end, room):  # type: ignore[no-untyped-def]
    """The first group that no longer fits."""
    last = group + 1
    while last < end and ptr[last + 1] - ptr[group] <= room:
        last += 1
    return last


@numba.njit(**INNER)
def route(w, s, x, first, ptr, group, end, heads, num_states):  # type: ignore[no-untyped-def]
    """Reads a block's tokens; makes weights of every head, their mean, and the routed sums."""
    start, count = ptr[group], ptr[end] - ptr[group]
    for g in range(group, end):
        for i in range(ptr[g + 1] - ptr[g]):
            source, target = x[first[g] + i], s.x[ptr[g] - start + i]
            for j in range(x.shape[1]):
                target[j] = source[j]
    vectors.transpose(s.x_turned[:, :count], s.x[:count])
    for row in range(heads * num_states):
        logits = s.heads[row, :count]
        for i in range(count):
            logits[i] = w.logits_bias[row]
    add_product(s.heads[:, :count], w.logits[:, : x.shape[1]], s.x_turned[:, :count])
    for head in range(heads):
        vectors.softmax_columns(s.heads[head * num_states : (head + 1) * num_states, :count])
    share = x.dtype.type(1) / x.dtype.type(heads)
    for n in range(num_states):
        mean = s.weights[n, :count]
        for i in range(count):
            mean[i] = s.heads[n, i] * share
        for head in range(1, heads):
            own = s.heads[head * num_states + n, :count]
            for i in range(count):
                mean[i] += own[i] * share
    for g in range(group, end):
        tokens = slice(ptr[g] - start, ptr[g + 1] - start)
        rows = slice((g - group) * num_states, (g - group + 1) * num_states)
        multiply(s.sums[rows], s.weights[:, tokens], s.x[tokens])


@numba.njit(**INNER)
def hoist_block(  # type: ignore[no-untyped-def]
    w, s, x, first, ptr, group, end, key, value, routed, heads, num_states
):
    """A block's keys, values and projected sums, each from row 0."""
    route(w, s, x, first, ptr, group, end, heads, num_states)
    project(w, s, ptr[end] - ptr[group], key, value)
    num_rows = (end - group) * num_states
    affine(routed[:num_rows], s.sums[:num_rows], w.out, w.out_bias)


@numba.njit(**INNER)
def _write_weights(weights, s, ptr, group, end, num_states):  # type: ignore[no-untyped-def]
    """A block's routing weights, by group, state and token."""
    start = ptr[group]
    for g in range(group, end):
        length = ptr[g + 1] - ptr[g]
        for n in range(num_states):
            place = ptr[g] * num_states + n * length
            source = s.weights[n, ptr[g] - start : ptr[g + 1] - start]
            target = weights[place : place + length]
            for i in range(length):
                target[i] = source[i]


@numba.njit(**INNER)
def write_mass(mass, s, ptr, group, end, num_states):  # type: ignore[no-untyped-def]
    """Sums of a block's routing weights over the tokens of each group."""
    for g in range(group, end):
        for n in range(num_states):
            source = s.weights[n, ptr[g] - ptr[group] : ptr[g + 1] - ptr[group]]
            total = mass.dtype.type(0)
            for i in range(source.shape[0]):
                total += source[i]
            mass[g * num_states + n] = total


@numba.njit(**INNER)
def project(w, s, count, key, value):  # type: ignore[no-untyped-def]
    """Keys and values of the tokens that a block has read."""
    affine(key[:count], s.x[:count], w.key, w.key_bias)
    if w.value.shape[0] > 0:
        affine(value[:count], s.x[:count], w.value, w.value_bias)


@partial(Kernel, options=BORROWING)
def forward_kernel(
    x: Array,
    first: Array,
    ptr: Array,
    w: Weights,
    s: Scratch,
    key: Array,
    value: Array,
    routed: Array,
    weights: Array,
    heads: int,
    num_states: int,
    room: int,
    group: int,
    last: int,
) -> None:
    """Keys, values, projected sums and weights of the groups from ``group`` to ``last``."""
    while group < last:
        end = _end_of_block(ptr, group, last, room)
        hoist_block(
            w, s, x, first, ptr, group, end, key[ptr[group] :], value[ptr[group] :],
            routed[group * num_states :], heads, num_states,
        )  # fmt: skip
        _write_weights(weights, s, ptr, group, end, num_states)
        group = end


@numba.njit(**INNER)
def _project_backward(grad, grad_bias, d_x, d_rows, x, turned):  # type: ignore[no-untyped-def]
    """Of ``rows = x W + b``: adds to the gradients of W, of b and of x."""
    add_product(grad, x.T, d_rows)
    add_columns(grad_bias, d_rows, 0)
    add_product(d_x, d_rows, turned)


@numba.njit(**INNER)
def hoist_block_backward(  # type: ignore[no-untyped-def]
    w, t, s, grads, first, ptr, group, end, d_key, d_value, d_routed, d_x, heads, num_states
):
    """Gradients of the tokens of a block that was routed just before; adds to ``grads``.

    Adds to ``s.d_weights`` as well, which may hold what others made of the weights, or zeros.
    """
    zero = s.x.dtype.type(0)
    share = s.x.dtype.type(1) / s.x.dtype.type(heads)
    start, count = ptr[group], ptr[end] - ptr[group]
    num_rows = (end - group) * num_states
    x, dx, d_sums = s.x[:count], s.d_x[:count], s.d_sums[:num_rows]
    dx[:] = zero
    d_sums[:] = zero
    _project_backward(
        grads.out, grads.out_bias, d_sums, d_routed[:num_rows], s.sums[:num_rows], t.out
    )
    _project_backward(grads.key, grads.key_bias, dx, d_key[:count], x, t.key)
    if w.value.shape[0] > 0:
        _project_backward(grads.value, grads.value_bias, dx, d_value[:count], x, t.value)
    for g in range(group, end):
        tokens = slice(ptr[g] - start, ptr[g + 1] - start)
        own = d_sums[(g - group) * num_states : (g - group + 1) * num_states]
        add_product(s.d_weights[:, tokens], own, s.x_turned[:, tokens])
        add_product(dx[tokens], s.weights[:, tokens].T, own)
    for head in range(heads):
        block = slice(head * num_states, (head + 1) * num_states)
        for n in range(num_states):
            source, target = s.d_weights[n, :count], s.d_heads[head * num_states + n, :count]
            for i in range(count):
                target[i] = source[i] * share
        vectors.softmax_columns_backward(s.d_heads[block, :count], s.heads[block, :count])
    for row in range(heads * num_states):
        slopes = s.d_heads[row, :count]
        total = zero
        for i in range(count):
            total += slopes[i]
        grads.logits_bias[row] += total
    add_product(grads.logits, s.d_heads[:, :count], x)
    add_product(dx, s.d_heads[:, :count].T, w.logits)
    for g in range(group, end):
        for i in range(ptr[g + 1] - ptr[g]):
            source, target = dx[ptr[g] - start + i], d_x[first[g] + i]
            for j in range(target.shape[0]):
                target[j] = source[j]


@partial(Kernel, options=BORROWING)
def backward_kernel(
    x: Array,
    first: Array,
    ptr: Array,
    w: Weights,
    t: Weights,
    s: Scratch,
    d_key: Array,
    d_value: Array,
    d_routed: Array,
    grads: Weights,
    d_x: Array,
    heads: int,
    num_states: int,
    room: int,
    group: int,
    last: int,
) -> None:
    """Gradients of the tokens of these groups; adds to ``grads``, where `logits` is [H N, C_t]."""
    while group < last:
        end = _end_of_block(ptr, group, last, room)
        route(w, s, x, first, ptr, group, end, heads, num_states)
        s.d_weights[:] = s.d_weights.dtype.type(0)
        hoist_block_backward(
            w, t, s, grads, first, ptr, group, end, d_key[ptr[group] :], d_value[ptr[group] :],
            d_routed[group * num_states :], d_x, heads, num_states,
        )  # fmt: skip
        group = end
