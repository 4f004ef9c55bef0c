"""What the ordered segment scan costs: a training step of the machine with and without it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from nsm_graph.bench.record import BenchRecord, interleaved_medians
from nsm_graph.models import NeuralStateMachine
from nsm_graph.nn import SegmentScan
from nsm_graph.nn.scan_layer import ScanLayer

#: The machine of the target: 32 sequences of 1,024 tokens in segments of 16.
EXAMPLES, LENGTH, SEGMENT, STATES, CHANNELS, HEADS, REFLECTIONS = 32, 1024, 16, 16, 64, 4, 2

#: At most 1.6 times the time of a step without the scan; beside the same scan step by step, less.
TARGET, TARGET_STEP_BY_STEP = 1 / 1.6, 1.0

#: The scan, and whether tokens read, too: then the machine beside it has a token head as well.
SCANS: dict[str, tuple[dict[str, int | bool | None], bool]] = {
    "decay, write and per-token read": ({"decay": True, "write": True}, True),
    "decay and write": ({"decay": True, "write": True}, False),
    "3 transition heads, 1 gated": ({}, False),
    "2 transition, 1 memory, 1 gated": ({"memory_heads": 1}, False),
    "4 transition heads that the gates write, too, decay and write": (
        {"gated_heads": None, "decay": True, "write": True},
        False,
    ),
}


def bench_scan(*, repetitions: int = 5, length: int = LENGTH) -> list[BenchRecord]:
    """Steps (forward and backward) with each kind of scan, beside none and the same step by step.

    Args:
        repetitions: Timed turns of each.
        length: Tokens of each sequence.
    """
    torch.manual_seed(0)
    x = torch.randn(EXAMPLES * length, 1)
    batch = torch.arange(EXAMPLES).repeat_interleave(length)
    plain = {reads: _machine(None, reads) for reads in (True, False)}
    records = []
    for name, (kind, reads) in SCANS.items():
        machine, stepwise = (_machine(_scan(**kind), reads) for _ in range(2))
        is_right = _agrees(machine)
        stepwise.cell.fuse = False
        machines = {"ours": machine, "no scan": plain[reads], "step by step": stepwise}
        runs = {peer: partial(_step, m, x, batch) for peer, m in machines.items()}
        time = interleaved_medians(runs, repetitions)
        records += [
            BenchRecord(f"scan: {name}", peer, time["ours"], time[peer], is_right, target)
            for peer, target in (("no scan", TARGET), ("step by step", TARGET_STEP_BY_STEP))
        ]
    return records


def _scan(**kind: int | bool | None) -> SegmentScan:
    return SegmentScan(
        CHANNELS, CHANNELS, STATES, HEADS, reflections=REFLECTIONS,
        **kind,  # type: ignore[arg-type]
    )  # fmt: skip


def _machine(scan: SegmentScan | None, reads: bool) -> NeuralStateMachine:
    return NeuralStateMachine(
        1, CHANNELS, STATES, 10, segment_length=SEGMENT, heads=HEADS, scan=scan,
        position="learned", head="token" if reads else "example",
    )  # fmt: skip


def _step(machine: nn.Module, x: Tensor, batch: Tensor) -> None:
    machine.zero_grad()
    machine(x, batch).square().mean().backward()


def _agrees(machine: NeuralStateMachine) -> bool:
    """Whether outputs, states and gradients equal those of the token-by-token form to 1e-5."""
    x, batch = torch.randn(4 * 48, 1), torch.arange(4).repeat_interleave(48)
    scan = machine.cell.scan
    assert isinstance(scan, SegmentScan)
    layers = [layer for layer in scan.layers if isinstance(layer, ScanLayer)]
    results = []
    machine.eval()
    for backend in (None, "reference"):
        for layer in layers:
            layer.backend = backend
        machine.zero_grad()
        result = machine.run(x, batch)
        (result.state.states.square().mean() + result.out.square().mean()).backward()
        gradients = [p.grad for p in machine.parameters() if p.grad is not None]
        results.append([result.out.detach(), result.state.states.detach(), *gradients])
    for layer in layers:
        layer.backend = None
    machine.train()
    # Relative to what there is: a gradient may be next to nothing.
    largest = max(float(gradient.norm()) for gradient in results[1][2:])
    pairs = zip(*results, strict=True)
    return all(float((a - b).norm()) <= 1e-5 * max(float(b.norm()), largest) for a, b in pairs)
