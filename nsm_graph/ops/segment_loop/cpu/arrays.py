"""What the kernels of the segment loop are given, and where they work."""

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

    now: Array  #: [examples N, C], written over by every step: at last a result of the forward
    found: Array  #: [groups N C], what every step found, for backward; empty where there is none


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
    """What a step makes, one row per state: backward reads it. It stays in a thread's cache."""

    x: Array  #: [rows, >= 4 C]: state, update, reset * state or an LSTM's tanh(cell), propagated
    query: Array  #: [rows, C]
    attended: Array  #: [rows, C]
    weights: Array  #: [tokens H N], by group and head [tokens, N]
    gates: Array  #: [rows, 3 C]: reset, update, candidate; [rows, 4 C]: an LSTM's, see `inputs.py`
    qkv: Array  #: [rows, 3 C]
    talk: Array  #: [rows H N], by example and head [N, N]
    mixed: Array  #: [rows, C]
    normal: Array  #: [rows, C], normalised
    inverse: Array  #: [rows], one over the standard deviation


class Scratch(NamedTuple):
    """Where a thread works; as many rows as the states of the examples that it takes at a time."""

    turned: Array  #: [D, N], an operand of attention, transposed
    slopes: Array  #: [longest segment N], gradients of attention's weights
    rows: Rows  #: a step's, where they are made of tokens
    d_rows: Rows
    hoist: Any  #: hoist.cpu.Scratch
    after: Array  #: [rows, C], a step's result that is made again
    cell: Array  #: [rows, C], an LSTM's, made again
    d_state: Array  #: [rows, C]; gradients, by the names of `Made`
    d_cell: Array  #: [rows, C]
    d_mixed: Array  #: [rows, C]
    d_query: Array  #: [rows, C]
    d_attended: Array  #: [rows, C]
    d_gates: Array  #: [rows, 3 C] or [rows, 4 C]
    d_x: Array  #: [rows, 3 C]
    d_qkv: Array  #: [rows, 3 C]
