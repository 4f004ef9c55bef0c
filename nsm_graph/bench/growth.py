"""How a training step grows with tokens, states, heads and channels, beside what is predicted.

The source's complexity table (Neural State Machine flow, 4.1) names four terms for a segment. It
leaves out projections and the router's heads, which are most of the work at usual sizes; so there
are two predictions, its own and one of every product of matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from nsm_graph.bench.documented import (
    CHANNELS,
    HEADS,
    SEGMENT,
    STATES,
    agrees,
    make_batch,
    make_machine,
    step,
    whole_segments,
)
from nsm_graph.bench.record import BenchRecord, interleaved_medians

EXAMPLES, LENGTH = 8, 1024
#: No slower than predicted, within 10 %.
TARGET = 1 / 1.1


@dataclass(frozen=True)
class Size:
    """What is doubled, one at a time."""

    tokens: int
    states: int = STATES
    heads: int = HEADS
    channels: int = CHANNELS


def cost_by_table(size: Size) -> float:
    """The four terms that depend on a segment, as the source has them, each counted once."""
    n, c = size.states, size.channels
    router = attention = SEGMENT * n * c  # heads x channels of a head = c
    return size.tokens / SEGMENT * (router + attention + n * c**2 + n**2 * c)


def cost_of_products(size: Size) -> float:
    """Multiply-adds of every product in the forward pass; backward has twice as many."""
    n, c = size.states, size.channels
    # Embedding and key; logits of every router head; the routed sum; scores and attended values.
    of_a_token = 2 * c**2 + c * n * size.heads + n * c + 2 * n * c
    # Routed sum, query and attended 1 each; gates 6; communication 4. Then scores and values.
    of_a_segment = 13 * n * c**2 + 2 * n**2 * c
    return size.tokens * of_a_token + size.tokens / SEGMENT * of_a_segment


PREDICTIONS = {"source's table": cost_by_table, "every product": cost_of_products}


def bench_growth(*, repetitions: int = 5, scale: float = 1.0) -> list[BenchRecord]:
    """A step with twice of each, beside a step times what each prediction says.

    Args:
        repetitions: Timed turns of each.
        scale: Share of the length; less than 1 for a quick look.
    """
    once = Size(whole_segments(LENGTH * scale))
    names = ("tokens", "states", "heads", "channels")
    twice = {name: replace(once, **{name: 2 * getattr(once, name)}) for name in names}
    runs, is_right = {}, {}
    for name, size in {"once": once, **twice}.items():
        machine = make_machine(size.channels, size.states, size.heads)
        is_right[name] = agrees(machine)
        runs[name] = partial(step, machine, *make_batch([size.tokens] * EXAMPLES, size.channels))
    time = interleaved_medians(runs, repetitions, untimed=1)
    return [
        _record(name, predicted, once, twice[name], time, is_right["once"] and is_right[name])
        for name in names
        for predicted in PREDICTIONS
    ]


def _record(
    name: str, predicted: str, once: Size, twice: Size, time: dict[str, float], is_right: bool
) -> BenchRecord:
    cost = PREDICTIONS[predicted]
    growth = cost(twice) / cost(once)
    measured = math.log2(time[name] / time["once"])
    note = f"exponent of {name}: measured {measured:.2f}, predicted {math.log2(growth):.2f}"
    if cost is cost_by_table:
        note += "; the table leaves out projections and router heads"
    return BenchRecord(
        f"step, {name} {getattr(once, name)} -> {getattr(twice, name)}",
        predicted, time[name], time["once"] * growth, is_right, TARGET, note=note,
    )  # fmt: skip
