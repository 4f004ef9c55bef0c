"""Hoisting as one function that autograd knows; the work is `cpu.py`'s."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsm_graph.ops.cpu import arrays
from nsm_graph.ops.cpu.threads import run_all, share_rows
from nsm_graph.ops.derivatives import needs_reference, through_reference
from nsm_graph.ops.hoist import cpu, reference
from nsm_graph.ops.hoist.inputs import Hoisted, HoistWeights, TokenGroups

#: Tokens of a block, at least while groups are shorter: a few groups of the usual length.
TOKENS = 128


def hoist(x: Tensor, groups: TokenGroups, weights: HoistWeights, heads: int) -> Hoisted:
    """Keys, values, routed sums and routing weights."""
    key, value, routed, mass = _Hoist.apply(groups, heads, x, *weights)
    return Hoisted(key, key if weights.value is None else value, routed, mass)


class _Hoist(torch.autograd.Function):
    @staticmethod
    def forward(ctx, groups, heads, x, *weights):  # type: ignore[no-untyped-def]
        run = _Run(groups, heads, x, HoistWeights(*weights))
        out = run.forward()
        ctx.run, ctx.options = run, (groups, heads)
        ctx.save_for_backward(x, *weights)
        ctx.mark_non_differentiable(out[3])
        return out

    @staticmethod
    def backward(ctx, d_key, d_value, d_routed, _):  # type: ignore[no-untyped-def]
        x, *weights = ctx.saved_tensors  # raises where one of them was changed in place
        grads = d_key, d_value, d_routed
        if not needs_reference(grads):
            return None, None, *ctx.run.backward(*grads)
        groups, heads = ctx.options

        def results(x: Tensor, *weights: Any) -> list[Tensor]:
            return list(reference.hoist(x, groups, HoistWeights(*weights), heads)[:3])

        # Where values are keys, there is no second result to ask of.
        asked = (d_key, None if weights[2] is None else d_value, d_routed)
        return None, None, *through_reference(results, [x, *weights], asked)


class Projections:
    """The weights as kernels read them, and room for their gradients."""

    def __init__(self, w: HoistWeights) -> None:
        self.has_value = w.value is not None
        none = w.key.new_empty(0, 0), w.key.new_empty(0)
        value: Any
        value, value_bias = w[2:4] if self.has_value else none
        #: [in, out], as the kernel multiplies; logits stay [H N, C_t].
        self.matrices: list[Any] = [
            w.key.t(), w.key_bias, value.t(), value_bias, w.logits, w.logits_bias, w.out.t(),
            w.out_bias,
        ]  # fmt: skip

    def placed(self) -> cpu.Weights:
        return cpu.Weights(*map(arrays.place, self.matrices))

    def turned(self) -> cpu.Weights:
        return cpu.Weights(*(arrays.place(x.t() if x.dim() == 2 else x) for x in self.matrices))

    def make_grads(self) -> cpu.Weights:
        zeros = (torch.zeros(x.shape, dtype=x.dtype).numpy() for x in self.matrices)
        return cpu.Weights(*zeros)

    def total(self, grads: list[cpu.Weights]) -> list[Tensor | None]:
        """The sum of all threads' gradients, as the weights came."""
        sums = (torch.from_numpy(sum(own[1:], own[0])) for own in zip(*grads, strict=True))
        g: Any = cpu.Weights(*sums)
        value = (g.value.t(), g.value_bias) if self.has_value else (None, None)
        return [g.key.t(), g.key_bias, *value, g.logits, g.logits_bias, g.out.t(), g.out_bias]


def make_scratch(
    dtype: torch.dtype, num_tokens: int, num_groups: int, width: int, heads: int, num_states: int
) -> cpu.Scratch:
    """Room for blocks of so many tokens and groups."""
    columns, sums = arrays.spread(num_tokens), num_groups * num_states
    empty = partial(arrays.empty, dtype)
    return cpu.Scratch(
        x=empty(num_tokens, width),
        x_turned=empty(width, columns),
        heads=empty(heads * num_states, columns),
        weights=empty(num_states, columns),
        sums=empty(sums, width),
        d_sums=empty(sums, width),
        d_weights=empty(num_states, columns),
        d_heads=empty(heads * num_states, columns),
        d_x=empty(num_tokens, width),
    )


def make_token_grads(x: np.ndarray, num_tokens: int, dtype: torch.dtype) -> Tensor:
    """Room for the gradients of tokens; those of no group have none, others are written."""
    return (torch.empty if num_tokens == len(x) else torch.zeros)(x.shape, dtype=dtype)


class _Run:
    """Arrays of one forward, and the backward that belongs to it."""

    def __init__(self, groups: TokenGroups, heads: int, x: Tensor, w: HoistWeights) -> None:
        self.heads, self.num_states = heads, w.logits.size(0) // heads
        self.dtype, self.channels = x.dtype, w.key.size(0)
        self.x, self.first, self.ptr = arrays.array(x), groups.first.numpy(), groups.ptr.numpy()
        self.projections = Projections(w)
        self.weights = self.projections.placed()
        self.parts = share_rows(self.ptr, x.size(1) * (self.channels + w.logits.size(0)))
        self.room = max(TOKENS, int(np.diff(self.ptr).max()))

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_tokens, num_groups = int(self.ptr[-1]), len(self.first)
        num_values = num_tokens * self.projections.has_value
        key, value, routed = (
            torch.empty(rows, self.channels, dtype=self.dtype)
            for rows in (num_tokens, num_values, num_groups * self.num_states)
        )
        mass = torch.empty(num_tokens * self.num_states, dtype=self.dtype)
        out = (key, value, routed, mass)
        calls = [
            (
                self.x, self.first, self.ptr, self.weights, self._scratch(),
                *(rows.numpy() for rows in out), self.heads, self.num_states, self.room, *part,
            )
            for part in self.parts
        ]  # fmt: skip
        run_all(cpu.forward_kernel, calls)
        return out

    def backward(self, d_key: Tensor, d_value: Tensor, d_routed: Tensor) -> list[Tensor | None]:
        turned = self.projections.turned()
        grads = [self.projections.make_grads() for _ in self.parts]
        d_x = make_token_grads(self.x, int(self.ptr[-1]), self.dtype)
        rows = [arrays.array(x) for x in (d_key, d_value, d_routed)]
        calls = [
            (
                self.x, self.first, self.ptr, self.weights, turned, self._scratch(), *rows, own,
                d_x.numpy(), self.heads, self.num_states, self.room, *part,
            )
            for part, own in zip(self.parts, grads, strict=True)
        ]  # fmt: skip
        run_all(cpu.backward_kernel, calls)
        return [d_x, *self.projections.total(grads)]

    def _scratch(self) -> cpu.Scratch:
        num_groups, width = min(self.room, len(self.first)), self.x.shape[1]
        return make_scratch(self.dtype, self.room, num_groups, width, self.heads, self.num_states)
