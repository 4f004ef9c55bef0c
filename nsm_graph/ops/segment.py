"""Sums and softmaxes over groups of edges: the two primitives of every reference path.

They are PyG's own code on plain torch; 16-bit values are summed in float32, as torch's own softmax
and matrix products do. torch-scatter serves the sum over sorted edges, where it is installed and
the backend that needs it is forced.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch_geometric.utils import scatter, softmax

from nsm_graph.edge_lists import CompressedEdges

HAS_TORCH_SCATTER = find_spec("torch_scatter") is not None


def group_softmax(scores: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Softmax of ``[E, ...]`` over the edges of each group, stabilised by the group's maximum."""
    return softmax(widen(scores), group, num_nodes=num_groups).to(scores.dtype)


def masked_group_softmax(scores: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """The same, where -inf means absent; a group of absent edges gives zeros, never NaN."""
    is_absent = scores == -torch.inf
    finite = scores.masked_fill(is_absent, torch.finfo(scores.dtype).min)
    return group_softmax(finite, group, num_groups).masked_fill(is_absent, 0.0)


def group_sum(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sum of ``[E, ...]`` over the edges of each group; empty groups give zero."""
    total = scatter(widen(values), group, dim=0, dim_size=num_groups, reduce="sum")
    return total.to(values.dtype)


def group_sum_sorted(values: Tensor, edges: CompressedEdges) -> Tensor:
    """The same through torch-scatter's ``segment_csr``, over edges sorted by group."""
    from torch_scatter import segment_csr

    values_sorted = widen(values).index_select(0, edges.perm)
    return segment_csr(values_sorted, edges.ptr.long(), reduce="sum").to(values.dtype)


def widen(values: Tensor) -> Tensor:
    """16-bit values as float32; others as they are."""
    # In 16 bits a long sum stops growing once its terms fall below half a unit in the last place.
    return values.float() if values.is_floating_point() and values.itemsize < 4 else values
