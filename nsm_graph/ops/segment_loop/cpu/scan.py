"""The ordered scan of a step's tokens, before the step reads them: from tokens to states and back.

What it makes stands in a thread's scratch, and so do the states that it leaves: these the step
reads instead of those that it found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba

from nsm_graph.ops.cpu import vectors
from nsm_graph.ops.cpu.compiled import INNER
from nsm_graph.ops.cpu.matmul import add_product, affine, multiply
from nsm_graph.ops.cpu.rows import add, add_columns, copy
from nsm_graph.ops.delta_scan.cpu.backward import scan_backward
from nsm_graph.ops.delta_scan.cpu.forward import scan
from nsm_graph.ops.delta_scan.cpu.steps import make_steps, steps_backward

Array = Any  # numpy arrays in Python, Numba's in kernels


class Scan(NamedTuple):
    """What the loop's scan is given; no tokens where there is none."""

    x: Array  #: [tokens, C_t], in the order of the loop's own tokens
    tail: Array  #: [examples, C_t], the token before the first of each
    convolution: Any  #: delta_scan.cpu.Projection, [2 C_t, C_t], of a token and the one before it
    projection: Any  #: delta_scan.cpu.Projection, [C_t, columns]
    layout: Any  #: delta_scan.cpu.Layout
    stretch: Any
    reads: Array  #: [tokens, (T + M) D], group by group, a result of the forward; or none


class ScanGrads(NamedTuple):
    """Gradients of `Scan`."""

    turned_convolution: Any  #: delta_scan.cpu.Projection, [C_t, 2 C_t]
    turned: Any  #: delta_scan.cpu.Projection, [columns, C_t]
    convolution: Any  #: delta_scan.cpu.Projection, added to
    projection: Any  #: delta_scan.cpu.Projection, added to
    x: Array
    tail: Array
    reads: Array  #: given; empty where nobody asked


class ScanScratch(NamedTuple):
    """Where a thread works on a step of the examples that it takes at a time."""

    pairs: Array  #: [tokens, >= 2 C_t], the token before, the token
    d_pairs: Array
    x: Array  #: [tokens, C_t], after the convolution
    d_x: Array
    carry: Array  #: [examples, C_t], gradients of tokens that are last in the step before
    steps: Any  #: delta_scan.cpu.Steps
    inverse: Array  #: [tokens, keys], one over their norms
    memories: Any  #: delta_scan.cpu.Memories
    states: Array  #: [rows, C], after the scan


class Block(NamedTuple):
    """A step of a few examples: groups in a row."""

    step: int
    example: int  #: the first
    group: int  #: its group
    end: int  #: the first group that is no longer of the block


@numba.njit(**INNER)
def read_tokens(scan_in, s, first, segments, block):  # type: ignore[no-untyped-def]
    """A block's tokens, each behind the one before it."""
    ptr, width = segments.token_ptr, scan_in.x.shape[1]
    for g in range(block.group, block.end):
        place, length = ptr[g] - ptr[block.group], ptr[g + 1] - ptr[g]
        example = block.example + g - block.group
        if block.step > 0:
            before = segments.first_group[block.step - 1] + example
            last = first[before] + ptr[before + 1] - ptr[before] - 1
            copy(s.pairs[place, :width], scan_in.x[last])
        else:
            copy(s.pairs[place, :width], scan_in.tail[example])
        for i in range(length):
            copy(s.pairs[place + i, width : 2 * width], scan_in.x[first[g] + i])
        for i in range(1, length):
            copy(s.pairs[place + i, :width], scan_in.x[first[g] + i - 1])


@numba.njit(**INNER)
def make_block(scan_in, s, segments, block):  # type: ignore[no-untyped-def]
    """The steps of a block's tokens, which have been read."""
    count = segments.token_ptr[block.end] - segments.token_ptr[block.group]
    width, x = scan_in.x.shape[1], s.x[:count]
    if scan_in.convolution.weight.shape[0] > 0:
        pairs = s.pairs[:count, : 2 * width]
        affine(x, pairs, scan_in.convolution.weight, scan_in.convolution.bias)
        for i in range(count):
            add(x[i], s.pairs[i, width:])
    else:
        for i in range(count):
            copy(x[i], s.pairs[i, width:])
    make_steps(scan_in.layout, scan_in.projection, scan_in.stretch, s.steps, s.inverse, x)


@numba.njit(**INNER)
def share_weights(s, weights, segments, block):  # type: ignore[no-untyped-def]
    """Gives the steps the routing weights ``[N, tokens]`` of a block."""
    count = segments.token_ptr[block.end] - segments.token_ptr[block.group]
    vectors.transpose(s.steps.weights[:count], weights[:, :count])


@numba.njit(**INNER)
def scan_block(scan_in, s, segments, block, before):  # type: ignore[no-untyped-def]
    """States of a block's examples after their tokens, into ``s.states``, and what tokens read."""
    ptr, num_states = segments.token_ptr, scan_in.layout.num_states
    for g in range(block.group, block.end):
        mine = slice((g - block.group) * num_states, (g - block.group + 1) * num_states)
        scan(
            scan_in.layout, s.steps, s.memories, s.states[mine], before[mine],
            ptr[g] - ptr[block.group], ptr[g + 1] - ptr[g], scan_in.reads[ptr[block.group] :],
        )  # fmt: skip


@numba.njit(**INNER)
def scan_block_backward(scan_in, grads, s, d_weights, first, segments, block, before, d_states):  # type: ignore[no-untyped-def]
    """From the gradients of the states after the scan to those before it, in place.

    The block's tokens, steps and weights stand in ``s``. Sets ``d_weights``, [N, tokens].
    """
    ptr, num_states = segments.token_ptr, scan_in.layout.num_states
    start, count = ptr[block.group], ptr[block.end] - ptr[block.group]
    s.steps.d_weights[:count] = d_states.dtype.type(0)
    for g in range(block.group, block.end):
        mine = slice((g - block.group) * num_states, (g - block.group + 1) * num_states)
        place, length = ptr[g] - start, ptr[g + 1] - ptr[g]
        scan(
            scan_in.layout, s.steps, s.memories, s.states[mine], before[mine], place, length,
            scan_in.reads[start:],
        )  # fmt: skip
        scan_backward(
            scan_in.layout, s.steps, s.memories, d_states[mine], d_states[mine], place, length,
            grads.reads[start:],
        )  # fmt: skip
    vectors.transpose(d_weights[:, :count], s.steps.d_weights[:count, :num_states])
    steps_backward(
        scan_in.layout, scan_in.projection, grads.turned, grads.projection, scan_in.stretch,
        s.steps, s.inverse, s.x[:count], s.d_x[:count],
    )  # fmt: skip
    _tokens_backward(scan_in, grads, s, first, segments, block)


@numba.njit(**INNER)
def _tokens_backward(scan_in, grads, s, first, segments, block):  # type: ignore[no-untyped-def]
    """From the gradients of convolved tokens to those of tokens.

    What the first token of a group makes of the one before it is carried to the step before.
    """
    ptr, width = segments.token_ptr, scan_in.x.shape[1]
    start, count = ptr[block.group], ptr[block.end] - ptr[block.group]
    has_convolution = scan_in.convolution.weight.shape[0] > 0
    d_x, d_pairs = s.d_x[:count], s.d_pairs[:count, : 2 * width]
    if has_convolution:
        add_product(grads.convolution.weight, s.pairs[:count, : 2 * width].T, d_x)
        add_columns(grads.convolution.bias, d_x, 0)
        multiply(d_pairs, d_x, grads.turned_convolution.weight)
    for g in range(block.group, block.end):
        place, length, example = ptr[g] - start, ptr[g + 1] - ptr[g], g - block.group
        for i in range(length):
            source, target = d_x[place + i], grads.x[first[g] + i]
            copy(target, source)
            if not has_convolution:
                continue
            add(target, d_pairs[place + i, width:])
            add(target, s.carry[example] if i == length - 1 else d_pairs[place + i + 1, :width])
        if has_convolution:
            copy(s.carry[example], d_pairs[place, :width])
            if block.step == 0:
                copy(grads.tail[block.example + example], s.carry[example])
