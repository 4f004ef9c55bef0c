"""The machine that most targets are about, a training step of it, and whether it is right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nsm_graph.bench.record import peak_mib
from nsm_graph.models import NeuralStateMachine

SEGMENT, STATES, CHANNELS, HEADS, CLASSES = 16, 16, 64, 4, 10


def make_machine(
    channels: int = CHANNELS, states: int = STATES, heads: int = HEADS,
    checkpoint_segments: str | None = None,
) -> NeuralStateMachine:  # fmt: skip
    """The documented machine; equal arguments give equal parameters."""
    torch.manual_seed(0)
    return NeuralStateMachine(
        channels,
        channels,
        states,
        CLASSES,
        segment_length=SEGMENT,
        heads=heads,
        checkpoint_segments=checkpoint_segments,
    )


def make_batch(lengths: list[int], channels: int = CHANNELS) -> tuple[Tensor, Tensor]:
    """Random tokens of examples of these lengths, and whose they are."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return torch.randn(sum(lengths), channels, generator=generator), batch


def whole_segments(length: float) -> int:
    """The nearest number of whole segments, at least one, in tokens."""
    return SEGMENT * max(round(length / SEGMENT), 1)


def step(machine: NeuralStateMachine, x: Tensor, batch: Tensor | None) -> None:
    """Forward and backward. The loss adds up over examples, so gradients of batches add up, too."""
    machine.zero_grad()
    machine(x, batch).square().sum().backward()


def gradient(machine: NeuralStateMachine) -> Tensor:
    """Of all parameters, one after another."""
    return torch.cat([p.grad.flatten() for p in machine.parameters() if p.grad is not None])


def is_close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether they differ by at most this share of the norm."""
    return float((actual - expected).norm()) <= tolerance * float(expected.norm())


def agrees(machine: NeuralStateMachine, length: int = 4 * SEGMENT) -> bool:
    """Whether one kernel gives predictions and gradients of the loop step by step, to 1e-5."""
    x, batch = make_batch([length, length // 2 + 1], machine.in_channels)
    found = {}
    for fuse in (True, False):
        machine.cell.fuse = fuse
        step(machine, x, batch)
        found[fuse] = machine(x, batch).detach(), gradient(machine)
    machine.cell.fuse = True
    return all(is_close(a, b, 1e-5) for a, b in zip(found[True], found[False], strict=True))


def peak_of_first(run: Callable[[], object]) -> float | None:
    """How far a step raises the memory where the step before left nothing that it could use.

    The least of three: malloc wastes more at one time than at another.
    """
    peaks = []
    for _ in range(3):
        # A step of another size: its memory is kept now.
        step(make_machine(8, 2, 1), *make_batch([SEGMENT], 8))
        peaks.append(peak_mib(run))
    return min((peak for peak in peaks if peak is not None), default=None)
