"""Edge attention with torch-scatter's ``segment_csr`` for the sum into targets.

The same definition as `reference.py` with one step replaced: messages are gathered in target order
and summed by segment instead of scattered. Eager only, first derivatives only.
"""

from __future__ import annotations

from torch import Tensor

from nsm_graph.ops.edge_attention.reference import edge_attention_weights
from nsm_graph.ops.segment import group_sum_sorted
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
    weights_EH = edge_attention_weights(
        q_NHD, k_MHD, relation, bias_EH=bias_EH, normalise=normalise, scale=scale
    )
    messages_EHD = v_MHD[relation.edge_index[0]] * weights_EH.unsqueeze(-1)
    return group_sum_sorted(messages_EHD, relation.csr)
