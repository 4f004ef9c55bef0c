"""What edits of the node set save, and what watching the states costs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nsm_graph.bench.record import BenchRecord, interleaved_medians
from nsm_graph.memory import MemoryEditor
from nsm_graph.models import NeuralStateMachine

#: Examples, tokens, states: where states weigh, and the machine of the other benchmarks.
PRUNED, WATCHED = (8, 1024, 64), (32, 1024, 16)
CHANNELS, SEGMENT = 64, 16
SIGNALS = ("gradient", "update", "sharpness")
#: A step with half of the states, beside all; with every signal watched, beside the routing mass.
TARGET_HALF, TARGET_WATCHED = 1.6, 1 / 1.03


def bench_editing(*, repetitions: int = 5, length: int | None = None) -> list[BenchRecord]:
    """Training steps after half of the states were pruned, and with all signals watched.

    Args:
        repetitions: Timed turns of each.
        length: Tokens of each sequence; ``None`` for those of the targets.
    """
    return [_half(repetitions, length), _watched(repetitions, length)]


def _half(repetitions: int, length: int | None) -> BenchRecord:
    examples, tokens, states = PRUNED
    x, batch = _sequences(examples, length or tokens)
    whole, half = _machine(states), _machine(states)
    half.load_state_dict(whole.state_dict())
    half.manager.prune(lowest=states // 2)
    small = _machine(states // 2)
    _take_over(small, half)
    runs = {"half": partial(_step, half, x, batch), "all": partial(_step, whole, x, batch)}
    time = interleaved_medians(runs, repetitions)
    is_right = torch.allclose(half(x, batch), small(x, batch), rtol=1e-4, atol=1e-5)
    return BenchRecord(
        f"editing: {states // 2} of {states} states after pruning", "all states",
        time["half"], time["all"], is_right, TARGET_HALF,
    )  # fmt: skip


def _watched(repetitions: int, length: int | None) -> BenchRecord:
    examples, tokens, states = WATCHED
    x, batch = _sequences(examples, length or tokens)
    watched, plain = _machine(states, dict.fromkeys(SIGNALS, 100.0)), _machine(states)
    editor = MemoryEditor(watched.manager)

    def step() -> None:
        _step(watched, x, batch)
        editor.step()

    time = interleaved_medians(
        {"watched": step, "plain": partial(_step, plain, x, batch)}, repetitions
    )
    is_right = all(bool((watched.manager.signal_ema(n) > 0).all()) for n in SIGNALS)
    return BenchRecord(
        f"editing: routing mass, {', '.join(SIGNALS)} watched", "routing mass", time["watched"],
        time["plain"], is_right, TARGET_WATCHED,
    )  # fmt: skip


def _machine(num_states: int, watch: dict[str, float] | None = None) -> NeuralStateMachine:
    torch.manual_seed(0)
    return NeuralStateMachine(
        1, CHANNELS, num_states, 10, segment_length=SEGMENT, watch=watch, pool="mean"
    )


def _take_over(small: NeuralStateMachine, half: NeuralStateMachine) -> None:
    """Gives a machine without free slots what the active slots of another one hold."""
    slots, others = half.manager.slots, half.state_dict()
    for name, own in small.state_dict().items():
        given = others[name]
        if given.shape != own.shape:
            rows = given.unflatten(0, (half.manager.max_states, -1))[slots]
            given = rows.flatten(0, 1).view_as(own)
        own.copy_(torch.ones_like(own) if name == "manager.active" else given)


def _sequences(examples: int, length: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(examples * length, 1, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(examples).repeat_interleave(length)


def _step(machine: NeuralStateMachine, x: Tensor, batch: Tensor) -> None:
    machine.zero_grad()
    machine(x, batch).square().mean().backward()
