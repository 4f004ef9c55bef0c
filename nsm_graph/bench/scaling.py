"""How time and memory of a training step grow with the length of the sequences."""

from __future__ import annotations

from functools import partial

from nsm_graph.bench.checkpointing import bench_checkpointing
from nsm_graph.bench.documented import (
    agrees,
    make_batch,
    make_machine,
    peak_of_first,
    step,
    whole_segments,
)
from nsm_graph.bench.growth import bench_growth
from nsm_graph.bench.record import BenchRecord, interleaved_medians

#: Examples at each length: always as many, and so many that all batches have as many tokens.
AS_MANY_EXAMPLES = {1024: 8, 4096: 8, 16_384: 8}
AS_MANY_TOKENS = {1024: 32, 4096: 8, 16_384: 2}
#: Linear within 10 %.
TARGET = 1 / 1.1


def bench_scaling(*, repetitions: int = 5, scale: float = 1.0) -> list[BenchRecord]:
    """A step at greater lengths beside itself at 1,024; growth exponents; checkpoints.

    Args:
        repetitions: Timed turns of each.
        scale: Share of the lengths; less than 1 for a quick look.
    """
    return [
        *_bench_length(AS_MANY_EXAMPLES, repetitions, scale),
        *_bench_length(AS_MANY_TOKENS, repetitions, scale),
        *bench_growth(repetitions=repetitions, scale=scale),
        *bench_checkpointing(repetitions=repetitions, scale=scale),
    ]


def _bench_length(examples: dict[int, int], repetitions: int, scale: float) -> list[BenchRecord]:
    """Time, and how far the step raises the memory, for each 1,024 tokens of the batch."""
    machine = make_machine()
    sizes = [(num, whole_segments(length * scale)) for length, num in examples.items()]
    is_right = agrees(machine, max(length for _, length in sizes))
    names = [f"B{num} L{length}" for num, length in sizes]
    share = {name: 1024 / (num * length) for name, (num, length) in zip(names, sizes, strict=True)}
    steps = {
        name: partial(step, machine, *make_batch([length] * num))
        for name, (num, length) in zip(names, sizes, strict=True)
    }
    # As in training: the step before was of the same size, and left its memory.
    time = interleaved_medians(steps, repetitions, untimed=1)
    ms = {name: time[name] * share[name] for name in names}
    mib: dict[str, float | None] = {}
    for name, run in steps.items():
        peak = peak_of_first(run)
        mib[name] = None if peak is None else peak * share[name]
    first, *longer = names
    return [
        BenchRecord(
            f"step, {name}: {what} per 1,024 tokens", first, ms[name], ms[first], is_right, TARGET,
            ours_mib=mib[name], peer_mib=mib[first], measure=measure,
        )
        for name in longer
        for what, measure in (("time", "ms"), ("memory", "mib"))
    ]  # fmt: skip
