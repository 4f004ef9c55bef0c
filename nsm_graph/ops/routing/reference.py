"""Routing by gather, softmax and scatter over edges: the definition.

Legend: T tokens, N states, H heads, K columns of the logit table, E edges, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.ops.segment import group_softmax, group_sum
from nsm_graph.relation import Relation


def route(
    logits_THK: Tensor,
    x_TC: Tensor,
    relation: Relation,
    column_N: Tensor | None,
    bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Routed sums ``[N, C]`` and head-averaged weights ``[E]``."""
    src, dst = relation.edge_index
    if column_N is None:
        column_N = torch.arange(relation.num_dst, device=src.device) % logits_THK.size(2)
    scores_EH = logits_THK[src, :, column_N[dst]]
    if bias_E is not None:
        scores_EH = scores_EH + bias_E.unsqueeze(1)
    weights_E = group_softmax(scores_EH, src, relation.num_src).mean(1)
    return group_sum(x_TC[src] * weights_E.unsqueeze(1), dst, relation.num_dst), weights_E
