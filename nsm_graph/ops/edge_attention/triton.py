"""Edge attention on general edges, for GPUs: what a program of a pass does.

Every pass owns rows of one side (targets or sources) and visits their edges, so nothing is added
atomically and the result is the same, bit for bit, every time. A program takes one row and a block
of heads. A long row, of more than ``SLICE`` edges, would keep its program busy when the others are
done, so it is cut where positions are multiples of ``SLICE``, and a second, small kernel adds the
pieces up. At most two long rows meet a block of ``SLICE`` positions: one that holds the block's
first position, one that starts inside and goes on beyond it. So block b has the places 2b and
2b + 1 for their pieces, and nobody has to count them.

`README.md` has the derivation, `gpu.py` what is launched on which tensors.

Legend: G rows that a pass owns, X rows of the other side, E edges, H heads, D channels a head, P
places for pieces; edges of row g are p = ptr[g]..ptr[g + 1] - 1, ``index[p]`` is the other end and
``perm[p]`` the edge. Blocks are named by their axes: E edges (or pieces), H heads, D channels.
``stats`` ``[G, 2, H]`` holds each group's highest score and one over its sum of exponentials.
Rows and edges count in 64 bits, because rows * H * D and E * H may pass 2**31.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

#: Arguments that differ from batch to batch: not each value that 16 divides is compiled anew.
COUNTS = ["num_rows", "num_edges", "num_places", "degree"]

# Which edges a program visits ######################################################


@triton.jit
def _ends(row, ptr, degree, FIXED: tl.constexpr):
    """First position of a row's edges, and the one after the last."""
    if FIXED:
        start = row * degree
        end = start + degree
    else:
        start = tl.load(ptr + row).to(tl.int64)
        end = tl.load(ptr + row + 1).to(tl.int64)
    return start, end


@triton.jit
def _row_of(position, ptr, num_rows, degree, FIXED: tl.constexpr):
    """The row that holds a position."""
    if FIXED:
        row = position // degree
    else:
        # The last row that starts there or before, by 64 looks at a time: few wait for another.
        row = position * 0
        count = row + num_rows
        while count > 1:
            step = (count + 64) // 65
            ahead = step * (1 + tl.arange(0, 64))
            starts = tl.load(ptr + row + ahead, mask=ahead < count, other=0)
            passed = step * tl.sum(((ahead < count) & (starts <= position)).to(tl.int64), 0)
            row += passed
            count = tl.minimum(step, count - passed)
    return row


@triton.jit
def _task(ptr, num_rows, num_edges, num_places, degree, SLICE: tl.constexpr, FIXED: tl.constexpr):
    """Row and positions of this program, and whether they are its to visit."""
    program = tl.program_id(0).to(tl.int64)
    # Pieces of long rows come first: what takes longest should not start last.
    if program < num_places:
        first = program // 2 * SLICE
        last = tl.minimum(first + SLICE, num_edges)
        position = tl.where(program % 2 == 0, first, last - 1)
        row = _row_of(position, ptr, num_rows, degree, FIXED)
        start, end = _ends(row, ptr, degree, FIXED)
        is_mine = (end - start > SLICE) & ((program % 2 == 0) | (start > first))
        start = tl.maximum(start, first)
        end = tl.minimum(end, last)
    else:
        row = program - num_places
        start, end = _ends(row, ptr, degree, FIXED)
        is_mine = end - start <= SLICE
    return row, start, tl.where(is_mine, end, start), is_mine


@triton.jit
def _pieces(ptr, num_rows, num_edges, degree, SLICE: tl.constexpr, FIXED: tl.constexpr):
    """The long row that starts in this block, if one does, the blocks it meets, its first place."""
    block = tl.program_id(0).to(tl.int64)
    last = tl.minimum((block + 1) * SLICE, num_edges) - 1
    row = _row_of(last, ptr, num_rows, degree, FIXED)
    start, end = _ends(row, ptr, degree, FIXED)
    is_mine = (end - start > SLICE) & (start >= block * SLICE)
    end_block = tl.where(is_mine, (end + SLICE - 1) // SLICE, block)
    place = 2 * block + tl.where(start > block * SLICE, 1, 0)
    return row, block, end_block, place, is_mine


@triton.jit
def _places(block, end_block, place, first, BLOCK_E: tl.constexpr):
    """Places of the pieces from block ``first`` on, and which of them count."""
    blocks_E = first + tl.arange(0, BLOCK_E)
    return tl.where(blocks_E == block, place, 2 * blocks_E), blocks_E < end_block


# Blocks of edges, heads and channels ###############################################


@triton.jit
def _cells(H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's heads, and the places of their channels in a row."""
    heads_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    channels_D = tl.arange(0, BLOCK_D)
    cells_HD = heads_H[:, None] * D + channels_D[None, :]
    is_head_H = heads_H < H
    return heads_H, is_head_H, cells_HD, is_head_H[:, None] & (channels_D < D)[None, :]


@triton.jit
def _gather(x, rows_E, is_edge_E, cells_HD, is_cell_HD, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """Rows of ``SIZE`` numbers, ``[E, H, D]``; zeros where there is no edge."""
    places_EHD = rows_E[:, None, None] * SIZE + cells_HD[None, :, :]
    is_there_EHD = is_edge_E[:, None, None] & is_cell_HD[None, :, :]
    return tl.load(x + places_EHD, mask=is_there_EHD, other=0.0).to(DTYPE)


@triton.jit
def _visit(
    index, perm, bias, own_HD, other, first, end, heads_H, is_head_H, cells_HD, is_cell_HD,
    SCALE: tl.constexpr, BIAS_HEADS: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Other ends of the edges from position ``first`` on, with their rows, and the scores.

    A score is ``SCALE * own . other + bias``, and -inf where there is no edge.
    """
    positions_E = first + tl.arange(0, BLOCK_E)
    is_edge_E = positions_E < end
    others_E = tl.load(index + positions_E, mask=is_edge_E, other=0).to(tl.int64)
    edges_E = positions_E
    other_EHD = _gather(other, others_E, is_edge_E, cells_HD, is_cell_HD, H * D, own_HD.dtype)
    scores_EH = tl.sum(own_HD[None, :, :] * other_EHD, 2) * SCALE
    if BIAS_HEADS > 0:
        edges_E = tl.load(perm + positions_E, mask=is_edge_E, other=0)
        columns_H = heads_H if BIAS_HEADS > 1 else heads_H * 0
        places_EH = edges_E[:, None] * BIAS_HEADS + columns_H[None, :]
        is_there_EH = is_edge_E[:, None] & is_head_H[None, :]
        scores_EH += tl.load(bias + places_EH, mask=is_there_EH, other=0.0).to(scores_EH.dtype)
    scores_EH = tl.where(is_edge_E[:, None], scores_EH, float("-inf"))
    return others_E, edges_E, is_edge_E, other_EHD, scores_EH


# Softmax ###########################################################################


@triton.jit
def _shift(highest_H):
    """What is taken off scores: the highest. If there is none, 0: -inf less itself is NaN."""
    return tl.where(highest_H == float("-inf"), 0.0, highest_H)


@triton.jit
def _weights(stats, groups_E, is_edge_E, heads_H, is_head_H, scores_EH, H: tl.constexpr):
    """Weights of edges whose groups are known: ``exp(score - highest) / total``."""
    places_EH = groups_E[:, None] * (2 * H) + heads_H[None, :]
    is_there_EH = is_edge_E[:, None] & is_head_H[None, :]
    shift_EH = tl.load(stats + places_EH, mask=is_there_EH, other=0.0)
    return tl.exp(scores_EH - shift_EH) * tl.load(
        stats + places_EH + H, mask=is_there_EH, other=0.0
    )


# Forward ###########################################################################


@triton.jit
def _store_forward(
    stats, out, row, highest_H, total_H, sum_HD, heads_H, is_head_H, cells_HD, is_cell_HD,
    OWNS_GROUPS: tl.constexpr, SUMS: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    if OWNS_GROUPS:
        # A group without edges has a sum of zero.
        share_H = 1.0 / tl.where(total_H == 0.0, 1.0, total_H)
        sum_HD = sum_HD * share_H[:, None]
        tl.store(stats + row * (2 * H) + heads_H, _shift(highest_H), mask=is_head_H)
        tl.store(stats + row * (2 * H) + H + heads_H, share_H, mask=is_head_H)
    if SUMS:
        tl.store(out + row * (H * D) + cells_HD, sum_HD, mask=is_cell_HD)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    own, other, value, bias, ptr, index, perm, stats, out, piece_stats, pieces,
    num_rows, num_edges, num_places, degree,
    SCALE: tl.constexpr, BIAS_HEADS: tl.constexpr, OWNS_GROUPS: tl.constexpr, SUMS: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Softmax over the edges of each row (``OWNS_GROUPS``), weighted sum of values (``SUMS``).

    If rows are not the groups, other ends are, and ``stats`` holds what is known of them.
    """
    DTYPE: tl.constexpr = stats.dtype.element_ty
    row, start, end, is_mine = _task(ptr, num_rows, num_edges, num_places, degree, SLICE, FIXED)
    heads_H, is_head_H, cells_HD, is_cell_HD = _cells(H, D, BLOCK_H, BLOCK_D)
    own_HD = tl.load(own + row * (H * D) + cells_HD, mask=is_cell_HD, other=0.0).to(DTYPE)
    highest_H = tl.full([BLOCK_H], float("-inf"), DTYPE)
    total_H = tl.zeros([BLOCK_H], DTYPE)
    sum_HD = tl.zeros([BLOCK_H, BLOCK_D], DTYPE)
    for first in range(start, end, BLOCK_E):
        others_E, _, is_edge_E, _, scores_EH = _visit(
            index, perm, bias, own_HD, other, first, end, heads_H, is_head_H, cells_HD, is_cell_HD,
            SCALE, BIAS_HEADS, H, D, BLOCK_E,
        )  # fmt: skip
        if OWNS_GROUPS:
            before_H = highest_H
            highest_H = tl.maximum(before_H, tl.max(scores_EH, 0))
            shrink_H = tl.exp(before_H - _shift(highest_H))
            weights_EH = tl.exp(scores_EH - _shift(highest_H)[None, :])
            total_H = total_H * shrink_H + tl.sum(weights_EH, 0)
            sum_HD = sum_HD * shrink_H[:, None]
        else:
            weights_EH = _weights(stats, others_E, is_edge_E, heads_H, is_head_H, scores_EH, H)
        if SUMS:
            value_EHD = _gather(value, others_E, is_edge_E, cells_HD, is_cell_HD, H * D, DTYPE)
            sum_HD += tl.sum(weights_EH[:, :, None] * value_EHD, 0)
    place = tl.program_id(0).to(tl.int64)
    if is_mine:
        if place >= num_places:
            _store_forward(
                stats, out, row, highest_H, total_H, sum_HD,
                heads_H, is_head_H, cells_HD, is_cell_HD, OWNS_GROUPS, SUMS, H, D,
            )  # fmt: skip
        else:
            if OWNS_GROUPS:
                mine_H = piece_stats + place * (2 * H) + heads_H
                tl.store(mine_H, highest_H, mask=is_head_H)
                tl.store(mine_H + H, total_H, mask=is_head_H)
            if SUMS:
                tl.store(pieces + place * (H * D) + cells_HD, sum_HD, mask=is_cell_HD)


@triton.jit(do_not_specialize=COUNTS[:2])
def merge_forward_kernel(
    ptr, stats, out, piece_stats, pieces, num_rows, num_edges, degree,
    OWNS_GROUPS: tl.constexpr, SUMS: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Results of each long row from those of its pieces."""
    DTYPE: tl.constexpr = stats.dtype.element_ty
    row, block, end_block, place, is_mine = _pieces(ptr, num_rows, num_edges, degree, SLICE, FIXED)
    heads_H, is_head_H, cells_HD, is_cell_HD = _cells(H, D, BLOCK_H, BLOCK_D)
    highest_H = tl.full([BLOCK_H], float("-inf"), DTYPE)
    total_H = tl.zeros([BLOCK_H], DTYPE)
    sum_HD = tl.zeros([BLOCK_H, BLOCK_D], DTYPE)
    for first in range(block, end_block, BLOCK_E):
        places_E, is_piece_E = _places(block, end_block, place, first, BLOCK_E)
        if SUMS:
            sum_EHD = _gather(pieces, places_E, is_piece_E, cells_HD, is_cell_HD, H * D, DTYPE)
        if OWNS_GROUPS:
            theirs_EH = piece_stats + places_E[:, None] * (2 * H) + heads_H[None, :]
            is_there_EH = is_piece_E[:, None] & is_head_H[None, :]
            highest_EH = tl.load(theirs_EH, mask=is_there_EH, other=float("-inf"))
            before_H = highest_H
            highest_H = tl.maximum(before_H, tl.max(highest_EH, 0))
            shrink_H = tl.exp(before_H - _shift(highest_H))
            shrink_EH = tl.exp(highest_EH - _shift(highest_H)[None, :])
            total_EH = shrink_EH * tl.load(theirs_EH + H, mask=is_there_EH, other=0.0)
            total_H = total_H * shrink_H + tl.sum(total_EH, 0)
            if SUMS:
                sum_HD = sum_HD * shrink_H[:, None]
                sum_EHD = sum_EHD * shrink_EH[:, :, None]
        if SUMS:
            sum_HD += tl.sum(sum_EHD, 0)
    if is_mine:
        _store_forward(
            stats, out, row, highest_H, total_H, sum_HD,
            heads_H, is_head_H, cells_HD, is_cell_HD, OWNS_GROUPS, SUMS, H, D,
        )  # fmt: skip


# Backward ##########################################################################


@triton.jit
def _store_backward(
    delta, grad_x, grad_y, row, delta_H, x_HD, mean_HD, y_HD,
    heads_H, is_head_H, cells_HD, is_cell_HD,
    SCALE: tl.constexpr, OWNS_GROUPS: tl.constexpr, SUMS: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    if OWNS_GROUPS:
        x_HD = x_HD - delta_H[:, None] * mean_HD
        tl.store(delta + row * H + heads_H, delta_H, mask=is_head_H)
    tl.store(grad_x + row * (H * D) + cells_HD, x_HD * SCALE, mask=is_cell_HD)
    if SUMS:
        tl.store(grad_y + row * (H * D) + cells_HD, y_HD, mask=is_cell_HD)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    own_x, own_y, other_x, other_y, bias, ptr, index, perm, stats, delta,
    grad_x, grad_y, grad_bias, piece_delta, pieces,
    num_rows, num_edges, num_places, degree,
    SCALE: tl.constexpr, BIAS_HEADS: tl.constexpr, OWNS_GROUPS: tl.constexpr, SUMS: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Gradients of each row: ``x`` makes the scores, ``y`` the gradients of the weights.

    ``x`` and ``y`` are query and output gradient of targets, key and value of sources. The pass
    whose rows are the groups finds each group's delta; the other one reads it, and knows then
    the gradient of each score, which is that of its bias. ``SUMS`` asks for the gradient of ``y``.
    """
    DTYPE: tl.constexpr = stats.dtype.element_ty
    row, start, end, is_mine = _task(ptr, num_rows, num_edges, num_places, degree, SLICE, FIXED)
    heads_H, is_head_H, cells_HD, is_cell_HD = _cells(H, D, BLOCK_H, BLOCK_D)
    mine_HD = row * (H * D) + cells_HD
    own_x_HD = tl.load(own_x + mine_HD, mask=is_cell_HD, other=0.0).to(DTYPE)
    own_y_HD = tl.load(own_y + mine_HD, mask=is_cell_HD, other=0.0).to(DTYPE)
    if OWNS_GROUPS:
        own_stats = stats + row * (2 * H) + heads_H
        shift_H = tl.load(own_stats, mask=is_head_H, other=0.0)
        share_H = tl.load(own_stats + H, mask=is_head_H, other=0.0)
    delta_H = tl.zeros([BLOCK_H], DTYPE)
    x_HD = tl.zeros([BLOCK_H, BLOCK_D], DTYPE)
    mean_HD = tl.zeros([BLOCK_H, BLOCK_D], DTYPE)
    y_HD = tl.zeros([BLOCK_H, BLOCK_D], DTYPE)
    for first in range(start, end, BLOCK_E):
        others_E, edges_E, is_edge_E, other_x_EHD, scores_EH = _visit(
            index, perm, bias, own_x_HD, other_x, first, end,
            heads_H, is_head_H, cells_HD, is_cell_HD, SCALE, BIAS_HEADS, H, D, BLOCK_E,
        )  # fmt: skip
        other_y_EHD = _gather(other_y, others_E, is_edge_E, cells_HD, is_cell_HD, H * D, DTYPE)
        terms_EH = tl.sum(own_y_HD[None, :, :] * other_y_EHD, 2)
        if OWNS_GROUPS:
            # delta is known at the end only: sum w (t - delta) x = sum w t x - delta sum w x.
            weights_EH = tl.exp(scores_EH - shift_H[None, :]) * share_H[None, :]
            terms_EH = weights_EH * terms_EH
            delta_H += tl.sum(terms_EH, 0)
            mean_HD += tl.sum(weights_EH[:, :, None] * other_x_EHD, 0)
        else:
            weights_EH = _weights(stats, others_E, is_edge_E, heads_H, is_head_H, scores_EH, H)
            is_there_EH = is_edge_E[:, None] & is_head_H[None, :]
            places_EH = others_E[:, None] * H + heads_H[None, :]
            terms_EH = weights_EH * (
                terms_EH - tl.load(delta + places_EH, mask=is_there_EH, other=0.0)
            )
            if BIAS_HEADS > 0:
                edges_EH = edges_E[:, None] * H + heads_H[None, :]
                tl.store(grad_bias + edges_EH, terms_EH, mask=is_there_EH)
        x_HD += tl.sum(terms_EH[:, :, None] * other_x_EHD, 0)
        if SUMS:
            y_HD += tl.sum(weights_EH[:, :, None] * other_y_EHD, 0)
    place = tl.program_id(0).to(tl.int64)
    if is_mine:
        if place >= num_places:
            _store_backward(
                delta, grad_x, grad_y, row, delta_H, x_HD, mean_HD, y_HD,
                heads_H, is_head_H, cells_HD, is_cell_HD, SCALE, OWNS_GROUPS, SUMS, H, D,
            )  # fmt: skip
        else:
            piece_HD = pieces + place * (3 * H * D) + cells_HD
            tl.store(piece_HD, x_HD, mask=is_cell_HD)
            if OWNS_GROUPS:
                tl.store(piece_HD + H * D, mean_HD, mask=is_cell_HD)
                tl.store(piece_delta + place * H + heads_H, delta_H, mask=is_head_H)
            if SUMS:
                tl.store(piece_HD + 2 * H * D, y_HD, mask=is_cell_HD)


@triton.jit(do_not_specialize=COUNTS[:2])
def merge_backward_kernel(
    ptr, delta, grad_x, grad_y, piece_delta, pieces, num_rows, num_edges, degree,
    SCALE: tl.constexpr, OWNS_GROUPS: tl.constexpr, SUMS: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    SLICE: tl.constexpr, FIXED: tl.constexpr,
):  # fmt: skip
    """Gradients of each long row from those of its pieces."""
    DTYPE: tl.constexpr = pieces.dtype.element_ty
    row, block, end_block, place, is_mine = _pieces(ptr, num_rows, num_edges, degree, SLICE, FIXED)
    heads_H, is_head_H, cells_HD, is_cell_HD = _cells(H, D, BLOCK_H, BLOCK_D)
    delta_H = tl.zeros([BLOCK_H], DTYPE)
    x_HD = tl.zeros([BLOCK_H, BLOCK_D], DTYPE)
    mean_HD = tl.zeros([BLOCK_H, BLOCK_D], DTYPE)
    y_HD = tl.zeros([BLOCK_H, BLOCK_D], DTYPE)
    for first in range(block, end_block, BLOCK_E):
        places_E, is_piece_E = _places(block, end_block, place, first, BLOCK_E)
        x_HD += tl.sum(
            _gather(pieces, places_E, is_piece_E, cells_HD, is_cell_HD, 3 * H * D, DTYPE), 0
        )
        if OWNS_GROUPS:
            is_there_EH = is_piece_E[:, None] & is_head_H[None, :]
            places_EH = places_E[:, None] * H + heads_H[None, :]
            delta_H += tl.sum(tl.load(piece_delta + places_EH, mask=is_there_EH, other=0.0), 0)
            theirs = pieces + H * D
            mean_HD += tl.sum(
                _gather(theirs, places_E, is_piece_E, cells_HD, is_cell_HD, 3 * H * D, DTYPE), 0
            )
        if SUMS:
            theirs = pieces + 2 * H * D
            y_HD += tl.sum(
                _gather(theirs, places_E, is_piece_E, cells_HD, is_cell_HD, 3 * H * D, DTYPE), 0
            )
    if is_mine:
        _store_backward(
            delta, grad_x, grad_y, row, delta_H, x_HD, mean_HD, y_HD,
            heads_H, is_head_H, cells_HD, is_cell_HD, SCALE, OWNS_GROUPS, SUMS, H, D,
        )  # fmt: skip
