"""From what tokens are projected to, to the steps that they take.

Legend: see `steps.py`; a row of numbers for each token stands as `cpu.arrays.Layout` says.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from nsm_graph.ops.delta_scan.cpu.arrays import Layout
from nsm_graph.ops.delta_scan.steps import DeltaSteps

#: How far a gate overshoots the interval [0, 1] before it is cut off there.
STRETCH = 0.5


def hard_gate(logits: Tensor, stretch: float | Tensor = STRETCH) -> Tensor:
    r"""Closes and opens exactly, if stretched: :math:`\mathrm{clamp}((1+2a) \sigma(z) - a, 0, 1)`.

    A million tokens that each leak a thousandth leave nothing; a gate at exactly 0 leaks nothing.
    """
    gate = logits.sigmoid()
    # In this form half open is 0.5 whatever the precision of the stretch.
    return (gate + stretch * (2 * gate - 1)).clamp(0, 1)


def unit(x: Tensor) -> Tensor:
    """Rows of norm 1; a row of norm zero stays zero, and its gradient is zero, too."""
    # Brought to size one first, by a factor that the result does not depend on: the square of a
    # short row would be no number that the precision holds.
    size = x.detach().abs().amax(-1, keepdim=True)
    is_zero = size < torch.finfo(x.dtype).tiny
    x = x / size.masked_fill(is_zero, 1.0)
    square = x.square().sum(-1, keepdim=True).masked_fill(is_zero, 1.0)
    return (x * square.rsqrt()).masked_fill(is_zero, 0.0)


class TokenSteps(NamedTuple):
    """The steps of both kinds of heads; None where a scan has none of a kind."""

    transition: DeltaSteps | None  #: of memories [D, N]
    memory: DeltaSteps | None  #: of memories [N, D]
    query: Tensor | None  #: [B, S, M, N], of memory heads


def steps_of(rows_BSX: Tensor, layout: Layout, stretch: float, weights_BSN: Tensor) -> TokenSteps:
    """The steps of tokens whose projections stand as the layout says."""
    heads, recalling, width = layout.transition, layout.memory, layout.width
    firsts = (0, *layout[layout._fields.index("memory_key") :])  # of each part, and the end
    sizes = [end - first for first, end in pairwise(firsts)]
    key, memory_key, query, value, memory_value, *gates = rows_BSX.split(sizes, dim=-1)
    beta, decay, write, memory_beta = (hard_gate(gate, stretch) for gate in gates)
    transition = memory = entries = None
    if heads > 0:
        key = unit(key.unflatten(-1, (heads, layout.reflections, width)))
        beta = 2 * beta.unflatten(-1, (heads, layout.reflections))
        transition = DeltaSteps(key, beta, None, decay if layout.decays else None)
        if layout.writes:
            row = write.unsqueeze(-1) * value.unflatten(-1, (heads, width))
            transition = transition._replace(row_BSHP=row, column_BSQ=weights_BSN)
    if recalling > 0:
        shape = (recalling, layout.num_states)
        held = memory_value.unflatten(-1, (recalling, 1, width))
        own = unit(memory_key.unflatten(-1, shape)).unsqueeze(3)
        memory = DeltaSteps(own, memory_beta.unsqueeze(-1), held)
        entries = unit(query.unflatten(-1, shape))
    return TokenSteps(transition, memory, entries)
