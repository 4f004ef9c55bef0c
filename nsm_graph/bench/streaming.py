"""A stream of a million tokens beside ten thousand: time per token, and memory that stays."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from nsm_graph.bench.documented import SEGMENT, is_close, make_batch, make_machine
from nsm_graph.bench.record import BenchRecord, resident_mib
from nsm_graph.models import MachineState, NeuralStateMachine

#: Tokens that a call reads, whole segments; of a short stream; of the long one.
PIECE, SHORT, LONG = 125 * SEGMENT, 10_000, 1_000_000
#: Time within 5 %; resident memory of the process within 1 %, as closely as a system counts it.
TIME, MEMORY = 1 / 1.05, 0.99


class Turn(NamedTuple):
    """One long stream, and as many short ones as make up its length."""

    long_ms: float  #: per short stream's tokens, over the whole of the long one
    short_ms: float
    long_mib: float | None  #: of the process, at the end
    short_mib: float | None  #: of the process, after the first 10,000 tokens
    is_right: bool  #: every token was read, and every state is finite


@torch.no_grad()
def bench_streaming(*, repetitions: int = 5, scale: float = 1.0) -> list[BenchRecord]:
    """One stream, fed in pieces with the carried state and without gradients.

    Args:
        repetitions: Turns; each reads a long stream.
        scale: Share of the long stream; less than 1 for a quick look.
    """
    num_rounds = max(int(LONG * scale) // SHORT, 2)
    machine = make_machine().eval()
    x, _ = make_batch([SHORT])
    is_right = _equals_whole(machine, x)
    turns = [_read(machine, x, num_rounds) for _ in range(repetitions)]
    is_right = is_right and all(turn.is_right for turn in turns)
    typical = sorted(turns, key=lambda turn: turn.long_ms / turn.short_ms)[len(turns) // 2]
    case = f"stream of {num_rounds * SHORT} tokens in pieces of {PIECE}"
    peer = f"{SHORT} tokens"
    return [
        BenchRecord(
            f"{case}: {what}", peer, typical.long_ms, typical.short_ms, is_right, target,
            ours_mib=turns[-1].long_mib, peer_mib=turns[0].short_mib, measure=measure, note=note,
        )
        for what, measure, target, note in (
            ("time", "ms", TIME, f"per {SHORT} tokens"),
            ("memory", "mib", MEMORY, "resident memory of the process, after each"),
        )
    ]  # fmt: skip


def _read(machine: NeuralStateMachine, x: Tensor, num_rounds: int) -> Turn:
    """After each 10,000 tokens of the long stream a new short one: both see the same machine.

    The long stream repeats the tokens of the short one, so they need no room of their own.
    """
    state, short_mib = None, None
    spent = {"long": 0.0, "short": 0.0}
    for _ in range(num_rounds):
        start = time.perf_counter()
        state = _feed(machine, x, state)
        between = time.perf_counter()
        _feed(machine, x, None)
        spent["long"] += between - start
        spent["short"] += time.perf_counter() - between
        short_mib = resident_mib() if short_mib is None else short_mib
    assert state is not None
    per_round = 1000 / num_rounds
    is_whole = int(state.num_tokens) == num_rounds * x.size(0)
    is_right = is_whole and bool(state.states.isfinite().all())
    long_ms, short_ms = (seconds * per_round for seconds in spent.values())
    return Turn(long_ms, short_ms, resident_mib(), short_mib, is_right)


def _feed(machine: NeuralStateMachine, x: Tensor, state: MachineState | None) -> MachineState:
    for piece in x.split(PIECE):
        state = machine.run(piece, state=state).state
    assert state is not None
    return state


def _equals_whole(machine: NeuralStateMachine, x: Tensor) -> bool:
    """Whether a stream in pieces leaves the states that one call leaves, to 1e-5."""
    streamed, whole = _feed(machine, x, None), machine.run(x).state
    return is_close(streamed.states, whole.states, 1e-5)
