"""The arrays of a call's scan: parameters as kernels read them, and where they work."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from nsm_graph.ops.cpu import arrays
from nsm_graph.ops.cpu.vectors import LANES
from nsm_graph.ops.delta_scan.cpu.arrays import Layout, Memories, Projection, Steps, make_layout
from nsm_graph.ops.delta_scan.cpu.columns import ROWS
from nsm_graph.ops.hoist.fused import make_token_grads
from nsm_graph.ops.segment_loop.cpu.scan import Scan, ScanGrads, ScanScratch
from nsm_graph.ops.segment_loop.scan import NUM_TENSORS, LoopScan

#: No heads, no columns.
NO_SCAN: Layout = make_layout(0, 0, 0, 0, 0, False, False, 0)


class ScanRun:
    """A scan, or none: then everything is empty, which is what kernels look at."""

    def __init__(self, scan: LoopScan | None, dtype: torch.dtype, num_examples: int) -> None:
        self.dtype, self.scan = dtype, scan
        self.layout = NO_SCAN if scan is None else scan.layout
        self.channels = 0 if scan is None else scan.channels
        nothing = torch.empty(0, 0, dtype=dtype), torch.empty(0, dtype=dtype)
        self.weights = self.convolution = nothing
        if scan is not None:
            self.weights = scan.weight, scan.bias
            if scan.convolution is not None and scan.convolution_bias is not None:
                self.convolution = scan.convolution, scan.convolution_bias
        self.x = arrays.array(nothing[0] if scan is None else scan.x)
        self.width = self.x.shape[1]
        if scan is None or scan.tail is None:
            self.tail = self._zeros(num_examples, self.width)
        else:
            self.tail = arrays.array(scan.tail)
        self.stretch = self.x.dtype.type(0.0 if scan is None else scan.stretch)
        self.num_keys = self.layout.transition * self.layout.reflections + 2 * self.layout.memory
        self.columns = arrays.spread(self.layout.num_columns)

    def make_reads(self, num_tokens: int) -> Tensor:
        """Room for what tokens read; empty where they do not."""
        num_rows = num_tokens if self.layout.reads > 0 else 0
        return torch.empty(num_rows, self.channels, dtype=self.dtype)

    def no_reads(self) -> np.ndarray:
        """Where nobody asks for what tokens read, or for its gradient."""
        return arrays.empty(self.dtype, 0, self.channels)

    def record_widths(self, channels: int) -> tuple[int, int, int, int]:
        """What a step keeps: numbers of a state, and of a token, array by array."""
        if self.scan is None:
            return 0, 0, 0, 0
        return channels, self.width, self.columns, self.num_keys

    def given(self, reads: np.ndarray) -> Scan:
        return Scan(
            self.x, self.tail, _place(self.convolution, True), _place(self.weights, True),
            self.layout, self.stretch, reads,
        )  # fmt: skip

    def make_grads(
        self, num_threads: int, num_tokens: int, d_reads: Tensor | None
    ) -> list[ScanGrads]:
        """For each thread; they share those of tokens, and what is given."""
        pairs = (self.convolution, self.weights)
        turned = [_place(pair, False) for pair in pairs]
        d_x = make_token_grads(self.x, num_tokens, self.dtype).numpy()
        d_tail = np.zeros_like(self.tail)
        given = self.no_reads() if d_reads is None else arrays.array(d_reads)
        grads = []
        for _ in range(num_threads):
            convolution, weights = (self._zeros_like(pair) for pair in pairs)
            grads.append(ScanGrads(turned[0], turned[1], convolution, weights, d_x, d_tail, given))
        return grads

    def total(self, grads: list[ScanGrads]) -> list[Tensor | None]:
        """The gradients of all of :class:`LoopScan`'s tensors; sums over threads."""
        found: list[Tensor | None] = [None] * NUM_TENSORS
        if self.scan is None:
            return found
        found[0] = torch.from_numpy(grads[0].x)
        found[1:3] = _sum([own.projection for own in grads])
        if self.scan.convolution is not None:
            found[3:5] = _sum([own.convolution for own in grads])
        if self.scan.tail is not None:
            found[5] = torch.from_numpy(grads[0].tail)
        return found

    def make_scratch(
        self, most_examples: int, longest: int, num_rows: int, channels: int
    ) -> ScanScratch:
        """Room for a step of so many examples, tokens of each and states in all.

        What stands behind rows and columns is zero, and stays so.
        """
        is_there = self.scan is not None
        longest, num_rows = longest * is_there, num_rows * is_there
        tokens, width = most_examples * longest, self.width
        states = _fill_up(self.layout.num_states, LANES)
        empty, zeros = partial(arrays.empty, self.dtype), self._zeros
        return ScanScratch(
            pairs=empty(tokens, arrays.spread(2 * width)),
            d_pairs=empty(tokens, arrays.spread(2 * width)),
            x=empty(tokens, width),
            d_x=empty(tokens, width),
            carry=empty(most_examples, width),
            steps=Steps(
                empty(tokens, self.columns), empty(tokens, self.columns), zeros(tokens, states),
                zeros(tokens, states),
            ),
            inverse=empty(tokens, self.num_keys),
            memories=self._memories(longest),
            states=empty(num_rows, channels),
        )  # fmt: skip

    def _memories(self, longest: int) -> Memories:
        layout = self.layout
        size, width, heads, holding = (
            layout.num_states, layout.width, layout.transition, layout.memory,
        )  # fmt: skip
        across, along = _fill_up(size, LANES), _fill_up(width, LANES)
        slots = 2 if layout.decays or layout.writes else 1
        state, held = (_fill_up(width, ROWS), across), (_fill_up(size, ROWS), along)
        zeros, most = self._zeros, max(across, along)
        mean = zeros(across)
        mean[:size] = 1 / max(size, 1)
        return Memories(
            states=zeros(heads, slots * longest + 1, *state),
            held=zeros(holding, longest + 1, *held),
            state_errors=zeros(heads, longest * layout.reflections, across),
            held_errors=zeros(holding, longest, along),
            d_states=zeros(heads, 1, *state),
            d_held=zeros(holding, 1, *held),
            slopes=zeros(most),
            numbers=zeros(most),
            line=zeros(most),
            mean=mean,
        )

    def _zeros(self, *shape: int) -> np.ndarray:
        return torch.zeros(shape, dtype=self.dtype).numpy()

    def _zeros_like(self, pair: tuple[Tensor, Tensor]) -> Projection:
        weight, bias = pair
        return Projection(self._zeros(*weight.t().shape), self._zeros(*bias.shape))


def _place(pair: tuple[Tensor, Tensor], is_turned: bool) -> Projection:
    """``[in, out]`` if turned, else as the weights came."""
    weight, bias = pair
    return Projection(arrays.place(weight.t() if is_turned else weight), arrays.place(bias))


def _sum(grads: list[Projection]) -> list[Tensor | None]:
    """Over threads, as the weights came."""
    weights, biases = (torch.from_numpy(sum(own[1:], own[0])) for own in zip(*grads, strict=True))
    return [weights.t(), biases]


def _fill_up(count: int, step: int) -> int:
    """The next multiple."""
    return -(-count // step) * step
