"""What the ordered segment scan costs: a training step of the machine with and without it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsm_graph.bench.record import BenchRecord, interleaved_medians
from nsm_graph.models import NeuralStateMachine
from nsm_graph.nn import SegmentScan
from nsm_graph.nn.scan_layer import ScanLayer

#: The machine of the target: 32 sequences of 1,024 tokens in segments of 16.
EXAMPLES, LENGTH, SEGMENT, STATES, CHANNELS, HEADS, REFLECTIONS = 32, 1024, 16, 16, 64, 4, 2

#: At most so many times the time of a step without the scan: where both go segment by segment, and
#: beside the machine whose loop is one kernel.
TARGETS = {"no scan, step by step": 1 / 2.2, "no scan": 1 / 1.6}

SCANS: dict[str, dict[str, int | bool | None]] = {
    "4 transition heads, the gates write them all": {"gated_heads": None},
    "3 transition heads, 1 gated": {"gated_heads": 1},
    "2 transition, 1 memory, 1 gated": {"gated_heads": 1, "memory_heads": 1},
    "3 transition heads with decay and write, 1 gated": {"decay": True, "write": True},
}


def bench_scan(*, repetitions: int = 5, length: int = LENGTH) -> list[BenchRecord]:
    """Steps (forward and backward) with each kind of scan, beside none and the token-by-token form.

    Args:
        repetitions: Timed turns of each.
        length: Tokens of each sequence.
    """
    torch.manual_seed(0)
    x = torch.randn(EXAMPLES * length, 1)
    batch = torch.arange(EXAMPLES).repeat_interleave(length)
    machines = {name: _machine(None) for name in TARGETS}
    machines["no scan, step by step"].cell.fuse = False
    machines |= {name: _machine(_scan("chunked", **kind)) for name, kind in SCANS.items()}
    is_right = {name: _agrees(machine) for name, machine in machines.items() if name in SCANS}
    loop = _machine(_scan("reference", gated_heads=None))
    runs = {name: lambda m=machine: _step(m, x, batch) for name, machine in machines.items()}
    time = interleaved_medians(
        {**runs, "token by token": lambda: _step(loop, x, batch)}, repetitions
    )
    first = next(iter(SCANS))
    records = [
        BenchRecord(f"scan: {name}", peer, time[name], time[peer], is_right[name], target)
        for name in SCANS
        for peer, target in TARGETS.items()
    ]
    peer = BenchRecord(
        f"scan: {first}",
        "token by token",
        time[first],
        time["token by token"],
        is_right[first],
        1.0,
    )
    return [*records, peer]


def _scan(backend: str, **kind: int | bool | None) -> SegmentScan:
    return SegmentScan(
        CHANNELS,
        CHANNELS,
        STATES,
        HEADS,
        reflections=REFLECTIONS,
        backend=backend,
        **kind,  # type: ignore[arg-type]
    )


def _machine(scan: SegmentScan | None) -> NeuralStateMachine:
    return NeuralStateMachine(
        1, CHANNELS, STATES, 10, segment_length=SEGMENT, heads=HEADS, scan=scan, position="learned"
    )


def _step(machine: nn.Module, x: Tensor, batch: Tensor) -> None:
    machine.zero_grad()
    machine(x, batch).square().mean().backward()


def _agrees(machine: NeuralStateMachine) -> bool:
    """Whether states and gradients equal those of the token-by-token form to 1e-5."""
    x, batch = torch.randn(4 * 48, 1), torch.arange(4).repeat_interleave(48)
    results = []
    scan = machine.cell.scan
    assert isinstance(scan, SegmentScan)
    layers = [layer for layer in scan.layers if isinstance(layer, ScanLayer)]
    for backend in ("chunked", "reference"):
        for layer in layers:
            layer.backend = backend
        machine.zero_grad()
        machine.eval()
        states = machine.run(x, batch).state.states
        states.square().mean().backward()
        gradients = [p.grad for p in machine.parameters() if p.grad is not None]
        results.append([states.detach(), *gradients])
    for layer in layers:
        layer.backend = "chunked"
    machine.train()
    # Relative to what there is: a gradient may be next to nothing.
    largest = max(float(gradient.norm()) for gradient in results[1][1:])
    pairs = zip(*results, strict=True)
    return all(float((a - b).norm()) <= 1e-5 * max(float(b.norm()), largest) for a, b in pairs)
