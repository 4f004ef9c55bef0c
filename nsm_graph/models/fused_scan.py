"""A scan of one layer as the loop's operation takes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsm_graph.nn import SegmentScan
from nsm_graph.nn.scan_heads import MemoryHeads, TransitionHeads
from nsm_graph.ops.delta_scan.cpu.arrays import make_layout
from nsm_graph.ops.segment_loop import LoopScan


def loop_scan(
    scan: SegmentScan, x: Tensor, tail: Tensor | None, slots: Tensor, reads: bool
) -> LoopScan:
    """The scan over tokens ``x`` behind their examples' ``tail``, for states in these slots."""
    layer: Any = scan.layers[0]
    transition: TransitionHeads | None = layer.transition
    memory: MemoryHeads | None = layer.memory
    composing, recalling = (
        {} if kind is None else dict(kind.named_children()) for kind in (transition, memory)
    )
    layout = make_layout(
        transition=0 if transition is None else transition.heads,
        memory=0 if memory is None else memory.heads,
        reflections=1 if transition is None else transition.reflections,
        width=scan.head_channels,
        num_states=slots.numel(),
        decays="lin_decay" in composing,
        writes="lin_write" in composing,
        reads=(2 if layer.read == "routed" else 1) if reads else 0,
    )
    query = _of_slots(recalling.get("lin_query"), scan, slots)
    if query is not None and not reads:  # no gradient reaches them, not even one of zeros
        query = (query[0].detach(), query[1].detach())
    # In the layout's order.
    parts = [
        _of(composing.get("lin_key")),
        _of_slots(recalling.get("lin_key"), scan, slots),
        query,
        _of(composing.get("lin_value")),
        _of(recalling.get("lin_value")),
        *(_of(composing.get(name)) for name in ("lin_beta", "lin_decay", "lin_write")),
        _of(recalling.get("lin_beta")),
    ]
    weights, biases = zip(*(part for part in parts if part is not None), strict=True)
    stretch = layer.memory.stretch if transition is None else transition.stretch
    weight, bias = torch.cat(weights), torch.cat(biases)
    convolution = convolution_bias = None
    if scan.convolution is not None:
        convolution, convolution_bias = _of(scan.convolution.lin) or (None, None)
    if convolution is None:  # nobody looks at the token before
        tail = None
    return LoopScan(
        x, weight, bias, convolution, convolution_bias, tail, layout=layout, stretch=float(stretch)
    )


def _of(part: Any) -> tuple[Tensor, Tensor] | None:
    return None if part is None else (part.weight, part.bias)


def _of_slots(part: Any, scan: SegmentScan, slots: Tensor) -> tuple[Tensor, Tensor] | None:
    """Slots stand first, then heads; in the loop heads do, with the slots that there are."""
    if part is None:
        return None
    by_slot = (scan.num_states, scan.memory_heads)
    weight, bias = (x.unflatten(0, by_slot)[slots] for x in (part.weight, part.bias))
    return weight.transpose(0, 1).flatten(0, 1), bias.t().flatten()
