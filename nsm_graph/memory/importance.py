r"""Signals of how much each state matters, one number per state row.

The documented update, ``mean(weights, dim=[0, 1])`` of attention weights, is 1/S for every state
whatever the data, because those weights sum to 1 over tokens; it is not offered. These carry
information. Each feeds an exponential moving average per slot
(:meth:`nsm_graph.memory.StateManager.update_importance`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.ops.segment import group_sum
from nsm_graph.relation import Relation


def routing_mass(weights: Tensor, relation: Relation) -> Tensor:
    r"""Share of its example's routing weight that each state received.

    .. math:: m_j = \sum_{e \text{ entering } j} w_e \Big/ \sum_{e \text{ into } b(j)} w_e

    Shapes:
        - **input:** weights :math:`(E,)`, relation from tokens to states
        - **output:** :math:`(N,)`, summing to 1 over the states of an example with tokens
    """
    weights = weights.detach()
    tiny = torch.finfo(weights.dtype).tiny
    if relation.targets is None:
        mass = group_sum(weights, relation.edge_index[1], relation.num_dst)
        return mass / mass.sum().clamp(min=tiny)
    mass_Bn = relation.to_dense(weights).sum(2)
    return relation.targets.unpad(mass_Bn / mass_Bn.sum(1, keepdim=True).clamp(min=tiny))


def gradient_signal(states: Tensor, gradient: Tensor) -> Tensor:
    r"""First-order change of the loss if a state were zeroed: :math:`|s_j \cdot dL/ds_j|`.

    Shapes:
        - **input:** states and gradient :math:`(N, C)`
        - **output:** :math:`(N,)`
    """
    if states.shape != gradient.shape:
        raise ValueError(
            f"states have shape {tuple(states.shape)}, but gradient has {tuple(gradient.shape)}"
        )
    return (states.detach() * gradient.detach()).sum(-1).abs()


def attention_sharpness(weights: Tensor, relation: Relation) -> Tensor:
    r"""One minus the normalised entropy of each state's attention, averaged over heads.

    1 where a state looks at one token, 0 where it looks at all alike (or at nothing: no edge
    enters, or all that do are masked).

    Shapes:
        - **input:** weights :math:`(E, H)`, relation from tokens to states
        - **output:** :math:`(N,)`
    """
    weights = weights.detach()
    dst = relation.edge_index[1]
    log_weights = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    entropy = group_sum(-weights * log_weights, dst, relation.num_dst)
    looks = group_sum(weights, dst, relation.num_dst) > 0
    degree = torch.bincount(dst, minlength=relation.num_dst).clamp(min=2)
    sharpness = (1 - entropy / degree.to(entropy).log().unsqueeze(1)).clamp(0, 1)
    return sharpness.masked_fill(~looks, 0.0).mean(-1)


def update_norm(before: Tensor, after: Tensor) -> Tensor:
    r"""How far each state moved: :math:`\lVert s'_j - s_j \rVert`.

    Shapes:
        - **input:** states before and after :math:`(N, C)`
        - **output:** :math:`(N,)`
    """
    if before.shape != after.shape:
        raise ValueError(
            f"before has shape {tuple(before.shape)}, but after has {tuple(after.shape)}"
        )
    return (after.detach() - before.detach()).norm(dim=-1)
