"""The segment loop forward, for GPUs: the parts of a step, and the kernel of all steps.

A program is one example: examples never exchange data, so no program waits for another. Its states
stay in registers from step to step; parameters are read anew in every step, and since all programs
read the same ones, the second-level cache has them.

Legend as in `blocks.py`; equations in the README beside this package. A *group* is one segment of
one example; groups stand step by step.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from nsm_graph.ops.segment_loop.triton.blocks import (
    attend,
    load_rows,
    load_vector,
    multiply,
    product,
    project,
    rows_at,
    talk_weights,
    tanh,
)

# A step ############################################################################


@triton.jit
def read(
    state_NC, key, value, routed, group, first, end, query, query_bias, out, out_bias,
    N: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """The update: what was routed, and what attention reads of the segment's tokens."""
    DTYPE: tl.constexpr = state_NC.dtype
    update_NC = load_rows(routed, group * N, DTYPE, N, C, BLOCK_N, BLOCK_C)
    update_NC += load_vector(out_bias, 0, C, BLOCK_C, DTYPE)[None, :]
    for head in range(HEADS):
        query_ND = SCALE * project(state_NC, query, query_bias, head * D, C, D, BLOCK_C, BLOCK_D)
        attended_ND, _, _ = attend(
            query_ND, key, value, first, end, head, C, D, BLOCK_N, BLOCK_D, BLOCK_L, SHARED
        )
        update_NC += multiply(attended_ND, out, 0, head * D, C, D, C, BLOCK_C, BLOCK_D)
    return update_NC


@triton.jit
def _gate(left_NC, right_NC, w, bias, first, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """C rows of a matrix from ``first`` on, of two inputs side by side."""
    sum_NC = multiply(left_NC, w, first, 0, C, C, 2 * C, BLOCK_C, BLOCK_C)
    sum_NC += multiply(right_NC, w, first, C, C, C, 2 * C, BLOCK_C, BLOCK_C)
    return sum_NC + load_vector(bias, first, C, BLOCK_C, left_NC.dtype)[None, :]


@triton.jit
def gru(
    state_NC, update_NC, gates, gates_bias, candidate, candidate_bias,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Reset gate, update gate and candidate."""
    reset_NC = tl.sigmoid(_gate(state_NC, update_NC, gates, gates_bias, 0, C, BLOCK_C))
    mix_NC = tl.sigmoid(_gate(state_NC, update_NC, gates, gates_bias, C, C, BLOCK_C))
    both_NC = reset_NC * state_NC
    new_NC = tanh(_gate(both_NC, update_NC, candidate, candidate_bias, 0, C, BLOCK_C))
    return reset_NC, mix_NC, new_NC


@triton.jit
def talk(
    propagated_NC, qkv, qkv_bias, mix, mix_bias,
    N: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """States attend to those of their example; with the residual, before the norm."""
    DTYPE: tl.constexpr = propagated_NC.dtype
    sum_NC = propagated_NC + load_vector(mix_bias, 0, C, BLOCK_C, DTYPE)[None, :]
    for head in range(HEADS):
        own = head * D
        query_ND = SCALE * project(propagated_NC, qkv, qkv_bias, own, C, D, BLOCK_C, BLOCK_D)
        key_ND = project(propagated_NC, qkv, qkv_bias, C + own, C, D, BLOCK_C, BLOCK_D)
        value_ND = project(propagated_NC, qkv, qkv_bias, 2 * C + own, C, D, BLOCK_C, BLOCK_D)
        mixed_ND = product(talk_weights(query_ND, key_ND, N, BLOCK_N), value_ND)
        sum_NC += multiply(mixed_ND, mix, 0, own, C, D, C, BLOCK_C, BLOCK_D)
    return sum_NC


@triton.jit
def normalise(y_NC, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Normalised rows, and one over their standard deviations."""
    is_channel_C = tl.arange(0, BLOCK_C) < C
    mean_N = tl.sum(y_NC, 1) / C
    centred_NC = tl.where(is_channel_C[None, :], y_NC - mean_N[:, None], 0.0)
    inverse_N = 1.0 / tl.sqrt(tl.sum(centred_NC * centred_NC, 1) / C + 1e-5)
    return centred_NC * inverse_N[:, None], inverse_N


# All steps #########################################################################


@triton.jit
def forward_kernel(
    routed, key, value, token_ptr, first_group, num_steps,
    query, query_bias, out, out_bias, gates, gates_bias, candidate, candidate_bias,
    qkv, qkv_bias, mix, mix_bias, scale, shift,
    after, final,
    N: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, TALK_HEADS: tl.constexpr,
    D: tl.constexpr, TALK_D: tl.constexpr, SCALE: tl.constexpr, TALK_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_TALK_D: tl.constexpr, BLOCK_L: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Reads all segments of one example.

    Fills ``after[groups N, C]``, the states after every step; ``final[examples N, C]`` holds the
    states before the first step and then those after an example's last. ``TALK_HEADS`` is 0
    without communication.
    """
    DTYPE: tl.constexpr = final.dtype.element_ty
    example = tl.program_id(0).to(tl.int64)
    own_NC, is_own_NC = rows_at(example * N, N, C, BLOCK_N, BLOCK_C)
    state_NC = tl.load(final + own_NC, mask=is_own_NC, other=0.0)
    steps = tl.load(num_steps + example)
    for step in range(steps):
        group = tl.load(first_group + step) + example
        first = tl.load(token_ptr + group)
        end = tl.load(token_ptr + group + 1)
        update_NC = read(
            state_NC, key, value, routed, group, first, end, query, query_bias, out, out_bias,
            N, C, HEADS, D, SCALE, BLOCK_N, BLOCK_C, BLOCK_D, BLOCK_L, SHARED,
        )  # fmt: skip
        _, mix_NC, new_NC = gru(
            state_NC, update_NC, gates, gates_bias, candidate, candidate_bias, C, BLOCK_C
        )
        state_NC += mix_NC * (new_NC - state_NC)
        if TALK_HEADS > 0:
            y_NC = talk(
                state_NC, qkv, qkv_bias, mix, mix_bias,
                N, C, TALK_HEADS, TALK_D, TALK_SCALE, BLOCK_N, BLOCK_C, BLOCK_TALK_D,
            )  # fmt: skip
            normal_NC, _ = normalise(y_NC, C, BLOCK_C)
            state_NC = normal_NC * load_vector(scale, 0, C, BLOCK_C, DTYPE)[None, :]
            state_NC += load_vector(shift, 0, C, BLOCK_C, DTYPE)[None, :]
        after_NC, _ = rows_at(group * N, N, C, BLOCK_N, BLOCK_C)
        tl.store(after + after_NC, state_NC, mask=is_own_NC)
    tl.store(final + own_NC, state_NC, mask=is_own_NC)
