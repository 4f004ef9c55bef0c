"""What the kernels of the segment loop are given, and where they work.

Legend: N states of an example, C channels, the gates write the last G of them and the first C - G
are kept, H heads, H_t those of communication, D channels of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # numpy arrays in Python, Numba's in kernels


class Weights(NamedTuple):
    """The cell's parameters; matrices are [in, out], or [out, in] where backward needs them so.

    What a cell lacks is empty: the candidate of an LSTM, communication.
    """

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


class Cells(NamedTuple):
    """An LSTM's cell; empty for a GRU."""

    now: Array  #: [examples N, G], written over by every step: at last a result of the forward
    found: Array  #: [groups N G], what every step found, for backward; empty where there is none


class Segments(NamedTuple):
    """Which tokens and which rows each step of the loop concerns."""

    token_ptr: Array  #: [groups + 1]
    first_group: Array  #: [steps], the group of the first example
    num_active: Array  #: [steps], examples that still read; the first ones, longest first


class Rows(NamedTuple):
    """What the loop reads, group by group; empty where it is made of tokens, step by step."""

    key: Array  #: [tokens, C]
    value: Array  #: [tokens, C]
    routed: Array  #: [groups N, C]


class Tokens(NamedTuple):
    """What the loop's rows are made of; empty where they are given."""

    x: Array  #: [tokens, C_t]
    first: Array  #: [groups], where the tokens of each begin in `x`
    weights: Any  #: hoist.cpu.Weights
    heads: int  #: of the router
    mass: Array  #: [groups N], sums of routing weights, a result of the forward


class TokenGrads(NamedTuple):
    """Gradients of `Tokens`."""

    turned: Any  #: hoist.cpu.Weights, [out, in]
    weights: Any  #: hoist.cpu.Weights, added to
    x: Array


class Made(NamedTuple):
    """What a step makes, one row per state: backward reads it. It stays in a thread's cache.

    The columns of `x`, where what gates and candidate read are neighbours::

        gated G | kept C - G | update C | reset * gated, or an LSTM's tanh(cell) G | propagated G

    Without communication its parts have no rows; `mixed` still has G columns.
    """

    x: Array  #: [rows, >= 2 C + 2 G]
    query: Array  #: [rows, C]
    attended: Array  #: [rows, C]
    weights: Array  #: [tokens H N], by group and head [tokens, N]
    gates: Array  #: [rows, 3 G]: reset, update, candidate; [rows, 4 G]: an LSTM's, see `inputs.py`
    qkv: Array  #: [rows, 3 G]
    talk: Array  #: [rows H_t N], by example and head [N, N]
    mixed: Array  #: [rows, G]
    normal: Array  #: [rows, G], normalised
    inverse: Array  #: [rows], one over the standard deviation


class Scratch(NamedTuple):
    """Where a thread works; as many rows as the states of the examples that it takes at a time."""

    turned: Array  #: [the largest D, N], an operand of attention, transposed
    slopes: Array  #: [longest segment N], gradients of attention's weights
    rows: Rows  #: a step's, where they are made of tokens
    d_rows: Rows
    hoist: Any  #: hoist.cpu.Scratch
    scan: Any  #: ScanScratch
    after: Array  #: [rows, C], a step's result that is made again
    cell: Array  #: [rows, G], an LSTM's, made again
    d_state: Array  #: [rows, C], kept channels first; gradients, by the names of `Made`
    d_cell: Array  #: [rows, G]
    d_mixed: Array  #: [rows, G]
    d_query: Array  #: [rows, C]
    d_attended: Array  #: [rows, C]
    d_gates: Array  #: [rows, 3 G] or [rows, 4 G]
    d_x: Array  #: [rows, 2 C + G], the columns of `x` but the last
    d_qkv: Array  #: [rows, 3 G]
