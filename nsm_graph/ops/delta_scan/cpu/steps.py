"""From tokens to steps: projections, keys of unit norm, gates that close and open exactly."""

from __future__ import annotations

import numba
import numpy as np

from nsm_graph.ops.cpu import vectors
from nsm_graph.ops.cpu.compiled import INLINE, INNER
from nsm_graph.ops.cpu.matmul import add_product, affine
from nsm_graph.ops.cpu.rows import add_columns
from nsm_graph.ops.delta_scan.cpu import columns

#: Squares of rows that are shorter or longer than this may leave what the precision holds.
SHORTEST, LONGEST = 1e-24, 1e24


@numba.njit(**INLINE)
def _unit(row):  # type: ignore[no-untyped-def]
    """Brings a row to norm 1, in place; one over its norm, or 0 for a row of zeros."""
    one = row.dtype.type(1)
    square = columns.dot(row, row)
    size = one
    if square < SHORTEST or square > LONGEST:
        size = one - one
        for j in range(row.shape[0]):
            size = max(size, abs(row[j]))
        if size < np.finfo(row.dtype).tiny:
            row[:] = one - one
            return one - one
        for j in range(row.shape[0]):
            row[j] = row[j] / size
        square = columns.dot(row, row)
    inverse = one / np.sqrt(square)
    columns.mix(row, row, inverse, row, one - one)
    return inverse / size


@numba.njit(**INLINE)
def _unit_backward(d_row, row, inverse):  # type: ignore[no-untyped-def]
    """From the gradient of a row of norm 1 to that of the row it was, in place."""
    along = columns.dot(d_row, row)
    columns.mix(d_row, d_row, inverse, row, -inverse * along)


@numba.njit(**INNER)
def make_steps(layout, w, stretch, steps, inverse, x):  # type: ignore[no-untyped-def]
    """Fills a row of ``steps`` for each token, and one over the norm of each of its keys."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    affine(steps.rows[: x.shape[0], : layout.num_columns], x, w.weight, w.bias)
    num_gates = layout.num_columns - layout.gates
    num_keys, size = layout.transition * layout.reflections, layout.num_states
    for i in range(x.shape[0]):
        row = steps.rows[i]
        for key in range(num_keys):
            place = key * layout.width
            inverse[i, key] = _unit(row[place : place + layout.width])
        for key in range(2 * layout.memory):  # and queries
            place = layout.memory_key + key * size
            inverse[i, num_keys + key] = _unit(row[place : place + size])
        vectors.sigmoid(steps.rows, i, layout.gates, num_gates)
        gates = row[layout.gates : layout.num_columns]
        for j in range(num_gates):
            gate = gates[j] + stretch * (gates[j] + gates[j] - one)
            gates[j] = min(max(gate, zero), one)


@numba.njit(**INNER)
def steps_backward(layout, w, turned, grads, stretch, steps, inverse, x, d_x):  # type: ignore[no-untyped-def]
    """From the gradients of rows to those of the tokens, and adds to the parameters'."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    scale = one + stretch + stretch
    num_keys, size = layout.transition * layout.reflections, layout.num_states
    for i in range(x.shape[0]):
        row, d_row = steps.rows[i], steps.d_rows[i]
        for key in range(num_keys):
            place = slice(key * layout.width, (key + 1) * layout.width)
            _unit_backward(d_row[place], row[place], inverse[i, key])
        for key in range(2 * layout.memory):
            place = slice(layout.memory_key + key * size, layout.memory_key + (key + 1) * size)
            _unit_backward(d_row[place], row[place], inverse[i, num_keys + key])
        gates = row[layout.gates : layout.num_columns]
        slopes = d_row[layout.gates : layout.num_columns]
        for j in range(gates.shape[0]):
            # The gate before it was stretched and cut off; cut off, it has no slope.
            gate = (gates[j] + stretch) / scale
            slope = scale * gate * (one - gate) * slopes[j]
            slopes[j] = slope if zero < gates[j] < one else zero
    d_rows = steps.d_rows[: x.shape[0], : layout.num_columns]
    add_columns(grads.bias, d_rows, 0)
    add_product(grads.weight, x.T, d_rows)
    d_x[:] = zero
    add_product(d_x, d_rows, turned.weight)
