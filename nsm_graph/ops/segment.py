"""Sums and softmaxes over groups of edges: the two primitives of every reference path.

torch-scatter serves the sums where it is installed and may be used (eager mode, no second
derivative wanted); everything else is PyG's own code on plain torch.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch_geometric.utils import scatter, softmax

from nsm_graph.relation import CompressedEdges

HAS_TORCH_SCATTER = find_spec("torch_scatter") is not None


def group_softmax(scores: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Softmax of ``[E, ...]`` over the edges of each group, stabilised by the group's maximum."""
    return softmax(scores, group, num_nodes=num_groups)


def masked_group_softmax(scores: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """The same, where -inf means absent; a group of absent edges gives zeros, never NaN."""
    is_absent = scores == -torch.inf
    finite = scores.masked_fill(is_absent, torch.finfo(scores.dtype).min)
    return group_softmax(finite, group, num_groups).masked_fill(is_absent, 0.0)


def group_sum(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sum of ``[E, ...]`` over the edges of each group; empty groups give zero."""
    return scatter(values, group, dim=0, dim_size=num_groups, reduce="sum")


def group_sum_sorted(values: Tensor, edges: CompressedEdges) -> Tensor:
    """The same through torch-scatter's ``segment_csr``, over edges sorted by group."""
    from torch_scatter import segment_csr

    return segment_csr(values.index_select(0, edges.perm), edges.ptr.long(), reduce="sum")
