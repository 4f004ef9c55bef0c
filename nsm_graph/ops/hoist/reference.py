"""Hoisting in plain torch: the definition, with derivatives of any order.

Legend: T tokens, G groups, N states of an example, H heads, C_t channels of tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsm_graph.ops.hoist.inputs import Hoisted, HoistWeights, TokenGroups
from nsm_graph.ops.segment import group_sum


def hoist(x: Tensor, groups: TokenGroups, w: HoistWeights, heads: int) -> Hoisted:
    """Keys, values, routed sums and routing weights: a scan has gradients with respect to these."""
    num_groups, num_states = groups.first.numel(), w.logits.size(0) // heads
    counts = groups.ptr.diff()
    group_T = torch.arange(num_groups).repeat_interleave(counts)
    place_T = torch.arange(group_T.numel()) - groups.ptr[group_T]
    x_TC = x[(groups.first[group_T] + place_T).to(x.device)]
    key = F.linear(x_TC, w.key, w.key_bias)
    value = key if w.value is None else F.linear(x_TC, w.value, w.value_bias)
    logits_THN = F.linear(x_TC, w.logits, w.logits_bias).unflatten(1, (heads, num_states))
    weights_TN = logits_THN.softmax(2).mean(1)
    # Row g N + n sums the tokens of group g by their weights for state n.
    row_TN = group_T.to(x.device).unsqueeze(1) * num_states + torch.arange(
        num_states, device=x.device
    )
    messages = weights_TN.unsqueeze(2) * x_TC.unsqueeze(1)
    sums = group_sum(messages.flatten(0, 1), row_TN.flatten(), num_groups * num_states)
    order = torch.argsort(row_TN.flatten(), stable=True)  # by group, state and token
    weights = weights_TN.flatten()[order]
    return Hoisted(key, value, F.linear(sums, w.out, w.out_bias), weights)
