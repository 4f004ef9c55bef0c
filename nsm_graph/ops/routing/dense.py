"""Routing on the dense view of a complete relation: one softmax and one batched product.

Legend: T tokens in all, N states in all, K columns, H heads, C channels; of one example (padded):
L tokens, n states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.relation import Relation


def route(
    logits_THK: Tensor,
    x_TC: Tensor,
    relation: Relation,
    column_N: Tensor | None,
    bias_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Routed sums ``[N, C]`` and head-averaged weights ``[E]``."""
    sources, targets = relation.sources, relation.targets
    assert sources is not None
    assert targets is not None
    if relation.num_edges == 0:
        # Zero, yet connected to both inputs (and to no value of them).
        empty = logits_THK[:0].sum() + x_TC[:0].sum()
        empty = empty if bias_E is None else empty + bias_E.sum()
        return x_TC.new_zeros(relation.num_dst, x_TC.size(1)) + empty, x_TC.new_zeros(0) + empty
    logits_BLHK = sources.pad(logits_THK)
    scores_BLHn = logits_BLHK
    if column_N is not None:
        column_B11n = targets.pad(column_N)[:, None, None, :]
        shape = (-1, logits_BLHK.size(1), logits_BLHK.size(2), -1)
        scores_BLHn = logits_BLHK.gather(3, column_B11n.expand(shape))
    if bias_E is not None:
        scores_BLHn = scores_BLHn + relation.to_dense(bias_E).transpose(1, 2).unsqueeze(2)
    if not targets.is_uniform:
        is_padding_Bn = ~targets.mask()
        # An example without states has nothing to normalise over; its row is dropped by unpad.
        is_padding_Bn = is_padding_Bn & targets.mask().any(-1, keepdim=True)
        scores_BLHn = scores_BLHn.masked_fill(is_padding_Bn[:, None, None, :], -torch.inf)
    weights_BLn = scores_BLHn.softmax(3).mean(2)
    routed_BnC = weights_BLn.transpose(1, 2) @ sources.pad(x_TC)
    weights_E = relation.from_dense(weights_BLn.transpose(1, 2))
    return targets.unpad(routed_BnC), weights_E
