"""Edge attention on general edges as one operation that compilers and autograd know.

The passes over edges are a device's own kernels (`cpu.py`, `gpu.py`); here is what devices
share: one operation, its gradient and, through the reference, its second derivative. For backward
it keeps its inputs and what tells the weights: on a CPU the weights themselves, one per edge and
head; on a GPU two numbers per group and head.

Legend: N targets, M sources, E edges, H heads, D channels a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.edge_lists import CompressedEdges
from nsm_graph.ops.edge_attention import reference
from nsm_graph.ops.segment import widen
from nsm_graph.relation import Relation


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
    inputs = [q_NHD, k_MHD, v_MHD, bias_EH]
    if not _on_gpu(q_NHD):
        # 16-bit values are summed in float32, as everywhere. A GPU widens what it has gathered.
        inputs = [None if x is None else widen(x) for x in inputs]
    edges = [*relation.csr, *relation.csc]
    out_NHD, _ = _attend(*inputs, *edges, normalise == "source", scale, *_degrees(relation))
    return out_NHD.to(q_NHD.dtype)


def _on_gpu(x: Tensor) -> bool:
    """Whether Triton's kernels serve a tensor; Numba's do if not."""
    return x.is_cuda


def _degrees(relation: Relation) -> tuple[int, int]:
    """Edges of every target and of every source, where all are known to have as many; else 0."""
    if not relation.is_uniform:
        return relation.degree or 0, 0
    assert relation.sources is not None
    assert relation.targets is not None
    return relation.sources.max_count, relation.targets.max_count


# The operation #####################################################################


@torch.library.custom_op("nsm_graph::edge_attention", mutates_args=(), device_types=("cpu", "cuda"))
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
    row_degree: int = 0,
    column_degree: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output ``[N, H, D]`` and what tells the weights; rows are targets, columns are sources.

    On a CPU those are the weights ``[E, H]``, on a GPU what the softmax of a group found
    ``[G, 2, H]``. A degree says how many edges every row (column) has, or 0 where that differs.
    """
    rows = CompressedEdges(row_ptr, row_index, row_perm)
    columns = CompressedEdges(column_ptr, column_index, column_perm)
    if _on_gpu(q):
        from nsm_graph.ops.edge_attention import gpu

        degrees = row_degree, column_degree
        return gpu.forward(q, k, v, bias, rows, columns, by_source, scale, degrees)
    from nsm_graph.ops.edge_attention import cpu

    if by_source:
        weights = cpu.softmax(k, q, columns, bias, scale)
    else:
        weights = cpu.softmax(q, k, rows, bias, scale)
    return cpu.weighted_sums(weights, v, rows), weights


@_attend.register_fake
def _(q, k, v, bias, *edges_and_options):  # type: ignore[no-untyped-def]
    num_edges, by_source = edges_and_options[1].size(0), edges_and_options[6]
    if not _on_gpu(q):
        return q.new_empty(q.shape), q.new_empty(num_edges, q.size(1))
    groups = k if by_source else q
    stats = groups.new_empty(groups.size(0), 2, groups.size(1), dtype=widen(groups).dtype)
    return q.new_empty(q.shape), stats


@torch.library.custom_op(
    "nsm_graph::edge_attention_backward", mutates_args=(), device_types=("cpu", "cuda")
)
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    row_ptr: Tensor,
    row_index: Tensor,
    row_perm: Tensor,
    column_ptr: Tensor,
    column_index: Tensor,
    column_perm: Tensor,
    by_source: bool,
    scale: float,
    row_degree: int = 0,
    column_degree: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and, per edge and head, of the scores: of the bias, if there is one."""
    rows = CompressedEdges(row_ptr, row_index, row_perm)
    columns = CompressedEdges(column_ptr, column_index, column_perm)
    if _on_gpu(q):
        from nsm_graph.ops.edge_attention import gpu

        edges = rows, columns, by_source, scale, (row_degree, column_degree)
        return gpu.backward(grad, q, k, v, bias, kept, *edges)
    from nsm_graph.ops.edge_attention import cpu

    # The gradient of a weight is the product of its two ends, as a score is.
    if by_source:
        scores = cpu.softmax_backward(v, grad, columns, kept)
    else:
        scores = cpu.softmax_backward(grad, v, rows, kept)
    dq = cpu.weighted_sums(scores, k, rows, scale)
    dk = cpu.weighted_sums(scores, q, columns, scale)
    return dq, dk, cpu.weighted_sums(kept, grad, columns), scores


@_attend_backward.register_fake
def _(grad, q, k, v, bias, kept, *edges_and_options):  # type: ignore[no-untyped-def]
    # Nobody asks a GPU for the gradients of scores without a bias: it does not store them.
    num_edges = 0 if _on_gpu(q) and bias is None else edges_and_options[1].size(0)
    return *(x.new_empty(x.shape) for x in (q, k, v)), kept.new_empty(num_edges, q.size(1))


# Its derivatives ###################################################################


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.by_source, ctx.scale, ctx.row_degree, ctx.column_degree = inputs
    _, kept = output
    ctx.mark_non_differentiable(kept)
    ctx.save_for_backward(*tensors, kept)


def _first_derivative(ctx, grad, _):  # type: ignore[no-untyped-def]
    q, k, v, bias, *edges, kept = ctx.saved_tensors
    options = ctx.by_source, ctx.scale, ctx.row_degree, ctx.column_degree
    dq, dk, dv, scores = _attend_backward(grad, q, k, v, bias, kept, *edges, *options)
    if bias is not None:
        scores = scores if bias.size(1) > 1 else scores.sum(1, keepdim=True)
        scores = scores.to(bias.dtype)
    return dq, dk, dv, None if bias is None else scores, *[None] * 10


_attend.register_autograd(_first_derivative, setup_context=_keep)


def _keep_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.by_source, ctx.scale, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _second_derivative(ctx, *grads):  # type: ignore[no-untyped-def]
    grad, q, k, v, bias, _, *edges = ctx.saved_tensors
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
        inner, bias_EH = given[1:4], None
        if bias is not None:
            # A bias that every head shares has one gradient for each head here.
            inner.append(q.new_zeros(bias.size(0), q.size(1), dtype=widen(q).dtype))
            bias_EH = inner[3].requires_grad_() + given[4]
        q, k, v = (widen(x) for x in given[1:4])
        out = reference.edge_attention(
            q, k, v, relation, bias_EH=bias_EH, normalise=normalise, scale=ctx.scale
        )
        first = torch.autograd.grad(out, inner, widen(given[0]), create_graph=True)
        second = torch.autograd.grad(
            first, given, grads[: len(inner)], create_graph=is_wanted, allow_unused=True
        )
    bias_grad = second[4] if bias is not None else None
    return *second[:4], bias_grad, *[None] * 11


_attend_backward.register_autograd(_second_derivative, setup_context=_keep_backward)


def _relation_of(csr: CompressedEdges, size: tuple[int, int]) -> Relation:
    """The relation that was compressed into rows of targets."""
    targets = torch.arange(size[1], device=csr.ptr.device)
    dst = targets.repeat_interleave(csr.ptr.diff().long(), output_size=csr.index.numel())
    edge_index = torch.empty(2, csr.index.numel(), dtype=torch.long, device=dst.device)
    edge_index[0, csr.perm] = csr.index.long()
    edge_index[1, csr.perm] = dst
    return Relation(edge_index, size)
