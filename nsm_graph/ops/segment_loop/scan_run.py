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
from nsm_graph.ops.segment_loop.scan import LoopScan

#: No heads, no columns.
NO_SCAN: Layout = make_layout(0, 0, 0, 0, 0, False, False, 0)


class ScanRun:
    """A scan, or none: then everything is empty, which is what kernels look at."""

    def __init__(self, scan: LoopScan | None, dtype: torch.dtype) -> None:
        self.dtype, self.layout = dtype, NO_SCAN if scan is None else scan.layout
        self.channels = 0 if scan is None else scan.channels
        nothing = torch.empty(0, 0, dtype=dtype), torch.empty(0, dtype=dtype)
        self.weight, self.bias = nothing if scan is None else (scan.weight, scan.bias)
        self.x = arrays.array(nothing[0] if scan is None else scan.x)
        self.stretch = self.x.dtype.type(0.0 if scan is None else scan.stretch)
        self.projection = Projection(arrays.place(self.weight.t()), arrays.place(self.bias))

    def make_reads(self, num_tokens: int) -> Tensor:
        """Room for what tokens read; empty where they do not."""
        num_rows = num_tokens if self.layout.reads > 0 else 0
        return torch.empty(num_rows, self.channels, dtype=self.dtype)

    def given(self, reads: np.ndarray) -> Scan:
        return Scan(self.x, self.projection, self.layout, self.stretch, reads)

    def make_d_x(self, num_tokens: int) -> Tensor:
        return make_token_grads(self.x, num_tokens, self.dtype)

    def make_grads(self, d_x: np.ndarray, d_reads: np.ndarray) -> ScanGrads:
        turned = Projection(arrays.place(self.weight), arrays.place(self.bias))
        zeros = (torch.zeros(x.shape, dtype=self.dtype) for x in (self.weight.t(), self.bias))
        return ScanGrads(turned, Projection(*(x.numpy() for x in zeros)), d_x, d_reads)

    def total(self, grads: list[ScanGrads]) -> list[Tensor]:
        """The sum of all threads' gradients of weight and bias, as these came."""
        weights, biases = zip(*(own.projection for own in grads), strict=True)
        return [torch.from_numpy(sum(weights[1:], weights[0])).t(),
                torch.from_numpy(sum(biases[1:], biases[0]))]  # fmt: skip

    def make_scratch(
        self, most_tokens: int, longest: int, num_rows: int, width: int
    ) -> ScanScratch:
        """Room for a step of so many tokens and states, of examples of at most ``longest`` tokens.

        What stands behind rows and columns is zero, and stays so.
        """
        layout = self.layout
        is_there = layout.transition + layout.memory > 0
        tokens, longest, num_rows = (n * is_there for n in (most_tokens, longest, num_rows))
        empty = partial(arrays.empty, self.dtype)
        num_keys = layout.transition * layout.reflections + 2 * layout.memory
        columns = arrays.spread(layout.num_columns)
        states = _fill_up(layout.num_states, LANES)
        return ScanScratch(
            x=empty(tokens, len(self.projection.weight)),
            d_x=empty(tokens, len(self.projection.weight)),
            steps=Steps(
                empty(tokens, columns), empty(tokens, columns),
                self._zeros(tokens, states), self._zeros(tokens, states),
            ),
            inverse=empty(tokens, num_keys),
            memories=self._memories(longest),
            states=empty(num_rows, width),
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
            d_states=zeros(heads, *state),
            d_held=zeros(holding, *held),
            slopes=zeros(most),
            numbers=zeros(most),
            line=zeros(most),
            mean=mean,
        )

    def _zeros(self, *shape: int) -> np.ndarray:
        return torch.zeros(shape, dtype=self.dtype).numpy()


def _fill_up(count: int, step: int) -> int:
    """The next multiple."""
    return -(-count // step) * step
