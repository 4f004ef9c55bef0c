"""Edge attention by gather, softmax and scatter: the definition every other backend must equal.

Legend: N targets, M sources, E edges, H heads, D channels a head.
"""

from __future__ import annotations

from torch import Tensor

from nsm_graph.ops.segment import group_sum, masked_group_softmax
from nsm_graph.relation import Relation


def edge_attention_weights(
    q_NHD: Tensor,
    k_MHD: Tensor,
    relation: Relation,
    *,
    bias_EH: Tensor | None,
    normalise: str,
    scale: float,
) -> Tensor:
    """Softmax of the scaled scores over the edges that share a target (or a source), ``[E, H]``."""
    src, dst = relation.edge_index
    scores_EH = (q_NHD[dst] * k_MHD[src]).sum(-1) * scale
    if bias_EH is not None:
        scores_EH = scores_EH + bias_EH
    if normalise == "target":
        return masked_group_softmax(scores_EH, dst, relation.num_dst)
    return masked_group_softmax(scores_EH, src, relation.num_src)


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
    weights_EH = edge_attention_weights(
        q_NHD, k_MHD, relation, bias_EH=bias_EH, normalise=normalise, scale=scale
    )
    src, dst = relation.edge_index
    return group_sum(v_MHD[src] * weights_EH.unsqueeze(-1), dst, relation.num_dst)
