"""The loop as one function that autograd knows; the work is `cpu.py`'s.

Parameters come as ``torch.nn.Linear`` keeps them. The kernels want matrices both ways round, the
scale of the scores inside the query, and the update in front of the reset state: done here, and
undone for the gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsm_graph.ops.cpu import arrays
from nsm_graph.ops.cpu.threads import run_all
from nsm_graph.ops.hoist import reference as hoist_reference
from nsm_graph.ops.hoist.cpu import Scratch as HoistScratch
from nsm_graph.ops.hoist.cpu import Weights as HoistArrays
from nsm_graph.ops.hoist.fused import Projections, make_scratch, make_token_grads
from nsm_graph.ops.hoist.inputs import HoistWeights, TokenGroups
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
    given = [states, routed, key, None if key is value else value, *[None] * 9, *weights]
    after, final, _ = _Loop.apply(_Call(segments, None, heads, keep and _has_grad(given)), *given)
    return after, final


def token_loop(
    states: Tensor,
    x: Tensor,
    first: Tensor,
    projections: HoistWeights,
    segments: LoopSegments,
    weights: LoopWeights,
    heads: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of tokens, and the routing weight that each state received of each group."""
    given = [states, None, None, None, x, *projections, *weights]
    return _Loop.apply(_Call(segments, first, heads, keep and _has_grad(given)), *given)


def _has_grad(given: list[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)


class _Call(NamedTuple):
    """What a call is told beside tensors with gradients."""

    segments: LoopSegments
    first: Tensor | None  #: where the tokens of each group begin, if the loop is given tokens
    heads: int
    is_kept: bool


class _Given(NamedTuple):
    """The tensors of a call: rows or tokens."""

    states: Tensor
    routed: Any  #: rows are None where tokens are given
    key: Any
    value: Any  #: None where values are keys, too
    x: Any  #: None where rows are given, as all projections are
    projections: HoistWeights
    weights: LoopWeights


def _name(given: Any) -> _Given:
    states, routed, key, value, x = given[:5]
    projections, weights = HoistWeights(*given[5:13]), LoopWeights(*given[13:])
    return _Given(states, routed, key, value, x, projections, weights)


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, *given):  # type: ignore[no-untyped-def]
        run = _Run(call, _name(given))
        after, final, mass = run.forward()
        ctx.run, ctx.call = run, call
        ctx.save_for_backward(*given, after)
        ctx.mark_non_differentiable(mass)
        ctx.set_materialize_grads(False)  # most want the final states only
        return after, final, mass

    @staticmethod
    def backward(ctx, d_after, d_final, _):  # type: ignore[no-untyped-def]
        *given, after = ctx.saved_tensors
        if d_after is None and d_final is None:  # what read them had no gradient itself
            return None, *[None] * len(given)
        if torch.is_grad_enabled():
            return None, *_through_the_reference([d_after, d_final], given, ctx.call)
        return None, *ctx.run.backward(d_after, d_final, after)


def _through_the_reference(grads, given, call):  # type: ignore[no-untyped-def]
    """The same gradients in a form that has gradients itself."""
    with torch.enable_grad():
        # Views: what one input makes of another belongs to the caller's graph, not to this one.
        given = [None if x is None else x.view_as(x) for x in given]
        own = _name(given)
        routed, key, value = own.routed, own.key, own.key if own.value is None else own.value
        if own.x is not None:
            groups = TokenGroups(call.first, call.segments.token_ptr)
            key, value, routed, _ = hoist_reference.hoist(
                own.x, groups, own.projections, call.heads
            )
        results = reference.segment_loop(
            own.states, routed, key, value, call.segments, own.weights, call.heads
        )
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

    def __init__(self, call: _Call, given: _Given) -> None:
        self.call, self.heads, self.is_kept = call, call.heads, call.is_kept
        self.dtype = given.states.dtype
        self.states = arrays.array(given.states)
        ptr, num_active = (x.numpy() for x in call.segments)
        self.segments = cpu.Segments(ptr, np.cumsum(num_active) - num_active, num_active)
        self.has_tokens, self.has_talk = given.x is not None, given.weights.qkv is not None
        self.num_groups, self.num_tokens = len(ptr) - 1, int(ptr[-1])
        self.projections = Projections(given.projections) if self.has_tokens else None
        if given.x is not None:
            self.is_shared = given.projections.value is None
            self.num_states = given.projections.logits.size(0) // self.heads
            self.rows = cpu.Rows(*[self._empty(0, 0)] * 3)
            self.x = arrays.array(given.x)
        else:
            self.is_shared = given.value is None
            key, value, routed = (
                arrays.array(x)
                for x in (
                    given.key,
                    given.key if given.value is None else given.value,
                    given.routed,
                )
            )
            self.num_states = len(routed) // self.num_groups
            self.rows = cpu.Rows(key, value, routed)
            self.x = self._empty(0, 0)
        self.turned = _turn(given.weights, self.heads)
        self.weights = cpu.Weights(*map(arrays.place, self.turned))
        self.chunks = self._share()
        self.most_examples = max(int((part[:, 1] - part[:, 0]).max()) for part in self.chunks)
        self.longest = int(np.diff(ptr).max())
        self.places, self.kept_size = self._find_places() if self.is_kept else (self.chunks, 0)
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

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        self.kept, after, final, mass = self._read()
        return after, final, mass

    def _read(self) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
        kept = self._take()
        channels = self.states.shape[1]
        after = torch.empty(self.num_groups * self.num_states, channels, dtype=self.dtype)
        final = torch.empty(self.states.shape, dtype=self.dtype)
        mass = torch.empty(len(after) * self.has_tokens, dtype=self.dtype)
        num_read = int(self.segments.num_active[0]) * self.num_states
        final[num_read:] = torch.from_numpy(self.states[num_read:])
        tokens = self._tokens(mass.numpy())
        calls = [
            (
                self.states, self.rows, tokens, self.segments, self.weights, self._made(),
                self._scratch(), kept, places, after.numpy(), final.numpy(), self.heads,
                self.num_states, chunks,
            )
            for chunks, places in zip(self.chunks, self.places, strict=True)
        ]  # fmt: skip
        run_all(cpu.forward_kernel, calls)
        return kept, after, final, mass

    def backward(
        self, d_after: Tensor | None, d_final: Tensor | None, after: Tensor
    ) -> list[Tensor | None]:
        # Whoever goes back through a retained graph at the same time must not use this, too.
        kept, self.kept = self.kept, None
        if kept is None:  # a second backward
            kept, *_ = self._read()
        turned = cpu.Weights(*(arrays.place(x.t() if x.dim() == 2 else x) for x in self.turned))
        grads = [[torch.zeros(x.shape, dtype=self.dtype) for x in self.turned] for _ in self.chunks]
        d_states = np.zeros_like(self.states)
        nothing = self._empty(0, self.states.shape[1])
        given = [nothing if grad is None else arrays.array(grad) for grad in (d_after, d_final)]
        if d_final is not None:
            d_states[:] = given[1]  # of examples that never read; the others' are written over
        d_rows = self._like_rows()
        tokens = self._tokens(self._empty(0))
        d_x = make_token_grads(self.x, self.num_tokens, self.dtype)
        token_grads = [self._token_grads(tokens, d_x.numpy()) for _ in self.chunks]
        calls = [
            (
                *given, self.states, self.rows, tokens, self.segments, self.weights, turned,
                self._made(), self._scratch(), kept, places, after.numpy(),
                cpu.Weights(*(x.numpy() for x in part)), d_states, d_rows, own, self.heads,
                self.num_states, chunks, self.is_shared,
            )
            for part, own, chunks, places in zip(
                grads, token_grads, self.chunks, self.places, strict=True
            )
        ]  # fmt: skip
        run_all(cpu.backward_kernel, calls)
        self._give_back(kept)
        total = [sum(parts[1:], parts[0]) for parts in zip(*grads, strict=True)]
        found = _turn_back(total, self.heads, self.has_talk)
        before = torch.from_numpy(d_states)
        if self.projections is not None:
            projections = self.projections.total([own.weights for own in token_grads])
            return [before, None, None, None, d_x, *projections, *found]
        key, value, routed = map(torch.from_numpy, d_rows)
        return [before, routed, key, None if self.is_shared else value, None, *[None] * 8, *found]

    def _like_rows(self) -> cpu.Rows:
        key, value, routed = (self._empty(*x.shape) for x in self.rows)
        return cpu.Rows(key, key if self.is_shared else value, routed)

    def _token_grads(self, tokens: cpu.Tokens, d_x: np.ndarray) -> cpu.TokenGrads:
        if self.projections is None:
            return cpu.TokenGrads(tokens.weights, tokens.weights, d_x)
        return cpu.TokenGrads(self.projections.turned(), self.projections.make_grads(), d_x)

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
            rows=self._step_rows(),
            d_rows=self._step_rows(),
            hoist=self._hoist_scratch(),
            after=empty(rows, channels),
            d_state=empty(rows, channels),
            d_mixed=empty(rows, channels),
            d_query=empty(rows, channels),
            d_attended=empty(rows, channels),
            d_gates=empty(rows, 3 * channels),
            d_x=empty(rows, 3 * channels),
            d_qkv=empty(rows, 3 * channels),
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
