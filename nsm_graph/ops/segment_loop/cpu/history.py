"""What a step made, kept for backward outside the cache, and brought back.

Writing past the cache takes half the time of writing through it, since nobody reads the line first,
and leaves the cache to the next step. Kept is what is dear to make again: the states are kept as a
result anyway, and two columns follow from the gates.
"""

from __future__ import annotations

from typing import Any

import numba

from nsm_graph.ops.cpu import vectors
from nsm_graph.ops.cpu.compiled import INNER

#: Every part begins where a cache line does.
ALIGNMENT = 16


def record_size(rows: Any, tokens: Any, channels: int, gated: int, num_states: int, heads: int,
                talk_heads: int, num_gates: int = 3, scan: tuple[int, ...] = (0,) * 4
                ) -> Any:  # fmt: skip
    """Numbers that a step of so many rows and tokens keeps.

    States that do not talk have no ``talk_heads``: 0. Of a scan: how many channels it leaves in a
    state, and how many numbers it makes of a token, array by array.
    """
    parts = [rows * scan[0], *(tokens * width for width in scan[1:])]
    parts += [rows * channels] * 3
    parts += [tokens * heads * num_states, num_gates * rows * gated]
    if talk_heads > 0:
        parts += [3 * rows * gated, rows * talk_heads * num_states]
        parts += [rows * gated] * 2 + [rows]
    return sum(-(-part // ALIGNMENT) * ALIGNMENT for part in parts)


@numba.njit(**INNER)
def _aligned(place):  # type: ignore[no-untyped-def]
    return (place + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@numba.njit(**INNER)
def _keep(kept, place, part):  # type: ignore[no-untyped-def]
    """Writes a part; where the next one begins."""
    vectors.write_past(kept, place, part)
    return _aligned(place + part.shape[0])


@numba.njit(**INNER)
def keep_scan(kept, place, scan, rows, tokens):  # type: ignore[no-untyped-def]
    """Writes what a scan made, if there is one; where the rest begins."""
    place = _keep(kept, place, scan.states[:rows].reshape(-1))
    place = _keep(kept, place, scan.x[:tokens].reshape(-1))
    place = _keep(kept, place, scan.steps.rows[:tokens].reshape(-1))
    return _keep(kept, place, scan.inverse[:tokens].reshape(-1))


@numba.njit(**INNER)
def keep(  # type: ignore[no-untyped-def]
    kept, place, made, rows, tokens, num_states, heads, talk_heads
):
    """Writes what a step made to ``kept[place:]``."""
    channels = made.query.shape[1]
    for i in range(rows):
        vectors.write_past(kept, place + i * channels, made.x[i, channels : 2 * channels])
    place = _aligned(place + rows * channels)
    place = _keep(kept, place, made.query[:rows].reshape(-1))
    place = _keep(kept, place, made.attended[:rows].reshape(-1))
    place = _keep(kept, place, made.weights[: tokens * heads * num_states])
    place = _keep(kept, place, made.gates[:rows].reshape(-1))
    if made.qkv.shape[0] > 0:
        place = _keep(kept, place, made.qkv[:rows].reshape(-1))
        place = _keep(kept, place, made.talk[: rows * talk_heads * num_states])
        place = _keep(kept, place, made.mixed[:rows].reshape(-1))
        place = _keep(kept, place, made.normal[:rows].reshape(-1))
        place = _keep(kept, place, made.inverse[:rows])
    vectors.settle()


@numba.njit(**INNER)
def place_states(x, state, gated):  # type: ignore[no-untyped-def]
    """Begins a row of `Made.x` with a state: gated channels first, which come last from outside."""
    others = state.shape[0] - gated
    given = state[others:]
    for j in range(gated):
        x[j] = given[j]
    rest = x[gated:]
    for j in range(others):
        rest[j] = state[j]


@numba.njit(**INNER)
def _recall(part, kept, place):  # type: ignore[no-untyped-def]
    """Reads a part; where the next one begins."""
    source = kept[place : place + part.shape[0]]
    for i in range(part.shape[0]):
        part[i] = source[i]
    return _aligned(place + part.shape[0])


@numba.njit(**INNER)
def recall_scan(scan, kept, place, rows, tokens):  # type: ignore[no-untyped-def]
    """Reads what a scan made, if there is one; where the rest begins."""
    place = _recall(scan.states[:rows].reshape(-1), kept, place)
    place = _recall(scan.x[:tokens].reshape(-1), kept, place)
    place = _recall(scan.steps.rows[:tokens].reshape(-1), kept, place)
    return _recall(scan.inverse[:tokens].reshape(-1), kept, place)


@numba.njit(**INNER)
def recall(  # type: ignore[no-untyped-def]
    made, kept, place, before, rows, tokens, num_states, heads, talk_heads
):
    """Brings back what a step made of the states ``before`` it.

    But for what follows from an LSTM's cell, which is not here: `update_cell` makes that again.
    """
    channels, gated = made.query.shape[1], made.mixed.shape[1]
    is_lstm = made.gates.shape[1] > 3 * gated
    updates = place
    place = _aligned(place + rows * channels)
    place = _recall(made.query[:rows].reshape(-1), kept, place)
    place = _recall(made.attended[:rows].reshape(-1), kept, place)
    place = _recall(made.weights[: tokens * heads * num_states], kept, place)
    place = _recall(made.gates[:rows].reshape(-1), kept, place)
    if made.qkv.shape[0] > 0:
        place = _recall(made.qkv[:rows].reshape(-1), kept, place)
        place = _recall(made.talk[: rows * talk_heads * num_states], kept, place)
        place = _recall(made.mixed[:rows].reshape(-1), kept, place)
        place = _recall(made.normal[:rows].reshape(-1), kept, place)
        place = _recall(made.inverse[:rows], kept, place)
    for i in range(rows):
        old, gates = before[i, channels - gated :], made.gates[i]
        reset, mix = gates[:gated], gates[gated : 2 * gated]
        candidate, update = gates[2 * gated :], kept[updates + i * channels :]
        x = made.x[i]
        place_states(x, before[i], gated)
        for j in range(channels):
            x[channels + j] = update[j]
        if is_lstm:
            continue
        both, new = x[2 * channels :], x[2 * channels + gated :]
        for j in range(gated):
            both[j] = reset[j] * old[j]
        for j in range(gated):
            new[j] = old[j] + mix[j] * (candidate[j] - old[j])
