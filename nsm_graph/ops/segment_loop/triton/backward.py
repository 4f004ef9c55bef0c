"""The segment loop backward, for GPUs: the parts of a step, and the kernel of some steps.

A program is one example. It goes from the last step to the first, makes each step again from the
states before it, and carries the gradient of the states in registers. It writes gradients of rows,
and one row for each state and step of what parameters' gradients are products of: what the maps
read, and the gradients of what they gave. `gpu.py` multiplies these, all steps at once.

Legend as in `blocks.py`; the equations stand in the README beside this package, numbered.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from nsm_graph.ops.segment_loop.triton.blocks import (
    attend,
    columns_at,
    load_rows,
    load_tokens,
    load_vector,
    multiply_back,
    product,
    project,
    rows_at,
    score,
    talk_weights,
)
from nsm_graph.ops.segment_loop.triton.forward import gru, normalise, read, talk

# Parts of a step ###################################################################


@triton.jit
def _talk_backward(
    dy_NC, propagated_NC, qkv, qkv_bias, mix, mixed, d_qkv, row,
    N: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Steps 3 to 5: from the gradient before the norm to that of the propagated states."""
    d_NC = dy_NC
    for head in range(HEADS):
        own = head * D
        query_ND = SCALE * project(propagated_NC, qkv, qkv_bias, own, C, D, BLOCK_C, BLOCK_D)
        key_ND = project(propagated_NC, qkv, qkv_bias, C + own, C, D, BLOCK_C, BLOCK_D)
        value_ND = project(propagated_NC, qkv, qkv_bias, 2 * C + own, C, D, BLOCK_C, BLOCK_D)
        weights_NN = talk_weights(query_ND, key_ND, N, BLOCK_N)
        places_ND, is_there_ND = columns_at(row, own, N, D, C, BLOCK_N, BLOCK_D)
        tl.store(mixed + places_ND, product(weights_NN, value_ND), mask=is_there_ND)

        d_mixed_ND = multiply_back(dy_NC, mix, 0, own, C, D, C, BLOCK_C, BLOCK_D)
        d_value_ND = product(tl.trans(weights_NN), d_mixed_ND)
        terms_NN = product(d_mixed_ND, tl.trans(value_ND))
        mean_N = tl.sum(weights_NN * terms_NN, 1)
        terms_NN = weights_NN * (terms_NN - mean_N[:, None])
        d_query_ND = SCALE * product(terms_NN, key_ND)
        d_key_ND = product(tl.trans(terms_NN), query_ND)

        d_NC += multiply_back(d_query_ND, qkv, own, 0, D, C, C, BLOCK_D, BLOCK_C)
        d_NC += multiply_back(d_key_ND, qkv, C + own, 0, D, C, C, BLOCK_D, BLOCK_C)
        d_NC += multiply_back(d_value_ND, qkv, 2 * C + own, 0, D, C, C, BLOCK_D, BLOCK_C)
        places_ND, is_there_ND = columns_at(row, own, N, D, 3 * C, BLOCK_N, BLOCK_D)
        tl.store(d_qkv + places_ND, d_query_ND, mask=is_there_ND)
        tl.store(d_qkv + places_ND + C, d_key_ND, mask=is_there_ND)
        tl.store(d_qkv + places_ND + 2 * C, d_value_ND, mask=is_there_ND)
    return d_NC


@triton.jit
def _gru_backward(
    d_NC, state_NC, reset_NC, mix_NC, new_NC, gates, candidate, d_gates, row,
    N: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Steps 6 to 9: from the gradient of the propagated states to those of state and update."""
    d_new_NC = d_NC * mix_NC * (1.0 - new_NC * new_NC)
    d_mix_NC = d_NC * (new_NC - state_NC) * mix_NC * (1.0 - mix_NC)
    d_state_NC = d_NC * (1.0 - mix_NC)
    d_both_NC = multiply_back(d_new_NC, candidate, 0, 0, C, C, 2 * C, BLOCK_C, BLOCK_C)
    d_update_NC = multiply_back(d_new_NC, candidate, 0, C, C, C, 2 * C, BLOCK_C, BLOCK_C)
    d_reset_NC = d_both_NC * state_NC * reset_NC * (1.0 - reset_NC)
    d_state_NC += d_both_NC * reset_NC
    d_state_NC += multiply_back(d_reset_NC, gates, 0, 0, C, C, 2 * C, BLOCK_C, BLOCK_C)
    d_state_NC += multiply_back(d_mix_NC, gates, C, 0, C, C, 2 * C, BLOCK_C, BLOCK_C)
    d_update_NC += multiply_back(d_reset_NC, gates, 0, C, C, C, 2 * C, BLOCK_C, BLOCK_C)
    d_update_NC += multiply_back(d_mix_NC, gates, C, C, C, C, 2 * C, BLOCK_C, BLOCK_C)
    places_NC, is_there_NC = columns_at(row, 0, N, C, 3 * C, BLOCK_N, BLOCK_C)
    tl.store(d_gates + places_NC, d_reset_NC, mask=is_there_NC)
    tl.store(d_gates + places_NC + C, d_mix_NC, mask=is_there_NC)
    tl.store(d_gates + places_NC + 2 * C, d_new_NC, mask=is_there_NC)
    return d_state_NC, d_update_NC


@triton.jit
def _attend_backward(
    d_attended_ND, attended_ND, highest_N, total_N, query_ND, key, value, d_key, d_value,
    first, end, head,
    C: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Step 11 of one head: writes gradients of keys and values, returns that of the query."""
    DTYPE: tl.constexpr = query_ND.dtype
    mean_N = tl.sum(d_attended_ND * attended_ND, 1)  # sum of weight * (d_attended . value)
    d_query_ND = tl.zeros([BLOCK_N, BLOCK_D], DTYPE)
    for start in range(first, end, BLOCK_L):
        key_LD = load_tokens(key, start, end, head, C, D, BLOCK_L, BLOCK_D, DTYPE)
        value_LD = key_LD
        if not SHARED:
            value_LD = load_tokens(value, start, end, head, C, D, BLOCK_L, BLOCK_D, DTYPE)
        scores_NL = score(query_ND, key_LD, start, end, BLOCK_L)
        weights_NL = tl.exp(scores_NL - highest_N[:, None]) / total_N[:, None]
        terms_NL = product(d_attended_ND, tl.trans(value_LD)) - mean_N[:, None]
        terms_NL = weights_NL * terms_NL
        d_query_ND += product(terms_NL, key_LD)
        d_key_LD = product(tl.trans(terms_NL), query_ND)
        d_value_LD = product(tl.trans(weights_NL), d_attended_ND)
        tokens_L = start + tl.arange(0, BLOCK_L)
        columns_D = tl.arange(0, BLOCK_D)
        places_LD = tokens_L[:, None] * C + head * D + columns_D[None, :]
        is_there_LD = (tokens_L < end)[:, None] & (columns_D < D)[None, :]
        if SHARED:
            d_key_LD += d_value_LD
        else:
            tl.store(d_value + places_LD, d_value_LD, mask=is_there_LD)
        tl.store(d_key + places_LD, d_key_LD, mask=is_there_LD)
    return d_query_ND


@triton.jit
def _read_backward(
    d_state_NC, d_update_NC, state_NC, key, value, first, end, query, query_bias, out,
    attended, d_query, d_key, d_value, row,
    N: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Steps 10 to 12: adds to the gradient of the states what goes through attention."""
    for head in range(HEADS):
        own = head * D
        query_ND = SCALE * project(state_NC, query, query_bias, own, C, D, BLOCK_C, BLOCK_D)
        attended_ND, highest_N, total_N = attend(
            query_ND, key, value, first, end, head, C, D, BLOCK_N, BLOCK_D, BLOCK_L, SHARED
        )
        d_attended_ND = multiply_back(d_update_NC, out, 0, own, C, D, C, BLOCK_C, BLOCK_D)
        d_query_ND = SCALE * _attend_backward(
            d_attended_ND, attended_ND, highest_N, total_N, query_ND, key, value, d_key, d_value,
            first, end, head, C, D, BLOCK_N, BLOCK_D, BLOCK_L, SHARED,
        )  # fmt: skip
        d_state_NC += multiply_back(d_query_ND, query, own, 0, D, C, C, BLOCK_D, BLOCK_C)
        places_ND, is_there_ND = columns_at(row, own, N, D, C, BLOCK_N, BLOCK_D)
        tl.store(attended + places_ND, attended_ND, mask=is_there_ND)
        tl.store(d_query + places_ND, d_query_ND, mask=is_there_ND)
    return d_state_NC


# Some steps ########################################################################


@triton.jit(do_not_specialize=["first_step", "end_step"])
def backward_kernel(
    states, after, routed, key, value, token_ptr, first_group, num_steps,
    query, query_bias, out, out_bias, gates, gates_bias, candidate, candidate_bias,
    qkv, qkv_bias, mix, mix_bias, scale, shift,
    d_after, d_states, d_routed, d_key, d_value,
    x, attended, propagated, mixed, d_query, d_gates, d_qkv, d_residual, d_norm,
    first_step, end_step,
    N: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, TALK_HEADS: tl.constexpr,
    D: tl.constexpr, TALK_D: tl.constexpr, SCALE: tl.constexpr, TALK_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_TALK_D: tl.constexpr, BLOCK_L: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Goes back through the steps ``first_step`` to ``end_step - 1`` of one example.

    ``d_states[examples N, C]`` holds the gradient of the states after these steps, and then that
    of the states before them; ``d_after`` may be None. What is to be multiplied (``x`` to
    ``d_residual``) has a row for each state and step of these, ``d_norm[examples, 2, C]`` the
    gradients of the norm's scale and shift.
    """
    DTYPE: tl.constexpr = d_states.dtype.element_ty
    example = tl.program_id(0).to(tl.int64)
    own_NC, is_own_NC = rows_at(example * N, N, C, BLOCK_N, BLOCK_C)
    d_NC = tl.load(d_states + own_NC, mask=is_own_NC, other=0.0)
    d_scale_C = tl.zeros([BLOCK_C], DTYPE)
    d_shift_C = tl.zeros([BLOCK_C], DTYPE)
    first_row = tl.load(first_group + first_step) * N
    end = tl.minimum(tl.load(num_steps + example), end_step)
    for back in range(end - first_step):
        step = end - 1 - back
        group = tl.load(first_group + step) + example
        first = tl.load(token_ptr + group)
        last = tl.load(token_ptr + group + 1)
        row = group * N - first_row
        if step > 0:
            before = tl.load(first_group + step - 1) + example
            state_NC = load_rows(after, before * N, DTYPE, N, C, BLOCK_N, BLOCK_C)
        else:
            state_NC = load_rows(states, example * N, DTYPE, N, C, BLOCK_N, BLOCK_C)
        if d_after is not None:
            d_NC += load_rows(d_after, group * N, DTYPE, N, C, BLOCK_N, BLOCK_C)

        update_NC = read(
            state_NC, key, value, routed, group, first, last, query, query_bias, out, out_bias,
            N, C, HEADS, D, SCALE, BLOCK_N, BLOCK_C, BLOCK_D, BLOCK_L, SHARED,
        )  # fmt: skip
        reset_NC, mix_NC, new_NC = gru(
            state_NC, update_NC, gates, gates_bias, candidate, candidate_bias, C, BLOCK_C
        )
        places_NC, is_there_NC = columns_at(row, 0, N, C, 3 * C, BLOCK_N, BLOCK_C)
        tl.store(x + places_NC, state_NC, mask=is_there_NC)
        tl.store(x + places_NC + C, update_NC, mask=is_there_NC)
        tl.store(x + places_NC + 2 * C, reset_NC * state_NC, mask=is_there_NC)

        if TALK_HEADS > 0:
            propagated_NC = state_NC + mix_NC * (new_NC - state_NC)
            y_NC = talk(
                propagated_NC, qkv, qkv_bias, mix, mix_bias,
                N, C, TALK_HEADS, TALK_D, TALK_SCALE, BLOCK_N, BLOCK_C, BLOCK_TALK_D,
            )  # fmt: skip
            normal_NC, inverse_N = normalise(y_NC, C, BLOCK_C)
            d_scale_C += tl.sum(d_NC * normal_NC, 0)
            d_shift_C += tl.sum(d_NC, 0)
            d_NC *= load_vector(scale, 0, C, BLOCK_C, DTYPE)[None, :]
            mean_N = tl.sum(d_NC, 1) / C
            along_N = tl.sum(d_NC * normal_NC, 1) / C
            d_NC = inverse_N[:, None] * (d_NC - mean_N[:, None] - normal_NC * along_N[:, None])
            d_NC = tl.where(tl.arange(0, BLOCK_C)[None, :] < C, d_NC, 0.0)
            rows_NC, _ = rows_at(row, N, C, BLOCK_N, BLOCK_C)
            tl.store(propagated + rows_NC, propagated_NC, mask=is_there_NC)
            tl.store(d_residual + rows_NC, d_NC, mask=is_there_NC)
            d_NC = _talk_backward(
                d_NC, propagated_NC, qkv, qkv_bias, mix, mixed, d_qkv, row,
                N, C, TALK_HEADS, TALK_D, TALK_SCALE, BLOCK_N, BLOCK_C, BLOCK_TALK_D,
            )  # fmt: skip

        d_NC, d_update_NC = _gru_backward(
            d_NC, state_NC, reset_NC, mix_NC, new_NC, gates, candidate, d_gates, row,
            N, C, BLOCK_N, BLOCK_C,
        )  # fmt: skip
        routed_NC, _ = rows_at(group * N, N, C, BLOCK_N, BLOCK_C)
        tl.store(d_routed + routed_NC, d_update_NC, mask=is_there_NC)
        d_NC = _read_backward(
            d_NC, d_update_NC, state_NC, key, value, first, last, query, query_bias, out,
            attended, d_query, d_key, d_value, row,
            N, C, HEADS, D, SCALE, BLOCK_N, BLOCK_C, BLOCK_D, BLOCK_L, SHARED,
        )  # fmt: skip
    tl.store(d_states + own_NC, d_NC, mask=is_own_NC)
    if TALK_HEADS > 0:
        channels_C = tl.arange(0, BLOCK_C)
        norm_C = d_norm + example * (2 * C) + channels_C
        tl.store(norm_C, d_scale_C, mask=channels_C < C)
        tl.store(norm_C + C, d_shift_C, mask=channels_C < C)
