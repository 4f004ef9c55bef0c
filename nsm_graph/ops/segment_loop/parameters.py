"""A cell's parameters as the kernels want them, and their gradients as they came.

Parameters come as ``torch.nn.Linear`` keeps them. The kernels want matrices both ways round, the
scale of the scores inside the query, and inputs in the order in which they stand in a row of
`cpu.arrays.Made.x`: gated, kept, update, reset * gated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.ops.segment_loop.cpu.arrays import Weights
from nsm_graph.ops.segment_loop.inputs import LoopWeights


def turn(weights: LoopWeights, heads: int, talk_heads: int) -> list[Tensor]:
    """The kernel's form: ``[in, out]``, scores scaled, inputs in the order of a row.

    What the cell lacks is empty.
    """
    query, query_bias, out, out_bias, gates, gates_bias = (x.detach() for x in weights[:6])
    channels, gated = query.size(0), weights.gated
    kept = channels - gated
    factor = (channels // heads) ** -0.5
    candidate = [query.new_empty([0] * dims) for dims in (2, 1)]
    if weights.candidate is not None and weights.candidate_bias is not None:
        reset, update, rest = weights.candidate.detach().split([gated, channels, kept], dim=1)
        candidate = [torch.cat([rest, update, reset], dim=1), weights.candidate_bias.detach()]
    talk = [query.new_empty([0] * dims) for dims in (2, 1, 2, 1, 1, 1)]
    if weights.qkv is not None:
        qkv, qkv_bias, *others = (x.detach() for x in weights[8:] if x is not None)
        factors = _score_factors(qkv_bias, talk_heads)
        talk = [qkv * factors.unsqueeze(1), qkv_bias * factors, *others]
    first, last = query.split([kept, gated], dim=1)
    state, update, rest = gates.split([gated, channels, kept], dim=1)
    turned = [
        torch.cat([last, first], dim=1) * factor, query_bias * factor, out, out_bias,
        torch.cat([state, rest, update], dim=1), gates_bias, *candidate, *talk,
    ]  # fmt: skip
    return [x.t() if x.dim() == 2 else x for x in turned]


def turn_back(grads: list[Tensor], gated: int, heads: int, talk_heads: int) -> list[Tensor | None]:
    """Gradients of the parameters as they came."""
    g = Weights(*(x.t().contiguous() if x.dim() == 2 else x for x in grads))
    channels = g.query.size(0)
    kept = channels - gated
    factor = (channels // heads) ** -0.5
    candidate: list[Tensor | None] = [None, None]
    if g.candidate.numel() > 0:
        rest, update, reset = g.candidate.split([kept, channels, gated], dim=1)
        candidate = [torch.cat([reset, update, rest], dim=1), g.candidate_bias]
    last, first = g.query.split([gated, kept], dim=1)
    state, rest, update = g.gates.split([gated, kept, channels], dim=1)
    found: list[Tensor | None] = [
        torch.cat([first, last], dim=1) * factor, g.query_bias * factor, g.out, g.out_bias,
        torch.cat([state, update, rest], dim=1), g.gates_bias, *candidate,
    ]  # fmt: skip
    if g.qkv.numel() == 0:
        return [*found, *[None] * 6]
    factors = _score_factors(g.qkv_bias, talk_heads)
    return [
        *found, g.qkv * factors.unsqueeze(1), g.qkv_bias * factors, g.mix, g.mix_bias, g.scale,
        g.shift,
    ]  # fmt: skip


def _score_factors(qkv_bias: Tensor, heads: int) -> Tensor:
    """For the rows of queries one over the root of a head's width, one for keys and values."""
    gated = qkv_bias.numel() // 3
    factors = torch.ones_like(qkv_bias)
    factors[:gated] = (gated // heads) ** -0.5
    return factors
