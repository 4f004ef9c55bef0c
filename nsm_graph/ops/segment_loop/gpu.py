"""The loop on a GPU as one function that autograd knows: what is launched on which tensors.

The kernels are those of `triton/`. Between forward and backward only the states after every step
are kept; backward makes a step again. It writes one row for each state and step of what parameters'
gradients are products of, as many steps at a time as fit `CHUNK_BYTES`, and multiplies these here.
Nothing is added atomically and chunks follow from sizes alone: the same bits every time.

Legend: B examples that read, N states, C channels, rows of a chunk are its groups times N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsm_graph.ops.derivatives import needs_reference, through_reference
from nsm_graph.ops.segment_loop import reference, triton
from nsm_graph.ops.segment_loop.inputs import LoopSegments, LoopWeights
from nsm_graph.ops.segment_loop.limits import block_size

#: Bytes of what backward writes down and multiplies, at most, unless one step needs more.
CHUNK_BYTES = 1 << 28
#: Tokens of a block, at most.
MOST_TOKENS = 64
#: Numbers of one step's rows that a warp holds in its registers, and warps of a program.
PER_WARP, MAX_WARPS = 128, 8


def segment_loop(
    states: Tensor,
    routed: Tensor,
    key: Tensor,
    value: Tensor,
    segments: LoopSegments,
    weights: LoopWeights,
    heads: int,
    talk_heads: int,
) -> tuple[Tensor, Tensor]:
    """States after every step and after each example's last."""
    call = _Call(segments, heads, talk_heads)
    return _Loop.apply(call, states, routed, key, None if key is value else value, *weights)


class _Call(NamedTuple):
    """What a call is told beside tensors with gradients."""

    segments: LoopSegments
    heads: int
    talk_heads: int


class _Given(NamedTuple):
    """The tensors of a call."""

    states: Tensor
    routed: Tensor
    key: Tensor
    value: Tensor | None  #: None where values are keys
    weights: LoopWeights


def _name(given: Any) -> _Given:
    states, routed, key, value, *weights = given
    return _Given(states, routed, key, value, LoopWeights(*weights))


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, *given):  # type: ignore[no-untyped-def]
        after, final = _Run(call, _name(given)).forward()
        ctx.call = call
        ctx.save_for_backward(*given, after)
        ctx.set_materialize_grads(False)  # most want the final states only
        return after.to(given[0].dtype), final.to(given[0].dtype)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        *given, after = ctx.saved_tensors
        if all(grad is None for grad in grads):  # what read them had no gradient itself
            return None, *[None] * len(given)
        if needs_reference(grads):
            return None, *through_reference(_reference(ctx.call), given, grads)
        d_after, d_final = grads
        found = _Run(ctx.call, _name(given)).backward(after, d_after, d_final)
        pairs = zip(found, given, strict=True)
        return None, *(None if x is None else x.to(own.dtype) for x, own in pairs)


def _reference(call: _Call) -> Callable[..., tuple[Tensor, ...]]:
    """What the kernels compute, in plain torch."""

    def results(*given: Tensor | None) -> tuple[Tensor, ...]:
        own = _name(given)
        value = own.key if own.value is None else own.value
        return reference.segment_loop(
            own.states, own.routed, own.key, value, call.segments, own.weights, call.heads,
            call.talk_heads,
        )  # fmt: skip

    return results


# One call ##########################################################################


class _Run:
    """What forward and backward of a call share."""

    def __init__(self, call: _Call, given: _Given) -> None:
        tensors: list[Any] = [*given[:4], *given.weights]
        self.given = _name([None if x is None else x.contiguous() for x in tensors])
        self.segments = call.segments
        self.num_active = call.segments.num_active[call.segments.num_active > 0]
        self.first_group = torch.cat([self.num_active.new_zeros(1), self.num_active.cumsum(0)])
        self.num_states = given.routed.size(0) // (call.segments.token_ptr.numel() - 1)
        self.channels = given.states.size(1)
        #: What sums are made in.
        self.dtype = torch.promote_types(given.states.dtype, torch.float32)
        self.has_talk = given.weights.qkv is not None
        self.options = self._options(call.heads, call.talk_heads if self.has_talk else 0)
        self.indices = self._place()

    def _options(self, heads: int, talk_heads: int) -> dict[str, Any]:
        """What the kernels are compiled for: sizes alone say it."""
        width, talk_width = self.channels // heads, self.channels // max(talk_heads, 1)
        longest = int(self.segments.token_ptr.diff().max())
        block_n, block_c = block_size(self.num_states), block_size(self.channels)
        warps = block_n * block_c // PER_WARP
        return {
            "N": self.num_states, "C": self.channels, "HEADS": heads, "TALK_HEADS": talk_heads,
            "D": width, "TALK_D": talk_width,
            "SCALE": width**-0.5, "TALK_SCALE": talk_width**-0.5,
            "BLOCK_N": block_n, "BLOCK_C": block_c, "BLOCK_D": block_size(width),
            "BLOCK_TALK_D": block_size(talk_width),
            "BLOCK_L": min(block_size(longest), MOST_TOKENS),
            "SHARED": self.given.value is None,
            "num_warps": min(max(warps, 2), MAX_WARPS), "num_stages": 1, "enable_fp_fusion": True,
        }  # fmt: skip

    def _place(self) -> list[Tensor]:
        """Tokens of each group, groups of each step, steps of each example: on the device."""
        ranks = torch.arange(int(self.num_active[0]))
        num_steps = (self.num_active.unsqueeze(1) > ranks).sum(0)
        parts = [self.segments.token_ptr, self.first_group, num_steps]
        placed = torch.cat(parts).to(self.given.states.device)
        return list(placed.split([part.numel() for part in parts]))

    def forward(self) -> tuple[Tensor, Tensor]:
        own = self.given
        after = self._empty(*own.routed.shape)
        final = own.states.to(self.dtype, copy=True)
        with torch.cuda.device_of(own.states):
            triton.forward_kernel[(int(self.num_active[0]),)](
                own.routed, own.key, own.value, *self.indices, *own.weights, after, final,
                **self.options,
            )  # fmt: skip
        return after, final

    def backward(
        self, after: Tensor, d_after: Tensor | None, d_final: Tensor | None
    ) -> list[Tensor | None]:
        own = self.given
        d_after = None if d_after is None else d_after.contiguous()
        d_states = torch.zeros_like(own.states, dtype=self.dtype)
        if d_final is not None:
            d_states.copy_(d_final)
        d_routed = self._empty(*own.routed.shape)
        d_key = torch.empty_like(own.key)
        d_value = None if own.value is None else torch.empty_like(own.value)
        # Those of the weights are added up in the order of chunks.
        zeros: list[Any] = [
            None if w is None else torch.zeros_like(w, dtype=self.dtype) for w in own.weights
        ]
        grads = LoopWeights(*zeros)
        for first_step, end_step in self._chunks():
            made, first, end = self._make(first_step, end_step)
            with torch.cuda.device_of(own.states):
                triton.backward_kernel[(int(self.num_active[first_step]),)](
                    own.states, after, own.routed, own.key, own.value, *self.indices, *own.weights,
                    d_after, d_states, d_routed, d_key, d_value, *made, first_step, end_step,
                    **self.options,
                )  # fmt: skip
            _add_products(grads, made, d_routed[first:end])
        return [d_states, d_routed, d_key, d_value, *grads]

    def _chunks(self) -> list[tuple[int, int]]:
        """First steps and ends, from the last chunk to the first."""
        width = (14 if self.has_talk else 8) * self.channels * self.dtype.itemsize
        most = max(CHUNK_BYTES // (width * self.num_states), 1)  # groups
        chunks, end = [], self.num_active.numel()
        while end > 0:
            # At least one step; further ones while all of them fit.
            room = self.first_group[end] - most
            first = min(int(torch.searchsorted(self.first_group, room)), end - 1)
            chunks.append((first, end))
            end = first
        return chunks

    def _make(self, first_step: int, end_step: int) -> tuple[_Made, int, int]:
        """Room for what backward writes down of some steps, and their rows."""
        first, end = (int(self.first_group[t]) * self.num_states for t in (first_step, end_step))
        rows, channels = end - first, self.channels
        talk_rows = rows if self.has_talk else 0
        made = _Made(
            x=self._empty(rows, 3 * channels),
            attended=self._empty(rows, channels),
            propagated=self._empty(talk_rows, channels),
            mixed=self._empty(talk_rows, channels),
            d_query=self._empty(rows, channels),
            d_gates=self._empty(rows, 3 * channels),
            d_qkv=self._empty(talk_rows, 3 * channels),
            d_residual=self._empty(talk_rows, channels),
            d_norm=self._empty(int(self.num_active[first_step]) * self.has_talk, 2, channels),
        )
        return made, first, end

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.given.states.device)


class _Made(NamedTuple):
    """What the maps of a step read and the gradients of what they gave, by the README's names."""

    x: Tensor  #: [rows, 3 C]: state, update, reset * state
    attended: Tensor  #: [rows, C]
    propagated: Tensor  #: [rows, C]; empty without communication, as all of its parts
    mixed: Tensor  #: [rows, C]
    d_query: Tensor  #: [rows, C]
    d_gates: Tensor  #: [rows, 3 C]: reset, update, candidate
    d_qkv: Tensor  #: [rows, 3 C]
    d_residual: Tensor  #: [rows, C], before the norm
    d_norm: Tensor  #: [B, 2, C]: scale, shift


def _add_products(grads: LoopWeights, made: _Made, d_update: Tensor) -> None:
    """Adds the gradients of the weights."""
    channels = d_update.size(1)
    state, both = made.x[:, :channels], made.x[:, : 2 * channels]
    d_both, d_new = made.d_gates.split([2 * channels, channels], dim=1)
    _add_map(grads.query, grads.query_bias, state, made.d_query)
    _add_map(grads.out, grads.out_bias, made.attended, d_update)
    _add_map(grads.gates, grads.gates_bias, both, d_both)
    # The candidate reads (reset * state, update).
    assert grads.candidate is not None
    _add_map(grads.candidate[:, :channels], None, made.x[:, 2 * channels :], d_new)
    read = made.x[:, channels : 2 * channels]
    _add_map(grads.candidate[:, channels:], grads.candidate_bias, read, d_new)
    if grads.qkv is None:
        return
    _add_map(grads.qkv, grads.qkv_bias, made.propagated, made.d_qkv)
    _add_map(grads.mix, grads.mix_bias, made.mixed, made.d_residual)
    assert grads.scale is not None
    assert grads.shift is not None
    d_scale, d_shift = made.d_norm.sum(0)
    grads.scale.add_(d_scale)
    grads.shift.add_(d_shift)


def _add_map(grad: Tensor | None, bias: Tensor | None, x: Tensor, d: Tensor) -> None:
    """Of one map, from what it read and the gradient of what it gave."""
    assert grad is not None
    grad.addmm_(d.t(), x)
    if bias is not None:
        bias.add_(d.sum(0))
