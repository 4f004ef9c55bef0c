"""Edge attention on general edges, for processors: three passes over edges, no messages.

Every pass owns rows of one side (targets or sources) and visits their edges, so nothing is added
atomically and the result does not depend on the number of threads. Weights stand in edge order,
whichever side a pass owns; `README.md` has the derivation.

Legend: G rows that a pass owns, X rows of the other side, E edges, H heads, D channels a head;
edges of row g are p = ptr[g]..ptr[g + 1] - 1, ``index[p]`` is the other end and ``perm[p]`` the
edge.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from nsm_graph.edge_lists import CompressedEdges
from nsm_graph.ops.cpu import vectors
from nsm_graph.ops.cpu.compiled import OPTIONS, Kernel
from nsm_graph.ops.cpu.threads import run_rows

Array = Any  # numpy arrays in Python, Numba's in kernels


@numba.njit(**OPTIONS)
def _scratch(own_GHD, ptr, first, end):  # type: ignore[no-untyped-def]
    """Room for the numbers of any row, head after head; how many for each head.

    Where rows are short, heads share a vector: 4 or 8 numbers each, else whole vectors.
    """
    most = 0
    for g in range(first, end):
        most = max(most, ptr[g + 1] - ptr[g])
    stride = (most // vectors.LANES + 1) * vectors.LANES
    if most <= 8:
        stride = 4 if most <= 4 else 8
    return np.zeros(own_GHD.shape[1] * stride + vectors.LANES, own_GHD.dtype), stride


@numba.njit(**OPTIONS)
def _softmax(scores, stride, heads, count):  # type: ignore[no-untyped-def]
    """Of the first ``count`` numbers of each head, in place."""
    if stride > 8:
        for h in range(heads):
            vectors.softmax(scores, h * stride, count)
        return
    for h in range(heads):
        for p in range(count, stride):
            scores[h * stride + p] = -np.inf
    if stride == 4:
        vectors.softmax4(scores, heads * stride)
    else:
        vectors.softmax8(scores, heads * stride)


@numba.njit(**OPTIONS)
def _products(out, stride, own_GHD, g, other_XHD, index, start, count):  # type: ignore[no-untyped-def]
    """``own . other`` for the edges of one row, all heads before anybody reads the first.

    A vector that is read right after parts of it were written waits for them.
    """
    last = start + count - 1
    for h in range(own_GHD.shape[1]):
        for p in range(0, count, vectors.DOTS):
            vectors.dots(out, h * stride + p, own_GHD, g, h, other_XHD, index, start + p, last)


@Kernel
def softmax_kernel(
    own_GHD: Array,
    other_XHD: Array,
    ptr: Array,
    index: Array,
    perm: Array,
    bias_EH: Array,
    scale: Any,
    weights_EH: Array,
    first: int,
    end: int,
) -> None:
    """Softmax of ``scale * own . other + bias`` over the edges of each row."""
    factor = own_GHD.dtype.type(scale)
    has_bias = bias_EH.shape[0] > 0
    heads = own_GHD.shape[1]
    scores, stride = _scratch(own_GHD, ptr, first, end)
    for g in range(first, end):
        start, count = ptr[g], ptr[g + 1] - ptr[g]
        _products(scores, stride, own_GHD, g, other_XHD, index, start, count)
        for h in range(heads):
            own = scores[h * stride : h * stride + count]
            column = h if bias_EH.shape[1] > 1 else 0
            for p in range(count):
                own[p] *= factor
            if has_bias:
                for p in range(count):
                    own[p] += bias_EH[perm[start + p], column]
        _softmax(scores, stride, heads, count)
        for h in range(heads):
            own = scores[h * stride : h * stride + count]
            for p in range(count):
                weights_EH[perm[start + p], h] = own[p]


@Kernel
def softmax_backward_kernel(
    own_GHD: Array,
    other_XHD: Array,
    ptr: Array,
    index: Array,
    perm: Array,
    weights_EH: Array,
    grad_EH: Array,
    first: int,
    end: int,
) -> None:
    """Gradient of the scores, where ``own . other`` is the gradient of the weights."""
    terms, stride = _scratch(own_GHD, ptr, first, end)
    for g in range(first, end):
        start, count = ptr[g], ptr[g + 1] - ptr[g]
        _products(terms, stride, own_GHD, g, other_XHD, index, start, count)
        for h in range(own_GHD.shape[1]):
            own = terms[h * stride : h * stride + count]
            delta = own_GHD.dtype.type(0)
            for p in range(count):
                delta += weights_EH[perm[start + p], h] * own[p]
            for p in range(count):
                edge = perm[start + p]
                grad_EH[edge, h] = weights_EH[edge, h] * (own[p] - delta)


@Kernel
def sum_kernel(
    weights_EH: Array,
    other_XHD: Array,
    ptr: Array,
    index: Array,
    perm: Array,
    factor: Any,
    out_GHD: Array,
    first: int,
    end: int,
) -> None:
    """``factor`` times the weighted sum of the other ends of each row's edges."""
    scale = other_XHD.dtype.type(factor)
    for g in range(first, end):
        for h in range(other_XHD.shape[1]):
            vectors.weighted_sum(
                out_GHD, g, h, other_XHD, index, weights_EH, perm,
                ptr[g], ptr[g + 1] - ptr[g], scale,
            )  # fmt: skip


# Passes over tensors ###############################################################


def softmax(
    own: Tensor, other: Tensor, edges: CompressedEdges, bias: Tensor | None, scale: float
) -> Tensor:
    """Weights ``[E, H]`` in edge order, normalised over the edges of each own row."""
    weights = own.new_empty(edges.index.numel(), own.size(1))
    bias = own.new_empty(0, 1) if bias is None else bias
    arguments = (*_arrays(own, other, *edges, bias), float(scale), *_arrays(weights))
    run_rows(softmax_kernel, edges.ptr.numpy(), _work(own), *arguments)
    return weights


def softmax_backward(own: Tensor, other: Tensor, edges: CompressedEdges, weights: Tensor) -> Tensor:
    """Gradient ``[E, H]`` of the scores, in edge order; ``own . other`` is that of the weights."""
    grad = torch.empty_like(weights)
    arguments = _arrays(own, other, *edges, weights, grad)
    run_rows(softmax_backward_kernel, edges.ptr.numpy(), _work(own), *arguments)
    return grad


def weighted_sums(
    weights: Tensor, other: Tensor, edges: CompressedEdges, factor: float = 1.0
) -> Tensor:
    """``factor`` times the weighted sums ``[G, H, D]`` of the other ends."""
    out = other.new_empty(edges.ptr.numel() - 1, *other.shape[1:])
    arguments = (*_arrays(weights, other, *edges), float(factor), *_arrays(out))
    run_rows(sum_kernel, edges.ptr.numpy(), _work(other), *arguments)
    return out


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.contiguous().numpy() for tensor in tensors]


def _work(rows: Tensor) -> int:
    """Multiply-adds of one edge."""
    return rows.size(1) * rows.size(2)
