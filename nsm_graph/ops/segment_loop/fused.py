"""The loop as one function that autograd knows; the work is that of `cpu/`."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsm_graph.ops.cpu import arrays
from nsm_graph.ops.cpu.threads import run_all
from nsm_graph.ops.delta_scan.cpu.arrays import Layout
from nsm_graph.ops.derivatives import needs_reference, through_reference
from nsm_graph.ops.hoist.cpu import Scratch as HoistScratch
from nsm_graph.ops.hoist.cpu import Weights as HoistArrays
from nsm_graph.ops.hoist.fused import Projections, make_scratch, make_token_grads
from nsm_graph.ops.hoist.inputs import HoistWeights
from nsm_graph.ops.segment_loop import cpu, reference
from nsm_graph.ops.segment_loop.inputs import LoopSegments, LoopWeights, TokenResults
from nsm_graph.ops.segment_loop.parameters import turn, turn_back
from nsm_graph.ops.segment_loop.scan import NUM_TENSORS, LoopScan
from nsm_graph.ops.segment_loop.scan_run import ScanRun

#: Bytes of one step's activations that a thread works on: they are to stay in its cache.
STEP_BYTES = 1 << 19
#: Examples that a thread takes at a time, at most.
MOST_EXAMPLES = 4

#: Where a backward's steps were kept, for the next forward that has room in it: the largest.
_spare: dict[torch.dtype, np.ndarray] = {}


def release_memory() -> None:
    """Gives back what backward left for the next forward."""
    _spare.clear()


def segment_loop(
    states: Tensor,
    routed: Tensor,
    key: Tensor,
    value: Tensor,
    segments: LoopSegments,
    weights: LoopWeights,
    heads: int,
    talk_heads: int,
    keep: bool,
    cell: Tensor | None,
) -> tuple[Tensor, ...]:
    """States after every step and after each example's last, and an LSTM's last cell."""
    values = None if key is value else value
    given = [states, cell, routed, key, values, *[None] * 9, *weights, *[None] * NUM_TENSORS]
    after, final, _, final_cell, _ = _apply(given, segments, None, heads, talk_heads, keep)
    results = (after, final, final_cell)
    return tuple(x for x in results if x is not None)


def token_loop(
    states: Tensor,
    x: Tensor,
    first: Tensor,
    projections: HoistWeights,
    segments: LoopSegments,
    weights: LoopWeights,
    heads: int,
    talk_heads: int,
    keep: bool,
    cell: Tensor | None,
    scan: LoopScan | None,
) -> TokenResults:
    """The same of tokens."""
    scanned: list[Tensor | None] = [None] * NUM_TENSORS if scan is None else list(scan.tensors)
    given = [states, cell, None, None, None, x, *projections, *weights, *scanned]
    options = None if scan is None else (scan.layout, scan.stretch)
    results: Any = _apply(given, segments, first, heads, talk_heads, keep, options)
    return TokenResults(*results)


def _apply(
    given: list[Tensor | None],
    segments: LoopSegments,
    first: Tensor | None,
    heads: int,
    talk_heads: int,
    keep: bool,
    scan: tuple[Layout, float] | None = None,
) -> tuple[Tensor | None, ...]:
    has_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    call = _Call(segments, first, heads, talk_heads, scan, keep and has_grad, has_grad)
    return _Loop.apply(call, *given)


class _Call(NamedTuple):
    """What a call is told beside tensors with gradients."""

    segments: LoopSegments
    first: Tensor | None  #: where the tokens of each group begin, if the loop is given tokens
    heads: int
    talk_heads: int  #: of communication
    scan: tuple[Layout, float] | None  #: layout and stretch
    is_kept: bool
    has_grad: bool


class _Given(NamedTuple):
    """The tensors of a call: rows or tokens."""

    states: Tensor
    cell: Tensor | None  #: an LSTM's
    routed: Any  #: rows are None where tokens are given
    key: Any
    value: Any  #: None where values are keys, too
    x: Any  #: None where rows are given, as all projections are
    projections: HoistWeights
    weights: LoopWeights
    scan: LoopScan | None


def _name(call: _Call, given: Any) -> _Given:
    states, cell, routed, key, value, x = given[:6]
    projections, weights = HoistWeights(*given[6:14]), LoopWeights(*given[14:-NUM_TENSORS])
    scan = None
    if call.scan is not None:
        layout, stretch = call.scan
        x_scan, weight, bias, convolution, its_bias, tail = given[-NUM_TENSORS:]
        scan = LoopScan(x_scan, weight, bias, convolution, its_bias, tail, layout, stretch)
    return _Given(states, cell, routed, key, value, x, projections, weights, scan)


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, *given):  # type: ignore[no-untyped-def]
        run = _Run(call, _name(call, given))
        after, final, mass, final_cell, reads = run.forward()
        ctx.run, ctx.call = run, call
        ctx.save_for_backward(*given, after)
        ctx.mark_non_differentiable(mass)
        ctx.set_materialize_grads(False)  # most want the final states only
        return after, final, mass, final_cell, reads

    @staticmethod
    def backward(ctx, d_after, d_final, _, d_final_cell, d_reads):  # type: ignore[no-untyped-def]
        *given, after = ctx.saved_tensors
        grads = [d_after, d_final, d_final_cell, d_reads]
        if all(grad is None for grad in grads):  # what read them had no gradient itself
            return None, *[None] * len(given)
        if needs_reference(grads):
            results = partial(_reference, ctx.call)
            return None, *through_reference(results, given, grads)
        return None, *ctx.run.backward(*grads, after)


def _reference(call: _Call, *given: Tensor | None) -> tuple[Tensor | None, ...]:
    """States, the last cell and what tokens read, in plain torch; None for what there is not."""
    own = _name(call, given)
    if own.x is not None:
        assert call.first is not None
        after, final, _, *rest = reference.token_loop(
            own.states, own.x, call.first, own.projections, call.segments, own.weights,
            call.heads, call.talk_heads, own.cell, own.scan,
        )  # fmt: skip
        return after, final, *rest
    after, final, *last = reference.segment_loop(
        own.states, own.routed, own.key, own.key if own.value is None else own.value,
        call.segments, own.weights, call.heads, call.talk_heads, own.cell,
    )  # fmt: skip
    return after, final, last[0] if last else None, None


# One call ##########################################################################


class _Run:
    """Arrays of one forward, and the backward that belongs to it."""

    def __init__(self, call: _Call, given: _Given) -> None:
        self.call, self.heads, self.is_kept = call, call.heads, call.is_kept
        self.dtype = given.states.dtype
        self.states = arrays.array(given.states)
        self.cell = None if given.cell is None else arrays.array(given.cell)
        self.num_gates = 3 if given.cell is None else 4
        ptr, num_active = (x.numpy() for x in call.segments)
        self.segments = cpu.Segments(ptr, np.cumsum(num_active) - num_active, num_active)
        self.has_tokens, self.has_talk = given.x is not None, given.weights.qkv is not None
        self.gated, self.talk_heads = given.weights.gated, call.talk_heads if self.has_talk else 0
        self.num_groups, self.num_tokens = len(ptr) - 1, int(ptr[-1])
        self.scan = ScanRun(given.scan, self.dtype, int(num_active.max()))
        self.projections = Projections(given.projections) if self.has_tokens else None
        if given.x is not None:
            self.is_shared = given.projections.value is None
            self.num_states = given.projections.logits.size(0) // self.heads
            self.rows = cpu.Rows(*[self._empty(0, 0)] * 3)
            self.x = arrays.array(given.x)
        else:
            self.is_shared = given.value is None
            value = given.key if given.value is None else given.value
            key, value, routed = map(arrays.array, (given.key, value, given.routed))
            self.num_states = len(routed) // self.num_groups
            self.rows = cpu.Rows(key, value, routed)
            self.x = self._empty(0, 0)
        self.turned = turn(given.weights, self.heads, self.talk_heads)
        self.weights = cpu.Weights(*map(arrays.place, self.turned))
        self.chunks = self._share()
        self.most_examples = max(int((part[:, 1] - part[:, 0]).max()) for part in self.chunks)
        self.longest = int(np.diff(ptr).max())
        self.places, self.kept_size = self._find_places() if self.is_kept else (self.chunks, 0)
        # Behind what steps made: the cells that they found. Without a gradient nobody reads them.
        has_cells = call.has_grad and self.cell is not None
        rows = self.num_groups * self.num_states
        self.cells_size = rows * self.gated if has_cells else 0
        self.kept: np.ndarray | None = None

    def _empty(self, *shape: int) -> np.ndarray:
        return arrays.empty(self.dtype, *shape)

    def _tokens(self, mass: np.ndarray) -> cpu.Tokens:
        if self.projections is None or self.call.first is None:
            nothing = [self._empty(*shape) for shape in ((0, 0), (0,)) * 4]
            return cpu.Tokens(self.x, np.empty(0, np.int64), HoistArrays(*nothing), 1, mass)
        first = self.call.first.numpy()
        return cpu.Tokens(self.x, first, self.projections.placed(), self.heads, mass)

    def _share(self) -> list[np.ndarray]:
        """For each thread, ranges of examples."""
        channels = self.states.shape[1]
        num_examples = int(self.segments.num_active[0])
        num_threads = min(torch.get_num_threads(), num_examples)
        numbers = (4 * channels + 10 * self.gated) * self.num_states
        room = STEP_BYTES // (numbers * self.dtype.itemsize)
        size = max(1, min(room, MOST_EXAMPLES, num_examples // num_threads))
        first = np.arange(0, num_examples, size)
        ranges = np.stack([first, np.minimum(first + size, num_examples)], axis=1)
        # Examples stand longest first: threads take turns.
        return [ranges[thread::num_threads].copy() for thread in range(num_threads)]

    def _find_places(self) -> tuple[list[np.ndarray], int]:
        """Where each step is kept, ``[chunks, steps]`` for each thread, and how much that is."""
        ptr, first, num_active = self.segments
        ranges = np.concatenate(self.chunks)
        start, end = (column[:, None] for column in ranges.T)
        counts = (np.minimum(end, num_active) - start).clip(min=0)
        group = np.minimum(first + start, len(ptr) - 1)
        tokens = ptr[np.minimum(group + counts, len(ptr) - 1)] - ptr[group]
        sizes = cpu.record_size(
            counts * self.num_states, tokens, self.states.shape[1], self.gated, self.num_states,
            self.heads, self.talk_heads, self.num_gates,
            self.scan.record_widths(self.states.shape[1]),
        )  # fmt: skip
        ends = sizes.cumsum().reshape(sizes.shape)
        cuts = np.cumsum([len(part) for part in self.chunks])[:-1]
        return [np.ascontiguousarray(x) for x in np.split(ends - sizes, cuts)], int(ends[-1, -1])

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        self.kept, after, final, mass, final_cell, reads = self._read()
        last_cell = None if self.cell is None else final_cell
        return after, final, mass, last_cell, reads if self.scan.layout.reads > 0 else None

    def _read(self) -> tuple[np.ndarray, Tensor, Tensor, Tensor, Tensor, Tensor]:
        kept = self._take()
        final_cell = torch.from_numpy(self._no_rows() if self.cell is None else self.cell).clone()
        channels = self.states.shape[1]
        after = torch.empty(self.num_groups * self.num_states, channels, dtype=self.dtype)
        final = torch.empty(self.states.shape, dtype=self.dtype)
        mass = torch.empty(len(after) * self.has_tokens, dtype=self.dtype)
        num_read = int(self.segments.num_active[0]) * self.num_states
        final[num_read:] = torch.from_numpy(self.states[num_read:])
        tokens = self._tokens(mass.numpy())
        reads = self.scan.make_reads(self.num_tokens)
        scan = self.scan.given(reads.numpy())
        calls = [
            (
                self.states, self._cells(kept, final_cell.numpy()), self.rows, tokens, scan,
                self.segments, self.weights, self._made(), self._scratch(),
                kept[: self.kept_size], places, after.numpy(), final.numpy(), self.heads,
                self.talk_heads, self.num_states, chunks,
            )
            for chunks, places in zip(self.chunks, self.places, strict=True)
        ]  # fmt: skip
        run_all(cpu.forward_kernel, calls)
        return kept, after, final, mass, final_cell, reads

    def backward(
        self,
        d_after: Tensor | None,
        d_final: Tensor | None,
        d_final_cell: Tensor | None,
        d_reads: Tensor | None,
        after: Tensor,
    ) -> list[Tensor | None]:
        # Whoever goes back through a retained graph at the same time must not use this, too.
        kept, self.kept = self.kept, None
        if kept is None:  # a second backward
            kept, *_ = self._read()
        turned = cpu.Weights(*(arrays.place(x.t() if x.dim() == 2 else x) for x in self.turned))
        grads = [[torch.zeros(x.shape, dtype=self.dtype) for x in self.turned] for _ in self.chunks]
        d_states = np.zeros_like(self.states)
        d_cells = self._no_rows() if self.cell is None else np.zeros_like(self.cell)
        given = [
            self._no_rows() if grad is None else arrays.array(grad)
            for grad in (d_after, d_final, d_final_cell)
        ]
        # Of examples that never read; the others' are written over.
        if d_final is not None:
            d_states[:] = given[1]
        if d_final_cell is not None:
            d_cells[:] = given[2]
        d_rows = self._like_rows()
        tokens = self._tokens(self._empty(0))
        d_x = make_token_grads(self.x, self.num_tokens, self.dtype)
        token_grads = [self._token_grads(tokens, d_x.numpy()) for _ in self.chunks]
        scan = self.scan.given(self.scan.no_reads())  # they were read in forward
        scan_grads = self.scan.make_grads(len(self.chunks), self.num_tokens, d_reads)
        calls = [
            (
                *given, self.states, self._cells(kept, self._no_rows()), self.rows, tokens, scan,
                self.segments, self.weights, turned, self._made(), self._scratch(),
                kept[: self.kept_size], places, after.numpy(),
                cpu.Weights(*(x.numpy() for x in part)), d_states, d_cells, d_rows, own,
                scanned, self.heads, self.talk_heads, self.num_states, chunks, self.is_shared,
            )
            for part, own, scanned, chunks, places in zip(
                grads, token_grads, scan_grads, self.chunks, self.places, strict=True
            )
        ]  # fmt: skip
        run_all(cpu.backward_kernel, calls)
        self._give_back(kept)
        total = [sum(parts[1:], parts[0]) for parts in zip(*grads, strict=True)]
        found = turn_back(total, self.gated, self.heads, self.talk_heads)
        d_cell = None if self.cell is None else torch.from_numpy(d_cells)
        before = [torch.from_numpy(d_states), d_cell]
        if self.projections is not None:
            projections = self.projections.total([own.weights for own in token_grads])
            scanned = self.scan.total(scan_grads)
            return [*before, None, None, None, d_x, *projections, *found, *scanned]
        key, value, routed = map(torch.from_numpy, d_rows)
        rows = [routed, key, None if self.is_shared else value]
        return [*before, *rows, None, *[None] * 8, *found, *[None] * NUM_TENSORS]

    def _like_rows(self) -> cpu.Rows:
        key, value, routed = (self._empty(*x.shape) for x in self.rows)
        return cpu.Rows(key, key if self.is_shared else value, routed)

    def _token_grads(self, tokens: cpu.Tokens, d_x: np.ndarray) -> cpu.TokenGrads:
        if self.projections is None:
            return cpu.TokenGrads(tokens.weights, tokens.weights, d_x)
        return cpu.TokenGrads(self.projections.turned(), self.projections.make_grads(), d_x)

    # Memory

    def _no_rows(self) -> np.ndarray:
        return self._empty(0, self.states.shape[1])

    def _cells(self, kept: np.ndarray, now: np.ndarray) -> cpu.Cells:
        return cpu.Cells(now, kept[self.kept_size : self.kept_size + self.cells_size])

    def _take(self) -> np.ndarray:
        # New memory costs a page fault every 4 KiB, a tenth of a step: the last one serves again.
        size = self.kept_size + self.cells_size
        if size == 0:
            return self._empty(0)
        spare = _spare.pop(self.dtype, None)
        if spare is not None and len(spare) >= size:
            return spare
        del spare  # before there are two
        return self._empty(size)

    def _give_back(self, kept: np.ndarray) -> None:
        if len(kept) > len(_spare.get(self.dtype, ())):
            _spare[self.dtype] = kept

    def _made(self) -> cpu.Made:
        rows, channels = self.most_examples * self.num_states, self.states.shape[1]
        talk_rows = rows if self.has_talk else 0
        empty = partial(arrays.empty, self.dtype)
        return cpu.Made(
            x=empty(rows, arrays.spread(2 * channels + 2 * self.gated)),
            query=empty(rows, channels),
            attended=empty(rows, channels),
            weights=empty(self.most_examples * self.longest * self.heads * self.num_states),
            gates=empty(rows, self.num_gates * self.gated),
            qkv=empty(talk_rows, 3 * self.gated),
            talk=empty(talk_rows * self.talk_heads * self.num_states),
            mixed=empty(talk_rows, self.gated),
            normal=empty(talk_rows, self.gated),
            inverse=empty(talk_rows),
        )

    def _scratch(self) -> cpu.Scratch:
        rows, channels = self.most_examples * self.num_states, self.states.shape[1]
        cell_rows = rows if self.cell is not None else 0
        talk_width = self.gated // self.talk_heads if self.has_talk else 0
        empty = partial(arrays.empty, self.dtype)
        return cpu.Scratch(
            turned=empty(max(channels // self.heads, talk_width), self.num_states),
            slopes=empty(max(self.longest, self.num_states) * self.num_states),
            rows=self._step_rows(),
            d_rows=self._step_rows(),
            hoist=self._hoist_scratch(),
            scan=self.scan.make_scratch(self.most_examples, self.longest, rows, channels),
            after=empty(rows, channels),
            cell=empty(cell_rows, self.gated),
            d_state=empty(rows, channels),
            d_cell=empty(cell_rows, self.gated),
            d_mixed=empty(rows, self.gated),
            d_query=empty(rows, channels),
            d_attended=empty(rows, channels),
            d_gates=empty(rows, self.num_gates * self.gated),
            d_x=empty(rows, 2 * channels + self.gated),
            d_qkv=empty(rows, 3 * self.gated),
        )

    def _step_rows(self) -> cpu.Rows:
        """Room for what a step makes of its tokens."""
        channels = self.states.shape[1]
        most_tokens = self.most_examples * self.longest * self.has_tokens
        most_rows = self.most_examples * self.num_states * self.has_tokens
        key = self._empty(most_tokens, channels)
        value = key if self.is_shared else self._empty(most_tokens, channels)
        return cpu.Rows(key, value, self._empty(most_rows, channels))

    def _hoist_scratch(self) -> HoistScratch:
        most_tokens = self.most_examples * self.longest * self.has_tokens
        return make_scratch(
            self.dtype, most_tokens, self.most_examples, self.x.shape[1], self.heads,
            self.num_states,
        )  # fmt: skip
