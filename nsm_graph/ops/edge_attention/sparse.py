"""Edge attention on general edges as one operation that compilers and autograd know.

The passes over edges are a device's own kernels (`cpu.py`); here is what every device shares: how
passes make the operation and its gradient. Nothing is kept for backward but the inputs and one
weight per edge and head. A second derivative goes through the reference.

Legend: N targets, M sources, E edges, H heads, D channels a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.ops.edge_attention import reference
from nsm_graph.ops.segment import widen
from nsm_graph.relation import CompressedEdges, Relation


def edge_attention(
    q_NHD: Tensor,
    k_MHD: Tensor,
    v_MHD: Tensor,
    relation: Relation,
    *,
    bias_EH: Tensor | None,
    normalise: str,
    scale: float,
) -> Tensor:
    """Weighted sum of the values into their targets, ``[N, H, D]``."""
    # 16-bit values are summed in float32, as everywhere.
    inputs = [widen(q_NHD), widen(k_MHD), widen(v_MHD)]
    bias = None if bias_EH is None else widen(bias_EH)
    edges = [*relation.csr, *relation.csc]
    out_NHD, _ = _attend(*inputs, bias, *edges, normalise == "source", scale)
    return out_NHD.to(q_NHD.dtype)


# The operation #####################################################################


@torch.library.custom_op("nsm_graph::edge_attention", mutates_args=(), device_types="cpu")
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    row_ptr: Tensor,
    row_index: Tensor,
    row_perm: Tensor,
    column_ptr: Tensor,
    column_index: Tensor,
    column_perm: Tensor,
    by_source: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output ``[N, H, D]`` and weights ``[E, H]``; rows are targets, columns are sources."""
    from nsm_graph.ops.edge_attention import cpu

    rows = CompressedEdges(row_ptr, row_index, row_perm)
    columns = CompressedEdges(column_ptr, column_index, column_perm)
    if by_source:
        weights = cpu.softmax(k, q, columns, bias, scale)
    else:
        weights = cpu.softmax(q, k, rows, bias, scale)
    return cpu.weighted_sums(weights, v, rows), weights


@_attend.register_fake
def _(q, k, v, bias, *edges_and_options):  # type: ignore[no-untyped-def]
    num_edges = edges_and_options[1].size(0)
    return q.new_empty(q.shape), q.new_empty(num_edges, q.size(1))


@torch.library.custom_op("nsm_graph::edge_attention_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    row_ptr: Tensor,
    row_index: Tensor,
    row_perm: Tensor,
    column_ptr: Tensor,
    column_index: Tensor,
    column_perm: Tensor,
    by_source: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, per edge and head, of the scores."""
    from nsm_graph.ops.edge_attention import cpu

    rows = CompressedEdges(row_ptr, row_index, row_perm)
    columns = CompressedEdges(column_ptr, column_index, column_perm)
    # The gradient of a weight is the product of its two ends, as a score is.
    if by_source:
        scores = cpu.softmax_backward(v, grad, columns, weights)
    else:
        scores = cpu.softmax_backward(grad, v, rows, weights)
    dq = cpu.weighted_sums(scores, k, rows, scale)
    dk = cpu.weighted_sums(scores, q, columns, scale)
    return dq, dk, cpu.weighted_sums(weights, grad, columns), scores


@_attend_backward.register_fake
def _(grad, q, k, v, bias, weights, *edges_and_options):  # type: ignore[no-untyped-def]
    return tuple(x.new_empty(x.shape) for x in (q, k, v, weights))


# Its derivatives ###################################################################


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.by_source, ctx.scale = inputs
    _, weights = output
    ctx.mark_non_differentiable(weights)
    ctx.save_for_backward(*tensors, weights)


def _first_derivative(ctx, grad, _):  # type: ignore[no-untyped-def]
    q, k, v, bias, *edges, weights = ctx.saved_tensors
    dq, dk, dv, scores = _attend_backward(
        grad, q, k, v, bias, weights, *edges, ctx.by_source, ctx.scale
    )
    if bias is not None:
        scores = scores if bias.size(1) > 1 else scores.sum(1, keepdim=True)
    return dq, dk, dv, None if bias is None else scores, *[None] * 8


_attend.register_autograd(_first_derivative, setup_context=_keep)


def _keep_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.by_source, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _second_derivative(ctx, *grads):  # type: ignore[no-untyped-def]
    grad, q, k, v, bias, weights, *edges = ctx.saved_tensors
    is_wanted = torch.is_grad_enabled()
    normalise = "source" if ctx.by_source else "target"
    with torch.enable_grad():
        given = [grad, q, k, v] if bias is None else [grad, q, k, v, bias]
        # Views: what one input makes of another belongs to the caller's graph, not to this one.
        given = [
            x.view_as(x) if is_wanted and x.requires_grad else x.detach().requires_grad_()
            for x in given
        ]
        relation = _relation_of(CompressedEdges(*edges[:3]), (k.size(0), q.size(0)))
        # A bias that every head shares has one gradient for each head here.
        each = torch.zeros_like(weights).requires_grad_()
        bias_EH = each if bias is None else each + given[4]
        q, k, v = given[1:4]
        out = reference.edge_attention(
            q, k, v, relation, bias_EH=bias_EH, normalise=normalise, scale=ctx.scale
        )
        first = torch.autograd.grad(out, [q, k, v, each], given[0], create_graph=True)
        second = torch.autograd.grad(first, given, grads, create_graph=is_wanted, allow_unused=True)
    bias_grad = second[4] if bias is not None else None
    return *second[:4], bias_grad, *[None] * 9


_attend_backward.register_autograd(_second_derivative, setup_context=_keep_backward)


def _relation_of(csr: CompressedEdges, size: tuple[int, int]) -> Relation:
    """The relation that was compressed into rows of targets."""
    targets = torch.arange(size[1], device=csr.ptr.device)
    dst = targets.repeat_interleave(csr.ptr.diff().long(), output_size=csr.index.numel())
    edge_index = torch.empty(2, csr.index.numel(), dtype=torch.long, device=dst.device)
    edge_index[0, csr.perm] = csr.index.long()
    edge_index[1, csr.perm] = dst
    return Relation(edge_index, size)
