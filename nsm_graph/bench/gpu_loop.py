"""The machine's loop on a GPU, in one kernel: first that it is right, then a training step's time.

Beside the same machine step by step, and beside cuDNN's GRU of as many parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nsm_graph.bench.documented import CHANNELS, HEADS, STATES, is_close, make_batch
from nsm_graph.bench.loop import _count, _equal_parameters, _is_right, _make_machine, _step
from nsm_graph.bench.record import BenchRecord
from nsm_graph.ops.segment_loop import LoopSegments, LoopWeights, reference

#: Examples, a program each: nearly as many as an H200 has multiprocessors. Tokens of each.
EXAMPLES, LENGTH = 128, 1024
#: Tokens of a segment.
SEGMENTS = (16, 64)
#: How many times faster than the peer a training step should be.
STEP_BY_STEP, GRU = 10.0, 5.0

#: Milliseconds of each run, by name.
Times = Callable[[dict[str, Callable[[], object]]], dict[str, float]]

# Right or wrong ####################################################################


def check_loop(device: str) -> int:
    """Compares the kernels with the reference, which serves float64; returns how many cases."""
    from nsm_graph.ops.segment_loop import gpu

    for talks in (True, False):
        exact = _draw(talks)
        given = [x.detach().float().to(device).requires_grad_() for x in exact]
        pairs = zip(
            _run(gpu.segment_loop, given),
            _run(reference.segment_loop, exact),
            ("states after every step", "final states", "gradients"),
            strict=True,
        )
        for actual, expected, name in pairs:
            if not is_close(actual.cpu().double(), expected, 1e-5):
                raise ValueError(f"bench gpu: of the loop, {name} differ from the reference")
    return 2


def _draw(talks: bool) -> list[Tensor]:
    """Two examples of 5 states with 12 channels, 75 tokens in 3 groups, and a cell's parameters."""
    generator = torch.Generator().manual_seed(0)
    rows = [(10, 12), (15, 12), (75, 12), (75, 12)]
    maps = [(12, 12), (12, 12), (24, 24), (12, 24), *[(36, 12), (12, 12)] * talks]
    shapes = [*rows, *(shape for out, width in maps for shape in ((out, width), (out,)))]
    shapes += [(12,), (12,)] * talks
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    weights = [x * x.size(-1) ** -0.5 for x in drawn[len(rows) :]]
    return [x.requires_grad_() for x in (*drawn[: len(rows)], *weights)]


def _run(loop: Callable[..., tuple[Tensor, ...]], given: list[Tensor]) -> tuple[Tensor, ...]:
    """Both results, and all gradients of a sum of them without symmetry."""
    # A segment of more tokens than a block holds; the second example ends first.
    segments = LoopSegments(torch.tensor([0, 70, 72, 75]), torch.tensor([2, 1]))
    nothing: list[Any] = [None] * (len(LoopWeights._fields) + 4 - len(given))
    after, final = loop(*given[:4], segments, LoopWeights(*given[4:], *nothing), 2, 2)
    places = torch.arange(after.numel(), dtype=torch.float64).view(after.shape)
    loss = (after * torch.cos(places).to(after)).sum() + final.square().sum()
    grads = torch.autograd.grad(loss, given)
    return after.detach(), final.detach(), torch.cat([x.flatten() for x in grads])


# Times #############################################################################


def loop_records(device: torch.device, times: Times, scale: float) -> list[BenchRecord]:
    """A training step of the documented machine, for segments of two lengths."""
    records = []
    for segment in SEGMENTS:
        length = max(round(LENGTH * scale / segment), 1) * segment
        machine = _make_machine(segment).to(device)
        machine.cell.fuse = "triton"
        x, batch = (rows.to(device) for rows in make_batch([length] * EXAMPLES))
        is_right = _is_right(machine, x, batch, None)
        layer = _equal_parameters(_make_gru, machine).to(device)
        x_BTC = x.view(EXAMPLES, length, CHANNELS)

        def step(
            fuse: bool | str, machine: Any = machine, x: Tensor = x, batch: Tensor = batch
        ) -> None:
            machine.cell.fuse = fuse
            _step(machine, lambda: machine(x, batch))

        def layer_step(layer: nn.Module = layer, x_BTC: Tensor = x_BTC) -> None:
            _step(layer, lambda: layer(x_BTC)[0])

        runs: dict[str, Callable[[], object]] = {
            "ours": partial(step, "triton"),
            "step by step": partial(step, False),
            "GRU": layer_step,
        }
        time = times(runs)
        case = f"step B{EXAMPLES} L{length} N{STATES} C{CHANNELS} H{HEADS} S{segment}"
        tokens = EXAMPLES * length
        sizes = f", {_count(layer)} parameters beside our {_count(machine)}"
        for peer, target, rest in (
            ("step by step", STEP_BY_STEP, ""), ("GRU", GRU, sizes)
        ):  # fmt: skip
            rates = [tokens / time[name] / 1000 for name in ("ours", peer)]
            note = f"{rates[0]:.2f} million tokens/s against {rates[1]:.2f}{rest}"
            records.append(
                BenchRecord(case, peer, time["ours"], time[peer], is_right, target, note=note)
            )
    return records


def _make_gru(size: int) -> nn.Module:
    return nn.GRU(CHANNELS, size, batch_first=True)
