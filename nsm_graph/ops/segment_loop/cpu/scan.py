"""The ordered scan of a step's tokens, before the step reads them: from tokens to states and back.

The states that it leaves stand in a thread's scratch, as the states that the step finds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba

from nsm_graph.ops.cpu import vectors
from nsm_graph.ops.cpu.compiled import INNER
from nsm_graph.ops.delta_scan.cpu.backward import scan_backward
from nsm_graph.ops.delta_scan.cpu.forward import scan
from nsm_graph.ops.delta_scan.cpu.steps import make_steps, steps_backward

Array = Any  # numpy arrays in Python, Numba's in kernels


class Scan(NamedTuple):
    """What the loop's scan is given; no tokens where there is none."""

    x: Array  #: [tokens, C_t], in the order of the loop's own tokens
    projection: Any  #: delta_scan.cpu.Projection, [C_t, columns]
    layout: Any  #: delta_scan.cpu.Layout
    stretch: Any
    reads: Array  #: [tokens, (T + M) D], group by group, a result of the forward; or none


class ScanGrads(NamedTuple):
    """Gradients of `Scan`."""

    turned: Any  #: delta_scan.cpu.Projection, [columns, C_t]
    projection: Any  #: delta_scan.cpu.Projection, added to
    x: Array
    reads: Array  #: given; empty where nobody asked


class ScanScratch(NamedTuple):
    """Where a thread works on a step of the examples that it takes at a time."""

    x: Array  #: [tokens, C_t]
    d_x: Array  #: [tokens, C_t]
    steps: Any  #: delta_scan.cpu.Steps
    inverse: Array  #: [tokens, keys], one over their norms
    memories: Any  #: delta_scan.cpu.Memories
    states: Array  #: [rows, C], after the scan


@numba.njit(**INNER)
def make_block(scan_in, s, weights, first, ptr, group, end):  # type: ignore[no-untyped-def]
    """The steps of a block's tokens; ``weights`` are their routing weights, ``[N, tokens]``."""
    start, count = ptr[group], ptr[end] - ptr[group]
    for g in range(group, end):
        for i in range(ptr[g + 1] - ptr[g]):
            source, target = scan_in.x[first[g] + i], s.x[ptr[g] - start + i]
            for j in range(target.shape[0]):
                target[j] = source[j]
    make_steps(scan_in.layout, scan_in.projection, scan_in.stretch, s.steps, s.inverse, s.x[:count])
    vectors.transpose(s.steps.weights[:count], weights[:, :count])


@numba.njit(**INNER)
def scan_block(scan_in, s, ptr, group, end, before):  # type: ignore[no-untyped-def]
    """States of a block's examples after their tokens, into ``s.states``, and what tokens read."""
    num_states, start = scan_in.layout.num_states, ptr[group]
    for g in range(group, end):
        mine = slice((g - group) * num_states, (g - group + 1) * num_states)
        scan(
            scan_in.layout, s.steps, s.memories, s.states[mine], before[mine], ptr[g] - start,
            ptr[g + 1] - ptr[g], scan_in.reads[start:],
        )  # fmt: skip


@numba.njit(**INNER)
def scan_block_backward(scan_in, grads, s, d_weights, first, ptr, group, end, before, d_states):  # type: ignore[no-untyped-def]
    """From the gradients of the states after the scan to those before it, in place.

    The block's steps are those that `make_block` has just made. Sets ``d_weights``, [N, tokens].
    """
    num_states, start, count = scan_in.layout.num_states, ptr[group], ptr[end] - ptr[group]
    s.steps.d_weights[:count] = d_states.dtype.type(0)
    for g in range(group, end):
        mine = slice((g - group) * num_states, (g - group + 1) * num_states)
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
    for g in range(group, end):
        for i in range(ptr[g + 1] - ptr[g]):
            source, target = s.d_x[ptr[g] - start + i], grads.x[first[g] + i]
            for j in range(target.shape[0]):
                target[j] = source[j]
