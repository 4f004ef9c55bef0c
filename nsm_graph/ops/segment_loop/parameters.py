"""A cell's parameters as the kernels want them, and their gradients as they came.

Parameters come as ``torch.nn.Linear`` keeps them. The kernels want matrices both ways round, the
scale of the scores inside the query, and the update in front of the reset state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.ops.segment_loop.cpu.arrays import Weights
from nsm_graph.ops.segment_loop.inputs import LoopWeights


def turn(weights: LoopWeights, heads: int) -> list[Tensor]:
    """The kernel's form: ``[in, out]``, scores scaled, (update, reset state) for the candidate.

    What the cell lacks is empty.
    """
    query, query_bias, out, out_bias, gates, gates_bias = (x.detach() for x in weights[:6])
    channels = query.size(0)
    factor = (channels // heads) ** -0.5
    candidate = [query.new_empty([0] * dims) for dims in (2, 1)]
    if weights.candidate is not None and weights.candidate_bias is not None:
        reset, update = weights.candidate.detach().split(channels, dim=1)
        candidate = [torch.cat([update, reset], dim=1), weights.candidate_bias.detach()]
    talk = [query.new_empty([0] * dims) for dims in (2, 1, 2, 1, 1, 1)]
    if weights.qkv is not None:
        qkv, qkv_bias, *rest = (x.detach() for x in weights[8:] if x is not None)
        factors = query.new_ones(3 * channels)
        factors[:channels] = factor
        talk = [qkv * factors.unsqueeze(1), qkv_bias * factors, *rest]
    turned = [
        query * factor, query_bias * factor, out, out_bias, gates, gates_bias,
        *candidate, *talk,
    ]  # fmt: skip
    return [x.t() if x.dim() == 2 else x for x in turned]


def turn_back(grads: list[Tensor], heads: int) -> list[Tensor | None]:
    """Gradients of the parameters as they came."""
    g = Weights(*(x.t().contiguous() if x.dim() == 2 else x for x in grads))
    channels = g.query.size(0)
    factor = (channels // heads) ** -0.5
    candidate: list[Tensor | None] = [None, None]
    if g.candidate.numel() > 0:
        update, reset = g.candidate.split(channels, dim=1)
        candidate = [torch.cat([reset, update], dim=1), g.candidate_bias]
    found: list[Tensor | None] = [
        g.query * factor, g.query_bias * factor, g.out, g.out_bias, g.gates, g.gates_bias,
        *candidate,
    ]  # fmt: skip
    if g.qkv.numel() == 0:
        return [*found, *[None] * 6]
    factors = g.query.new_ones(3 * channels)
    factors[:channels] = factor
    return [
        *found, g.qkv * factors.unsqueeze(1), g.qkv_bias * factors, g.mix, g.mix_bias, g.scale,
        g.shift,
    ]  # fmt: skip
