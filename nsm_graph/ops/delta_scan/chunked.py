"""The delta scan chunk by chunk: one triangular solve composes the steps of a chunk.

:func:`solve`, :func:`compose` and the `prepare_...` functions depend on the steps only, so a loop
over segments can hoist them; :func:`advance` and the reads then cost a matrix product or two for
each chunk. The derivation is in `README.md`.

Legend: see `steps.py`; K chunks of c tokens, n = c R corrections a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsm_graph.ops.delta_scan.steps import DeltaSteps, pad_tokens


class Decays(NamedTuple):
    """What is left at one point of a chunk of what stood there at another; products of decays.

    Zero where the other point lies ahead; ``None`` where nothing decays and nothing lies ahead.
    """

    length: int  #: c
    row_to_row: Tensor | None  #: ``[.., n, n]``, below the diagonal
    write_to_row: Tensor  #: ``[.., n, c]``
    row_to_token: Tensor  #: ``[.., c, n]``
    write_to_token: Tensor  #: ``[.., c, c]``
    start_to_row: Tensor | None  #: ``[.., n, 1]``
    start_to_token: Tensor | None  #: ``[.., c, 1]``
    row_to_end: Tensor | None  #: ``[.., n, 1]``
    write_to_end: Tensor | None  #: ``[.., c, 1]``
    start_to_end: Tensor | None  #: ``[.., 1, 1]``


class Solved(NamedTuple):
    """The corrections of every chunk: correction a adds ``key_a (u_a - w_a Z)^T`` to Z.

    Z is the memory before the chunk.
    """

    key_BKHnP: Tensor
    w_BKHnP: Tensor
    u_BKHnQ: Tensor | None
    row_BKHcP: Tensor | None  #: the writes, in chunks
    column_BK1cQ: Tensor | None
    decays: Decays


class ChunkMaps(NamedTuple):
    """What each chunk does to the memory, ``matrix @ Z + offset``; a matrix larger than its two
    factors is left as ``kept * Z - left @ (right @ Z)``.
    """

    matrix_BKHPP: Tensor | None
    kept_BKH: Tensor | None
    left_BKHPn: Tensor | None
    right_BKHnP: Tensor | None
    offset_BKHPQ: Tensor | None


class QueryReads(NamedTuple):
    """What tokens read through queries: ``query @ Z + offset``, one row of Q numbers a token."""

    query_BKHcP: Tensor
    offset_BKHcQ: Tensor | None


class ColumnReads(NamedTuple):
    """What tokens read as a weighted sum of the memory's columns: P numbers a token."""

    weight_BK1cQ: Tensor
    start_BKHc1: Tensor | None
    share_BKHcn: Tensor
    w_BKHnP: Tensor
    key_BKHnP: Tensor
    offset_BKHcP: Tensor | None


def solve(steps: DeltaSteps, chunk_length: int) -> Solved:
    """Solves for the corrections of every chunk; the last chunk is filled up with empty steps."""
    length = min(chunk_length, max(steps.num_tokens, 1))
    steps = steps.pad(steps.num_tokens + -steps.num_tokens % length)
    key_n = _in_rows(steps.key_BSHRP, length)
    beta_n = _in_rows(steps.beta_BSHR.unsqueeze(-1), length)
    row_c = None if steps.row_BSHP is None else _in_chunks(steps.row_BSHP, length)
    column_c = None if steps.column_BSQ is None else _shared(steps.column_BSQ, length)
    decays = _decays(steps, length)

    error_n = None if steps.value_BSHRQ is None else _in_rows(steps.value_BSHRQ, length)
    if row_c is not None and column_c is not None:
        written_n = ((key_n @ row_c.mT) * decays.write_to_row) @ column_c
        error_n = -written_n if error_n is None else error_n - written_n
    right = _left_of(key_n, decays.start_to_row)
    if error_n is not None:
        right = torch.cat([right, error_n], dim=-1)
    system = _left_of(beta_n * (key_n @ key_n.mT), decays.row_to_row).tril(-1)
    solved = torch.linalg.solve_triangular(system, beta_n * right, upper=False, unitriangular=True)
    num_rows = key_n.size(-1)
    u_n = None if error_n is None else solved[..., num_rows:]
    return Solved(key_n, solved[..., :num_rows], u_n, row_c, column_c, decays)


def compose(solved: Solved) -> ChunkMaps:
    """Every chunk as one affine map."""
    key, w, u, row, column, decays = solved
    left = _left_of(key, decays.row_to_end).mT
    offset = None if u is None else left @ u
    if row is not None and column is not None:
        assert offset is not None  # writes make errors
        offset = offset + _left_of(row, decays.write_to_end).mT @ column
    num_rows, kept = key.size(-1), decays.start_to_end
    if num_rows > key.size(-2):
        return ChunkMaps(None, kept, left, w, offset)
    eye = torch.eye(num_rows, dtype=key.dtype, device=key.device)
    return ChunkMaps(_left_of(eye, kept) - left @ w, None, None, None, offset)


def advance(memory_BHPQ: Tensor, maps: ChunkMaps) -> list[Tensor]:
    """The memory before the first chunk, and after each."""
    memories = [memory_BHPQ]
    for matrix, kept, left, right, offset in _each_chunk(maps):
        before = memories[-1]
        if matrix is not None:
            after = matrix @ before
        else:
            assert left is not None
            assert right is not None
            after = _left_of(before, kept) - left @ (right @ before)
        memories.append(after if offset is None else after + offset)
    return memories


def prepare_query_reads(solved: Solved, query_BSHP: Tensor) -> QueryReads:
    """Everything of a read through queries that does not depend on the memory."""
    key, w, u, row, column, decays = solved
    query_c = _in_chunks(_fill(query_BSHP, solved), decays.length)
    seen_cn = (query_c @ key.mT) * decays.row_to_token
    offset = None if u is None else seen_cn @ u
    if row is not None and column is not None:
        assert offset is not None
        offset = offset + ((query_c @ row.mT) * decays.write_to_token) @ column
    return QueryReads(_left_of(query_c, decays.start_to_token) - seen_cn @ w, offset)


def prepare_column_reads(solved: Solved, weight_BSQ: Tensor) -> ColumnReads:
    """Everything of a weighted sum of columns that does not depend on the memory."""
    key, w, u, row, column, decays = solved
    weight_c = _shared(_fill(weight_BSQ, solved), decays.length)
    offset = None if u is None else ((weight_c @ u.mT) * decays.row_to_token) @ key
    if row is not None and column is not None:
        assert offset is not None
        offset = offset + ((weight_c @ column.mT) * decays.write_to_token) @ row
    # Every tensor of a prepared scan counts examples first.
    share = decays.row_to_token.expand(*key.shape[:3], -1, -1)
    return ColumnReads(weight_c, decays.start_to_token, share, w, key, offset)


def read(memories: list[Tensor], reads: QueryReads | ColumnReads) -> Tensor:
    """``[B, K c, H, ...]``, what tokens read; ``memories`` is what :func:`advance` gave."""
    before_BKHPQ = torch.stack(memories[:-1], dim=1)
    if isinstance(reads, QueryReads):
        out_BKHcX = reads.query_BKHcP @ before_BKHPQ
        offset = reads.offset_BKHcQ
    else:
        start_cP = reads.weight_BK1cQ @ before_BKHPQ.mT
        corrected = ((start_cP @ reads.w_BKHnP.mT) * reads.share_BKHcn) @ reads.key_BKHnP
        out_BKHcX = _left_of(start_cP, reads.start_BKHc1) - corrected
        offset = reads.offset_BKHcP
    out_BKHcX = out_BKHcX if offset is None else out_BKHcX + offset
    return out_BKHcX.transpose(2, 3).flatten(1, 2)


def _decays(steps: DeltaSteps, length: int) -> Decays:
    num_corrections = steps.key_BSHRP.size(3)
    token = torch.arange(length, device=steps.key_BSHRP.device)
    token_of_row = token.repeat_interleave(num_corrections)
    # table[i, j]: what is left after i tokens of what stood there after j <= i of them.
    if steps.decay_BSH is None:
        table = steps.key_BSHRP.new_ones(length + 1, length + 1).tril()
    else:
        decay_c = _in_chunks(steps.decay_BSH.unsqueeze(-1), length)
        table = _products(decay_c.squeeze(-1))
    before, after = table[..., :-1, :], table[..., 1:, :]
    before_row = before[..., token_of_row, :]
    is_past = token_of_row <= token.unsqueeze(1)  # a token's own corrections are
    masks = {
        "write_to_row": before_row[..., 1:],
        "row_to_token": after[..., token_of_row] * is_past,
        "write_to_token": after[..., 1:],
    }
    if steps.decay_BSH is None:
        return Decays(length, None, start_to_row=None, start_to_token=None, row_to_end=None,
                      write_to_end=None, start_to_end=None, **masks)  # fmt: skip
    return Decays(
        length=length,
        row_to_row=before_row[..., token_of_row],
        start_to_row=before_row[..., :1],
        start_to_token=after[..., :1],
        row_to_end=after[..., -1, token_of_row].unsqueeze(-1),
        write_to_end=after[..., -1, 1:].unsqueeze(-1),
        start_to_end=after[..., -1, :1].unsqueeze(-1),
        **masks,
    )


def _left_of(rows: Tensor, share: Tensor | None) -> Tensor:
    """What decays left of rows."""
    return rows if share is None else share * rows


def _products(decay_c: Tensor) -> Tensor:
    """``[..., c]`` -> ``[..., c + 1, c + 1]`` of products over spans.

    Multiplied out, not as differences of sums of logarithms: a decay may be exactly zero, and
    its gradient is then exact, too.
    """
    length = decay_c.size(-1)
    starts = torch.eye(length + 1, dtype=decay_c.dtype, device=decay_c.device)
    rows = [starts[0].expand(*decay_c.shape[:-1], -1)]
    for i in range(length):
        rows.append(rows[-1] * decay_c[..., i : i + 1] + starts[i + 1])
    return torch.stack(rows, dim=-2)


# Layouts ########################################################################


def _in_chunks(tokens_BSHX: Tensor, length: int) -> Tensor:
    """``[B, S, H, X]`` -> ``[B, K, H, c, X]``."""
    return tokens_BSHX.unflatten(1, (-1, length)).transpose(2, 3)


def _in_rows(corrections_BSHRX: Tensor, length: int) -> Tensor:
    """``[B, S, H, R, X]`` -> ``[B, K, H, n, X]``; the corrections of a token stand together."""
    return corrections_BSHRX.unflatten(1, (-1, length)).transpose(2, 3).flatten(3, 4)


def _shared(tokens_BSX: Tensor, length: int) -> Tensor:
    """``[B, S, X]`` -> ``[B, K, 1, c, X]``: the same for all heads."""
    return tokens_BSX.unflatten(1, (-1, length)).unsqueeze(2)


def _fill(tokens: Tensor, solved: Solved) -> Tensor:
    """Empty tokens at the end, as many as the steps were filled up with."""
    return pad_tokens(tokens, solved.key_BKHnP.size(1) * solved.decays.length - tokens.size(1))


def _each_chunk(maps: ChunkMaps) -> list[tuple[Tensor | None, ...]]:
    num_chunks = next(field.size(1) for field in maps if field is not None)
    columns = [[None] * num_chunks if field is None else field.unbind(1) for field in maps]
    return list(zip(*columns, strict=True))
