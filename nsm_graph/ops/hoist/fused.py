"""Hoisting as one function that autograd knows; the work is `cpu.py`'s."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsm_graph.ops.cpu import arrays
from nsm_graph.ops.cpu.threads import run_all, share_rows
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
        if torch.is_grad_enabled():
            return (
                None,
                None,
                *_through_the_reference((d_key, d_value, d_routed), [x, *weights], *ctx.options),
            )
        return None, None, *ctx.run.backward(d_key, d_value, d_routed)


def _through_the_reference(grads, given, groups, heads):  # type: ignore[no-untyped-def]
    """The same gradients in a form that has gradients itself."""
    with torch.enable_grad():
        # Views: what one input makes of another belongs to the caller's graph, not to this one.
        given = [None if x is None else x.view_as(x) for x in given]
        x, *weights = given
        out = reference.hoist(x, groups, HoistWeights(*weights), heads)
        rows, grads = [out.key, out.routed], [grads[0], grads[2]]
        if weights[2] is not None:
            rows, grads = [out.key, out.value, out.routed], [grads[0], grads[1], grads[2]]
        wanted = [x for x in given if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(rows, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in given]


class _Run:
    """Arrays of one forward, and the backward that belongs to it."""

    def __init__(self, groups: TokenGroups, heads: int, x: Tensor, w: HoistWeights) -> None:
        self.heads, self.num_states = heads, w.logits.size(0) // heads
        self.dtype, self.channels = x.dtype, w.key.size(0)
        self.x, self.first, self.ptr = arrays.array(x), groups.first.numpy(), groups.ptr.numpy()
        none = x.new_empty(0, 0), x.new_empty(0)
        value = none if w.value is None or w.value_bias is None else (w.value, w.value_bias)
        self.has_value = w.value is not None
        #: [in, out], as the kernel multiplies; logits stay [H N, C_t].
        self.matrices = [
            w.key.t(), w.key_bias, value[0].t(), value[1], w.logits, w.logits_bias, w.out.t(),
            w.out_bias,
        ]  # fmt: skip
        self.weights = cpu.Weights(*map(arrays.place, self.matrices))
        self.parts = share_rows(self.ptr, x.size(1) * (self.channels + w.logits.size(0)))
        self.room = max(TOKENS, int(np.diff(self.ptr).max()))

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_tokens, num_groups = int(self.ptr[-1]), len(self.first)
        key, value, routed = (
            torch.empty(rows, self.channels, dtype=self.dtype)
            for rows in (num_tokens, num_tokens * self.has_value, num_groups * self.num_states)
        )
        mass = torch.empty(num_tokens * self.num_states, dtype=self.dtype)
        out = (key, value, routed, mass)
        run_all(
            cpu.forward_kernel,
            [
                (
                    self.x, self.first, self.ptr, self.weights, self._scratch(),
                    *(rows.numpy() for rows in out), self.heads, self.num_states, self.room, *part,
                )
                for part in self.parts
            ],
        )  # fmt: skip
        return out

    def backward(self, d_key: Tensor, d_value: Tensor, d_routed: Tensor) -> list[Tensor | None]:
        turned = cpu.Weights(*(arrays.place(x.t() if x.dim() == 2 else x) for x in self.matrices))
        grads = [
            [torch.zeros(x.shape, dtype=self.dtype) for x in self.matrices] for _ in self.parts
        ]
        # Tokens of no group have no gradient; where all belong to one, every row is written.
        is_covered = int(self.ptr[-1]) == len(self.x)
        d_x = (torch.empty if is_covered else torch.zeros)(self.x.shape, dtype=self.dtype)
        rows = [arrays.array(x) for x in (d_key, d_value, d_routed)]
        run_all(
            cpu.backward_kernel,
            [
                (
                    self.x, self.first, self.ptr, self.weights, turned, self._scratch(), *rows,
                    cpu.Weights(*(x.numpy() for x in own)), d_x.numpy(), self.heads,
                    self.num_states, self.room, *part,
                )
                for part, own in zip(self.parts, grads, strict=True)
            ],
        )  # fmt: skip
        g: Any = cpu.Weights(*(sum(own[1:], own[0]) for own in zip(*grads, strict=True)))
        value = (g.value.t(), g.value_bias) if self.has_value else (None, None)
        return [
            d_x, g.key.t(), g.key_bias, *value, g.logits, g.logits_bias, g.out.t(), g.out_bias,
        ]  # fmt: skip

    def _scratch(self) -> cpu.Scratch:
        rows, columns = self.heads * self.num_states, arrays.spread(self.room)
        width, sums = self.x.shape[1], min(self.room, len(self.first)) * self.num_states
        empty = partial(arrays.empty, self.dtype)
        return cpu.Scratch(
            x=empty(self.room, width),
            x_turned=empty(width, columns),
            heads=empty(rows, columns),
            weights=empty(self.num_states, columns),
            sums=empty(sums, width),
            d_sums=empty(sums, width),
            d_weights=empty(self.num_states, columns),
            d_heads=empty(rows, columns),
            d_x=empty(self.room, width),
        )
