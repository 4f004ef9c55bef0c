"""The loop as one function that autograd knows; the work is `cpu.py`'s.

Parameters come as ``torch.nn.Linear`` keeps them. The kernels want matrices both ways round, the
scale of the scores inside the query, and the update in front of the reset state: done here, and
undone for the gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsm_graph.ops.cpu import arrays
from nsm_graph.ops.cpu.threads import run_all
from nsm_graph.ops.segment_loop import cpu, reference
from nsm_graph.ops.segment_loop.inputs import LoopSegments, LoopWeights

#: Bytes of one step's activations that a thread works on: they are to stay in its cache.
STEP_BYTES = 1 << 19
#: Examples that a thread takes at a time, at most.
MOST_EXAMPLES = 8

#: Where the last backward's steps were kept, for the next forward of the same size; at most one.
_spare: dict[tuple[int, torch.dtype], np.ndarray] = {}


def segment_loop(
    states: Tensor,
    routed: Tensor,
    key: Tensor,
    value: Tensor,
    segments: LoopSegments,
    weights: LoopWeights,
    heads: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """States after every step, ``[G N, C]``, and after each example's last."""
    has_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (states, routed, key, value, *weights)
    )
    is_shared = key is value
    return _Loop.apply(
        segments, heads, keep and has_grad, states, routed, key,
        None if is_shared else value, *weights,
    )  # fmt: skip


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, segments, heads, is_kept, states, routed, key, value, *weights):  # type: ignore[no-untyped-def]
        run = _Run(segments, heads, is_kept, states, routed, key, value, weights)
        after, final = run.forward()
        ctx.run = run
        ctx.options = segments, heads
        ctx.save_for_backward(states, routed, key, value, after, *weights)
        ctx.set_materialize_grads(False)  # most want the final states only
        return after, final

    @staticmethod
    def backward(ctx, d_after, d_final):  # type: ignore[no-untyped-def]
        states, routed, key, value, after, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            given = [states, routed, key, value, *weights]
            found = _through_the_reference([d_after, d_final], given, *ctx.options)
            return None, None, None, *found
        return None, None, None, *ctx.run.backward(d_after, d_final, after)


def _through_the_reference(grads, given, segments, heads):  # type: ignore[no-untyped-def]
    """The same gradients in a form that has gradients itself."""
    with torch.enable_grad():
        # Views: what one input makes of another belongs to the caller's graph, not to this one.
        given = [None if x is None else x.view_as(x) for x in given]
        states, routed, key, value, *weights = given
        results = reference.segment_loop(
            states, routed, key, key if value is None else value, segments, LoopWeights(*weights),
            heads,
        )  # fmt: skip
        asked = [(x, grad) for x, grad in zip(results, grads, strict=True) if grad is not None]
        wanted = [x for x in given if x is not None and x.requires_grad]
        outputs, directions = zip(*asked, strict=True)
        found = torch.autograd.grad(
            outputs, wanted, directions, create_graph=True, allow_unused=True
        )
    rest = iter(found)
    return [next(rest) if x is not None and x.requires_grad else None for x in given]


# One call ##########################################################################


class _Run:
    """Arrays of one forward, and the backward that belongs to it."""

    def __init__(self, segments, heads, is_kept, states, routed, key, value, weights) -> None:  # type: ignore[no-untyped-def]
        self.heads, self.is_kept, self.is_shared = heads, is_kept, value is None
        self.dtype = states.dtype
        self.states, self.routed, self.key = map(arrays.array, (states, routed, key))
        self.value = self.key if value is None else arrays.array(value)
        num_active = segments.num_active.numpy()
        self.segments = cpu.Segments(
            segments.token_ptr.numpy(), np.cumsum(num_active) - num_active, num_active
        )
        self.num_states = self.routed.shape[0] // (len(self.segments.token_ptr) - 1)
        self.turned = _turn(weights, heads)
        self.weights = cpu.Weights(*map(arrays.place, self.turned))
        self.has_talk = weights[8] is not None
        self.chunks = self._share()
        self.most_examples = max(int((part[:, 1] - part[:, 0]).max()) for part in self.chunks)
        self.longest = int(np.diff(self.segments.token_ptr).max())
        self.places, self.kept_size = self._find_places() if is_kept else (self.chunks, 0)
        self.kept: np.ndarray | None = None

    def _share(self) -> list[np.ndarray]:
        """For each thread, ranges of examples."""
        channels = self.states.shape[1]
        num_examples = int(self.segments.num_active[0])
        num_threads = min(torch.get_num_threads(), num_examples)
        room = STEP_BYTES // (14 * channels * self.num_states * self.dtype.itemsize)
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
            counts * self.num_states, tokens, self.states.shape[1], self.num_states, self.heads,
            self.has_talk,
        )  # fmt: skip
        ends = sizes.cumsum().reshape(sizes.shape)
        cuts = np.cumsum([len(part) for part in self.chunks])[:-1]
        return [np.ascontiguousarray(x) for x in np.split(ends - sizes, cuts)], int(ends[-1, -1])

    def forward(self) -> tuple[Tensor, Tensor]:
        self.kept, after, final = self._read()
        return after, final

    def _read(self) -> tuple[np.ndarray, Tensor, Tensor]:
        kept = self._take()
        after = torch.empty(self.routed.shape, dtype=self.dtype)
        final = torch.empty(self.states.shape, dtype=self.dtype)
        num_read = int(self.segments.num_active[0]) * self.num_states
        final[num_read:] = torch.from_numpy(self.states[num_read:])
        calls = [
            (
                self.states, self.routed, self.key, self.value, self.segments, self.weights,
                self._made(), self._scratch(), kept, places, after.numpy(), final.numpy(),
                self.heads, self.num_states, chunks,
            )
            for chunks, places in zip(self.chunks, self.places, strict=True)
        ]  # fmt: skip
        run_all(cpu.forward_kernel, calls)
        return kept, after, final

    def backward(
        self, d_after: Tensor | None, d_final: Tensor | None, after: Tensor
    ) -> list[Tensor | None]:
        # Whoever goes back through a retained graph at the same time must not use this, too.
        kept, self.kept = self.kept, None
        if kept is None:  # a second backward
            kept, _, _ = self._read()
        turned = cpu.Weights(*(arrays.place(x.t() if x.dim() == 2 else x) for x in self.turned))
        grads = [[torch.zeros(x.shape, dtype=self.dtype) for x in self.turned] for _ in self.chunks]
        d_states = np.zeros_like(self.states)
        d_routed, d_key = np.empty_like(self.routed), np.empty_like(self.key)
        d_value = d_key if self.is_shared else np.empty_like(self.value)
        nothing = np.empty((0, self.states.shape[1]), self.states.dtype)
        given = [nothing if grad is None else arrays.array(grad) for grad in (d_after, d_final)]
        if d_final is not None:
            d_states[:] = given[1]  # of examples that never read; the others' are written over
        calls = [
            (
                *given, self.states, self.routed, self.key, self.value, self.segments,
                self.weights, turned, self._made(), self._scratch(), kept, places, after.numpy(),
                cpu.Weights(*(x.numpy() for x in part)), d_states, d_routed, d_key, d_value,
                self.heads, self.num_states, chunks, self.is_shared,
            )
            for part, chunks, places in zip(grads, self.chunks, self.places, strict=True)
        ]  # fmt: skip
        run_all(cpu.backward_kernel, calls)
        self._give_back(kept)
        total = [sum(parts[1:], parts[0]) for parts in zip(*grads, strict=True)]
        rows = (d_states, d_routed, d_key, None if self.is_shared else d_value)
        return [
            *(None if x is None else torch.from_numpy(x) for x in rows),
            *_turn_back(total, self.heads, self.has_talk),
        ]

    # Memory

    def _take(self) -> np.ndarray:
        # New memory costs a page fault every 4 KiB, a tenth of a step: the last one serves again.
        spare = _spare.pop((self.kept_size, self.dtype), None)
        return arrays.empty(self.dtype, self.kept_size) if spare is None else spare

    def _give_back(self, kept: np.ndarray) -> None:
        if self.is_kept:
            _spare.clear()
            _spare[self.kept_size, self.dtype] = kept

    def _made(self) -> cpu.Made:
        rows, channels = self.most_examples * self.num_states, self.states.shape[1]
        talk_rows = rows if self.has_talk else 0
        weight = self.heads * self.num_states
        empty = partial(arrays.empty, self.dtype)
        return cpu.Made(
            x=empty(rows, arrays.spread(4 * channels)),
            query=empty(rows, channels),
            attended=empty(rows, channels),
            weights=empty(self.most_examples * self.longest * weight),
            gates=empty(rows, 3 * channels),
            qkv=empty(talk_rows, 3 * channels),
            talk=empty(talk_rows * weight),
            mixed=empty(talk_rows, channels),
            normal=empty(talk_rows, channels),
            inverse=empty(talk_rows),
        )

    def _scratch(self) -> cpu.Scratch:
        rows, channels = self.most_examples * self.num_states, self.states.shape[1]
        empty = partial(arrays.empty, self.dtype)
        return cpu.Scratch(
            turned=empty(channels // self.heads, self.num_states),
            slopes=empty(max(self.longest, self.num_states) * self.num_states),
            after=empty(rows, channels),
            d_state=empty(rows, channels),
            d_mixed=empty(rows, channels),
            d_query=empty(rows, channels),
            d_attended=empty(rows, channels),
            d_gates=empty(rows, 3 * channels),
            d_x=empty(rows, 3 * channels),
            d_qkv=empty(rows, 3 * channels),
        )


# Parameters ########################################################################


def _turn(weights: Any, heads: int) -> list[Tensor]:
    """The kernel's form: ``[in, out]``, scores scaled, (update, reset state) for the candidate."""
    query, query_bias, out, out_bias, gates, gates_bias, candidate, candidate_bias = (
        x.detach() for x in weights[:8]
    )
    channels = query.size(0)
    factor = (channels // heads) ** -0.5
    reset, update = candidate.split(channels, dim=1)
    talk = [query.new_empty([0] * dims) for dims in (2, 1, 2, 1, 1, 1)]
    if weights[8] is not None:
        qkv, qkv_bias, *rest = (x.detach() for x in weights[8:])
        factors = query.new_ones(3 * channels)
        factors[:channels] = factor
        talk = [qkv * factors.unsqueeze(1), qkv_bias * factors, *rest]
    turned = [
        query * factor, query_bias * factor, out, out_bias, gates, gates_bias,
        torch.cat([update, reset], dim=1), candidate_bias, *talk,
    ]  # fmt: skip
    return [x.t() if x.dim() == 2 else x for x in turned]


def _turn_back(grads: list[Tensor], heads: int, has_talk: bool) -> list[Tensor | None]:
    """Gradients of the parameters as they came."""
    g = cpu.Weights(*(x.t().contiguous() if x.dim() == 2 else x for x in grads))
    channels = g.query.size(0)
    factor = (channels // heads) ** -0.5
    update, reset = g.candidate.split(channels, dim=1)
    found: list[Tensor | None] = [
        g.query * factor, g.query_bias * factor, g.out, g.out_bias, g.gates, g.gates_bias,
        torch.cat([reset, update], dim=1), g.candidate_bias,
    ]  # fmt: skip
    if not has_talk:
        return [*found, *[None] * 6]
    factors = g.query.new_ones(3 * channels)
    factors[:channels] = factor
    return [
        *found, g.qkv * factors.unsqueeze(1), g.qkv_bias * factors, g.mix, g.mix_bias, g.scale,
        g.shift,
    ]  # fmt: skip
