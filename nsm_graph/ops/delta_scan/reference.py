"""The delta scan token by token: the definition. Legend: see `steps.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.ops.delta_scan.steps import DeltaSteps


def delta_scan(
    memory_BHPQ: Tensor,
    steps: DeltaSteps,
    query_BSHP: Tensor | None = None,
    weight_BSQ: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The memory after all tokens, and what each token reads from it right after its own step."""
    memory, reads = memory_BHPQ, []
    for i in range(steps.num_tokens):
        for r in range(steps.key_BSHRP.size(3)):
            key_BHP = steps.key_BSHRP[:, i, :, r]
            error_BHQ = -torch.einsum("bhp,bhpq->bhq", key_BHP, memory)
            if steps.value_BSHRQ is not None:
                error_BHQ = error_BHQ + steps.value_BSHRQ[:, i, :, r]
            if steps.gate_BSQ is not None:
                error_BHQ = error_BHQ * steps.gate_BSQ[:, i, None]
            step_BHP = key_BHP * steps.beta_BSHR[:, i, :, r, None]
            memory = memory + step_BHP.unsqueeze(-1) * error_BHQ.unsqueeze(-2)
        if steps.decay_BSH is not None:
            memory = memory * steps.decay_BSH[:, i, :, None, None]
        if steps.row_BSHP is not None and steps.column_BSQ is not None:
            memory = memory + steps.row_BSHP[:, i, :, :, None] * steps.column_BSQ[:, i, None, None]
        if query_BSHP is not None:
            reads.append(torch.einsum("bhp,bhpq->bhq", query_BSHP[:, i], memory))
        elif weight_BSQ is not None:
            reads.append(torch.einsum("bq,bhpq->bhp", weight_BSQ[:, i], memory))
    if reads:
        return memory, torch.stack(reads, 1)
    if query_BSHP is None and weight_BSQ is None:
        return memory, None
    num_examples, heads, rows, columns = memory.shape
    width = columns if query_BSHP is not None else rows
    return memory, memory.new_zeros(num_examples, 0, heads, width)
