"""What the blocks of a scan are given, and where they work."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # numpy arrays in Python, Numba's in kernels


class Layout(NamedTuple):
    """What heads a scan has, and where the numbers of a token stand in its row.

    In this order: keys of transition heads (by head, then reflection), keys of memory heads, their
    queries, written values, memory heads' values, and last all gates.
    """

    transition: int  #: heads whose columns are states, T
    memory: int  #: heads whose rows are states, M
    reflections: int  #: of a token in a transition head, R
    width: int  #: channels of a head, D
    num_states: int  #: N
    decays: bool
    writes: bool
    reads: int  #: 0 for none; of transition heads 1 the mean of the states, 2 by routing weights
    memory_key: int  #: first columns
    query: int
    value: int
    memory_value: int
    gates: int
    decay: int
    write: int
    memory_beta: int
    num_columns: int


def make_layout(transition: int, memory: int, reflections: int, width: int, num_states: int,
                decays: bool, writes: bool, reads: int) -> Layout:  # fmt: skip
    """A layout for such heads."""
    sizes = (
        transition * reflections * width,
        memory * num_states,
        memory * num_states,
        writes * transition * width,
        memory * width,
        transition * reflections,
        decays * transition,
        writes * transition,
        memory,
    )
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return Layout(transition, memory, reflections, width, num_states, decays, writes, reads, *ends)


class Steps(NamedTuple):
    """What the tokens of a few segments do, one row for each; and the gradients of that.

    Room of memories is filled up as `columns.py` asks for.
    """

    rows: Array  #: [tokens, columns], see `Layout`: keys of unit norm, gates between 0 and 1
    d_rows: Array
    weights: Array  #: [tokens, N], how much of a token each state gets, zeros behind
    d_weights: Array


class Memories(NamedTuple):
    """The memories of one example, before and within each token, and what its tokens found."""

    states: Array  #: [T, slots, D, N]; slots: see :func:`slots_of`
    held: Array  #: [M, tokens + 1, N, D]
    state_errors: Array  #: [T, tokens R, N]
    held_errors: Array  #: [M, tokens, D]
    d_states: Array  #: [T, 1, D, N]
    d_held: Array  #: [M, 1, N, D]
    slopes: Array  #: [max(N, D)], a correction's error, of gradients
    numbers: Array  #: [max(N, D)], one for each row
    line: Array  #: [max(N, D)], one for each column
    mean: Array  #: [N], one over N


class Projection(NamedTuple):
    """What makes rows of `Steps` of tokens."""

    weight: Array  #: [C_t, columns], or turned
    bias: Array
