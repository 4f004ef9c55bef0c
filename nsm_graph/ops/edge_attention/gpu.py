"""Edge attention on general edges, for GPUs: fused passes over edges, no messages, no weights.

Forward keeps two numbers for each group and head, and backward computes the weights anew. What a
pass does is in `triton.py`, why in `README.md`; here is which passes run on which tensors.

Legend: N targets, M sources, G groups (targets or sources), E edges, H heads, D channels a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsm_graph.edge_lists import CompressedEdges
from nsm_graph.ops.edge_attention import triton

#: Blocks of edges that one program visits at most.
MAX_BLOCKS = 32
#: Numbers of one gathered block that a warp holds in its registers, and warps of a program.
PER_WARP, MAX_WARPS = 1024, 4


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    rows: CompressedEdges,
    columns: CompressedEdges,
    by_source: bool,
    scale: float,
    degrees: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """Output ``[N, H, D]`` and what the softmax found of each group, ``[G, 2, H]``.

    Those are the highest score and one over the sum of exponentials. Rows are targets, columns are
    sources. ``degrees`` says how many edges every row has, and every column, where all have as
    many; 0 where they do not, or nobody knows.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    groups = k if by_source else q
    sums = torch.promote_types(q.dtype, torch.float32)
    stats = groups.new_empty(groups.size(0), 2, groups.size(1), dtype=sums)
    out = torch.empty_like(q)
    if by_source:
        _forward_pass(k, q, None, bias, columns, degrees[1], scale, stats, None, True)
    _forward_pass(q, k, v, bias, rows, degrees[0], scale, stats, out, not by_source)
    return out, stats


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    stats: Tensor,
    rows: CompressedEdges,
    columns: CompressedEdges,
    by_source: bool,
    scale: float,
    degrees: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, per edge and head, of the bias: ``[0, H]`` if there is none."""
    grad, q, k, v = grad.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    delta = stats.new_empty(stats.size(0), stats.size(2))
    scores = stats.new_empty(0 if bias is None else bias.size(0), q.size(1))

    def by_target(owns_groups: bool) -> None:
        given = (q, grad, k, v, bias, rows, degrees[0], scale)
        _backward_pass(*given, stats, delta, dq, None, scores, owns_groups)

    if not by_source:
        by_target(True)
    given = (k, v, q, grad, bias, columns, degrees[1], scale)
    _backward_pass(*given, stats, delta, dk, dv, scores, by_source)
    if by_source:
        by_target(False)
    return dq, dk, dv, scores


def _forward_pass(
    own: Tensor,
    other: Tensor,
    value: Tensor | None,
    bias: Tensor | None,
    edges: CompressedEdges,
    degree: int,
    scale: float,
    stats: Tensor,
    out: Tensor | None,
    owns_groups: bool,
) -> None:
    plan = _plan(own, edges, degree)
    piece_stats = stats.new_empty(plan.num_places, *stats.shape[1:])
    pieces = stats.new_empty(plan.num_places if out is not None else 0, *own.shape[1:])
    does = {"OWNS_GROUPS": owns_groups, "SUMS": out is not None}
    sizes = own.size(0), edges.index.numel()
    with torch.cuda.device_of(own):
        if min(plan.grid) > 0:
            triton.forward_kernel[plan.grid](
                own, other, value, bias, *edges, stats, out, piece_stats, pieces,
                *sizes, plan.num_places, degree,
                SCALE=scale, BIAS_HEADS=_bias_heads(bias), **does, **plan.options,
            )  # fmt: skip
        if min(plan.merge_grid) > 0:
            triton.merge_forward_kernel[plan.merge_grid](
                edges.ptr, stats, out, piece_stats, pieces, *sizes, degree,
                **does, **plan.merge_options,
            )  # fmt: skip


def _backward_pass(
    own_x: Tensor,
    own_y: Tensor,
    other_x: Tensor,
    other_y: Tensor,
    bias: Tensor | None,
    edges: CompressedEdges,
    degree: int,
    scale: float,
    stats: Tensor,
    delta: Tensor,
    grad_x: Tensor,
    grad_y: Tensor | None,
    grad_bias: Tensor,
    owns_groups: bool,
) -> None:
    plan = _plan(own_x, edges, degree)
    piece_delta = stats.new_empty(plan.num_places, own_x.size(1))
    pieces = stats.new_empty(plan.num_places, 3, *own_x.shape[1:])
    does = {"SCALE": scale, "OWNS_GROUPS": owns_groups, "SUMS": grad_y is not None}
    sizes = own_x.size(0), edges.index.numel()
    with torch.cuda.device_of(own_x):
        if min(plan.grid) > 0:
            triton.backward_kernel[plan.grid](
                own_x, own_y, other_x, other_y, bias, *edges, stats, delta,
                grad_x, grad_y, grad_bias, piece_delta, pieces, *sizes, plan.num_places, degree,
                BIAS_HEADS=_bias_heads(bias), **does, **plan.options,
            )  # fmt: skip
        if min(plan.merge_grid) > 0:
            triton.merge_backward_kernel[plan.merge_grid](
                edges.ptr, delta, grad_x, grad_y, piece_delta, pieces, *sizes, degree,
                **does, **plan.merge_options,
            )  # fmt: skip


class _Plan(NamedTuple):
    """How a pass over the rows of one side is shared out."""

    num_places: int
    grid: tuple[int, int]
    merge_grid: tuple[int, int]
    options: dict[str, Any]  #: what its kernel is compiled for
    merge_options: dict[str, Any]


def _plan(own: Tensor, edges: CompressedEdges, degree: int) -> _Plan:
    """What sizes alone tell: nothing is read back from the device, and nothing is timed.

    Other blocks would add in another order: results would depend on what was fast that day.
    """
    num_rows, heads, channels = own.shape
    num_edges = edges.index.numel()
    block_d = _next_power(channels)
    block_h = min(_next_power(heads), max(1, 256 // block_d))
    # As many edges at once as rows have on average, if registers can hold them.
    width = block_h * block_d
    most = min(max(PER_WARP * MAX_WARPS // width, 1), 128)
    mean = degree or _ceil_div(num_edges, max(num_rows, 1))
    block_e = min(max(_next_power(mean), 4), most)
    slice_ = MAX_BLOCKS * block_e
    num_slices = _ceil_div(num_edges, slice_) if (degree or num_edges) > slice_ else 0
    common = {
        "H": heads,
        "D": channels,
        "BLOCK_H": block_h,
        "BLOCK_D": block_d,
        "SLICE": slice_,
        "FIXED": degree > 0,
        "enable_fp_fusion": True,
    }
    warps = min(max(block_e * width // PER_WARP, 1), MAX_WARPS)
    head_blocks = _ceil_div(heads, block_h)
    return _Plan(
        2 * num_slices,
        (2 * num_slices + num_rows, head_blocks),
        (num_slices, head_blocks),
        {**common, "BLOCK_E": block_e, "num_warps": warps},
        {**common, "BLOCK_E": most, "num_warps": MAX_WARPS},
    )


def _bias_heads(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.size(1)


def _ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def _next_power(x: int) -> int:
    """The next power of 2: blocks have such sizes, and masks."""
    return 1 << (x - 1).bit_length()
