"""A batch of examples of many lengths, beside the same padded to the longest."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nsm_graph.bench.documented import (
    CHANNELS,
    gradient,
    is_close,
    make_batch,
    make_machine,
    step,
)
from nsm_graph.bench.record import BenchRecord, interleaved_medians
from nsm_graph.models import NeuralStateMachine

EXAMPLES, LONGEST, SPREAD = 32, 1024, 16
TARGET = 2.0


def bench_ragged(*, repetitions: int = 5, scale: float = 1.0) -> list[BenchRecord]:
    """A training step where the longest example has 16 times the tokens of the shortest.

    Args:
        repetitions: Timed turns of each.
        scale: Share of the lengths; less than 1 for a quick look.
    """
    longest = max(int(LONGEST * scale), 2 * SPREAD)
    place = torch.linspace(0, 1, EXAMPLES)
    lengths = {
        "every doubling as common": longest * SPREAD ** (place - 1),
        "every length as common": longest * (1 + (SPREAD - 1) * place) / SPREAD,
    }
    return [
        _compare(f"B{EXAMPLES} L{longest // SPREAD}-{longest}, {name}", found, repetitions)
        for name, found in lengths.items()
    ]


def _compare(case: str, lengths_B: Tensor, repetitions: int) -> BenchRecord:
    machine = make_machine()
    lengths = lengths_B.round().long().tolist()
    ragged = make_batch(lengths)
    padded = _pad(ragged[0], lengths)
    runs = {
        "ragged": partial(step, machine, *ragged),
        "padded": partial(step, machine, *padded),
    }
    is_right = _equals_each_alone(machine, *ragged, lengths)
    time = interleaved_medians(runs, repetitions, untimed=1)
    num_read, num_padded = ragged[0].size(0), padded[0].size(0)
    return BenchRecord(
        case, "padded", time["ragged"], time["padded"], is_right, TARGET,
        note=f"{num_read} tokens instead of {num_padded}: {num_padded / num_read:.2f} times fewer",
    )  # fmt: skip


def _pad(x: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Zeros behind every example; the machine reads them like any token."""
    rows_BLC = torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True)
    batch = torch.arange(len(lengths)).repeat_interleave(rows_BLC.size(1))
    return rows_BLC.reshape(-1, CHANNELS), batch


def _equals_each_alone(
    machine: NeuralStateMachine, x: Tensor, batch: Tensor, lengths: list[int]
) -> bool:
    """Whether predictions, and the sum of gradients, are those of one example at a time."""
    step(machine, x, batch)
    together, total = machine(x, batch).detach(), gradient(machine)
    alone, sums = [], torch.zeros_like(total)
    for example in x.split(lengths):
        step(machine, example, None)
        alone.append(machine(example).detach())
        sums += gradient(machine)
    return is_close(together, torch.cat(alone), 1e-5) and is_close(total, sums, 1e-5)
