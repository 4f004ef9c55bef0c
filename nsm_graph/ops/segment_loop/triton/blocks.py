"""What both kernels of the segment loop do with blocks: load them, multiply them, attend.

A program holds whole rows of one example in registers, so sizes are padded to powers of 2, 16 at
least, as products of blocks need them. What lies beyond a size is loaded as zero. So padded
channels stay zero; padded states are numbers that nobody stores, and nobody may attend to.

Legend: N states, C channels, H heads, D = C / H, L tokens of a block. Blocks are named by their
axes. Matrices are ``[out, in]`` in memory, as in ``torch.nn.Linear``. Rows count in 64 bits,
because rows * C may pass 2**31.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

#: Float32 is multiplied in three passes of the units that know 19 bits: all of it counts.
PRECISION = tl.constexpr("tf32x3")

# Blocks ############################################################################


@triton.jit
def rows_at(first, N: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Places of N rows of C numbers from row ``first`` on, and which of them there are."""
    rows_N = tl.arange(0, BLOCK_N)
    channels_C = tl.arange(0, BLOCK_C)
    places_NC = (first + rows_N)[:, None] * C + channels_C[None, :]
    return places_NC, (rows_N < N)[:, None] & (channels_C < C)[None, :]


@triton.jit
def load_rows(
    x, first, DTYPE: tl.constexpr,
    N: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    places_NC, is_there_NC = rows_at(first, N, C, BLOCK_N, BLOCK_C)
    return tl.load(x + places_NC, mask=is_there_NC, other=0.0).to(DTYPE)


@triton.jit
def columns_at(
    first, column, N: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Places of D columns from ``column`` on, of N rows of ``WIDTH`` numbers."""
    rows_N = tl.arange(0, BLOCK_N)
    columns_D = tl.arange(0, BLOCK_D)
    places_ND = (first + rows_N)[:, None] * WIDTH + column + columns_D[None, :]
    return places_ND, (rows_N < N)[:, None] & (columns_D < D)[None, :]


@triton.jit
def load_vector(x, first, C: tl.constexpr, BLOCK_C: tl.constexpr, DTYPE: tl.constexpr):
    channels_C = tl.arange(0, BLOCK_C)
    return tl.load(x + first + channels_C, mask=channels_C < C, other=0.0).to(DTYPE)


@triton.jit
def load_matrix(
    w, first_out, first_in, OUT: tl.constexpr, IN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A block of a matrix of ``WIDTH`` columns."""
    outs_O = tl.arange(0, BLOCK_OUT)
    ins_I = tl.arange(0, BLOCK_IN)
    places_OI = (first_out + outs_O)[:, None] * WIDTH + first_in + ins_I[None, :]
    is_there_OI = (outs_O < OUT)[:, None] & (ins_I < IN)[None, :]
    return tl.load(w + places_OI, mask=is_there_OI, other=0.0).to(DTYPE)


# Arithmetic ########################################################################


@triton.jit
def product(left, right):
    return tl.dot(left, right, input_precision=PRECISION, out_dtype=left.dtype)


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def multiply(
    x_NI, w, first_out, first_in, OUT: tl.constexpr, IN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """What a block of a matrix of ``WIDTH`` columns makes of rows, ``[N, out]``."""
    w_OI = load_matrix(
        w, first_out, first_in, OUT, IN, WIDTH, BLOCK_OUT, BLOCK_IN, x_NI.dtype
    )  # fmt: skip
    return product(x_NI, tl.trans(w_OI))


@triton.jit
def multiply_back(
    d_NO, w, first_out, first_in, OUT: tl.constexpr, IN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """The gradient of what it read from that of what it made, ``[N, in]``."""
    w_OI = load_matrix(
        w, first_out, first_in, OUT, IN, WIDTH, BLOCK_OUT, BLOCK_IN, d_NO.dtype
    )  # fmt: skip
    return product(d_NO, w_OI)


@triton.jit
def project(
    x_NC, w, bias, first, C: tl.constexpr, D: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """D rows of a matrix from ``first`` on, and their bias, make ``[N, D]``."""
    bias_D = load_vector(bias, first, D, BLOCK_D, x_NC.dtype)
    return multiply(x_NC, w, first, 0, D, C, C, BLOCK_D, BLOCK_C) + bias_D[None, :]


# Attention #########################################################################


@triton.jit
def load_tokens(
    x, start, end, head, C: tl.constexpr, D: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A head's part of the tokens ``start`` to ``end``, as many as a block holds."""
    tokens_L = start + tl.arange(0, BLOCK_L)
    columns_D = tl.arange(0, BLOCK_D)
    places_LD = tokens_L[:, None] * C + head * D + columns_D[None, :]
    is_there_LD = (tokens_L < end)[:, None] & (columns_D < D)[None, :]
    return tl.load(x + places_LD, mask=is_there_LD, other=0.0).to(DTYPE)


@triton.jit
def score(query_ND, key_LD, start, end, BLOCK_L: tl.constexpr):
    """``[N, L]``, and -inf where there is no token."""
    is_token_L = start + tl.arange(0, BLOCK_L) < end
    scores_NL = product(query_ND, tl.trans(key_LD))
    return tl.where(is_token_L[None, :], scores_NL, float("-inf"))


@triton.jit
def attend(
    query_ND, key, value, first, end, head, C: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One head attends to tokens: result, highest score and sum of exponentials of each state."""
    DTYPE: tl.constexpr = query_ND.dtype
    highest_N = tl.full([BLOCK_N], float("-inf"), DTYPE)
    total_N = tl.zeros([BLOCK_N], DTYPE)
    sum_ND = tl.zeros([BLOCK_N, BLOCK_D], DTYPE)
    for start in range(first, end, BLOCK_L):
        # Every block has a token: the highest score is finite from the first one on.
        key_LD = load_tokens(key, start, end, head, C, D, BLOCK_L, BLOCK_D, DTYPE)
        scores_NL = score(query_ND, key_LD, start, end, BLOCK_L)
        before_N = highest_N
        highest_N = tl.maximum(before_N, tl.max(scores_NL, 1))
        shrink_N = tl.exp(before_N - highest_N)
        weights_NL = tl.exp(scores_NL - highest_N[:, None])
        total_N = total_N * shrink_N + tl.sum(weights_NL, 1)
        value_LD = key_LD
        if not SHARED:
            value_LD = load_tokens(value, start, end, head, C, D, BLOCK_L, BLOCK_D, DTYPE)
        sum_ND = sum_ND * shrink_N[:, None] + product(weights_NL, value_LD)
    return sum_ND / total_N[:, None], highest_N, total_N


@triton.jit
def talk_weights(query_ND, key_ND, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """States attend to those that there are, ``[N, N]``."""
    scores_NN = product(query_ND, tl.trans(key_ND))
    is_state_N = tl.arange(0, BLOCK_N) < N
    scores_NN = tl.where(is_state_N[None, :], scores_NN, float("-inf"))
    weights_NN = tl.exp(scores_NN - tl.max(scores_NN, 1)[:, None])
    return weights_NN / tl.sum(weights_NN, 1)[:, None]
