"""A topology that is learned: a logit for every pair of slots."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsm_graph.ops.nearest.reference import best
from nsm_graph.relation import Relation
from nsm_graph.topology.base import Topology, same_set
from nsm_graph.topology.checks import at_least, check_enough
from nsm_graph.topology.node_set import NodeSet


def learned(num_states: int, k: int = 4, *, temperature: float = 1.0) -> Learned:
    r"""Each node from the k others with the largest learned logits; see :class:`Learned`.

    Example:
        >>> rule = learned(6, k=2)
        >>> rule(NodeSet.from_counts([6])).num_edges, sum(p.numel() for p in rule.parameters())
        (12, 36)
    """
    return Learned(num_states, k, temperature)


class Learned(Topology):
    r"""Chooses the sources of every target by learned logits, with Gumbel noise in training.

    .. math::
        p_{ij} = \mathrm{softmax}_i\big((\ell_{ij} + g_{ij}) / \tau\big), \qquad
        \text{edges} = \text{the } k \text{ largest } p_{ij} \text{ of each } j

    The chosen edges weigh the same in the forward pass, and in the backward pass they act as if
    :math:`\log p_{ij}` had been added to their scores (straight through): what helps becomes
    likelier, and the softmax makes all others less likely. The noise :math:`g` tries others out;
    in ``eval()`` there is none, and ties go to the lowest source. A machine asks once a call.

    Args:
        num_states: Slots of the machine (``max_states``): one logit for every pair.
        k: Sources of each target.
        temperature: Of the softmax in the backward pass. (default: :obj:`1.0`)

    Shapes:
        - **logits:** :math:`(M, M)`, targets by sources; allocation and pruning reach both

    Raises:
        ValueError: If an argument is out of range; when asked, if an example has no more than
            ``k`` nodes, or more than ``num_states``.
    """

    slot_dims = {"logits": (0, 1)}

    def __init__(self, num_states: int, k: int, temperature: float = 1.0) -> None:
        super().__init__()
        at_least("learned(num_states, k)", "num_states", num_states, 2)
        at_least("learned(num_states, k)", "k", k, 1)
        if k >= num_states:
            raise ValueError(
                f"learned(num_states, k) chooses k of the other nodes, but k is {k} and num_states "
                f"{num_states}; use a smaller k"
            )
        if not temperature > 0:
            raise ValueError(f"learned: temperature must be positive, but is {temperature}")
        self.num_states, self.k, self.temperature = num_states, k, temperature
        self.logits = nn.Parameter(torch.empty(num_states, num_states))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.logits)

    def reset_slots(self, slots: Tensor) -> None:
        """Neutral logits for slots that were just allocated, as targets and as sources."""
        with torch.no_grad():
            self.logits[slots] = 0.0
            self.logits[:, slots] = 0.0

    def forward(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
        nodes = same_set(self, sources, targets).nodes
        size = (nodes.num_rows, nodes.num_rows)
        if nodes.num_rows == 0:
            nothing = torch.zeros(0, dtype=torch.long, device=nodes.ptr.device)
            return Relation.from_rows(nothing, self.k, size, nodes, nodes)
        check_enough(self, self.k + 1, sources, sources)
        logits_BNM = self._logits(sources)
        if self.training:
            noise = torch.empty_like(logits_BNM).exponential_().log()
            logits_BNM = logits_BNM - noise
        log_p_BNM = (logits_BNM / self.temperature).log_softmax(-1)
        chosen_BNk = best(log_p_BNM.detach(), self.k).sort(-1).values
        log_p_Nk = nodes.unpad(log_p_BNM.gather(2, chosen_BNk))
        index_Nk = nodes.unpad(chosen_BNk + nodes.ptr[:-1].view(-1, 1, 1))
        relation = Relation.from_rows(index_Nk.flatten(), self.k, size, nodes, nodes)
        # Zero, with the gradient of the logarithm.
        return relation.with_bias((log_p_Nk - log_p_Nk.detach()).flatten())

    def _logits(self, sources: NodeSet) -> Tensor:
        """``[B, N, N]`` by the nodes' slots; minus infinity for padding and the node itself."""
        nodes = sources.nodes
        slots = sources.position if sources.slots is None else sources.slots
        most = int(slots.max())
        if most >= self.num_states:
            raise ValueError(
                f"{self!r} has logits for {self.num_states} slots, but the nodes hold slot {most}; "
                f"build it with num_states={most + 1} or more"
            )
        slots_BN = nodes.pad(slots)
        logits = self.logits[slots_BN.unsqueeze(2), slots_BN.unsqueeze(1)]
        is_out = torch.eye(nodes.max_count, dtype=torch.bool, device=logits.device)
        if not nodes.is_uniform:
            is_out = is_out | ~nodes.mask().unsqueeze(1)
        return logits.masked_fill(is_out, torch.finfo(logits.dtype).min / 2)

    def __repr__(self) -> str:
        return f"learned({self.num_states}, {self.k})"
