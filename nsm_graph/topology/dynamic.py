"""Rules that read the current states and are asked again at every step."""

from __future__ import annotations

import torch

from nsm_graph.relation import Relation
from nsm_graph.topology.base import NodeSet, Topology, relation_inside


def knn(k: int = 4) -> Topology:
    r"""Each node from its k nearest others (euclidean) in the current states.

    Ties go to the lowest index; an example without nodes has no edges. The choice of neighbours
    carries no gradient; the attention over them does.

    Example:
        >>> states = torch.tensor([[0.0], [1.0], [5.0]])
        >>> knn(1)(NodeSet.from_counts([3], states)).edge_index
        tensor([[1, 0, 1],
                [0, 1, 2]])
    """
    return NearestNeighbours(k)


class NearestNeighbours(Topology):
    is_dynamic = True

    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"knn(k) needs at least one neighbour, but k is {k}; use k >= 1")
        self.k = k

    def __call__(self, nodes: NodeSet) -> Relation:
        if nodes.x is None:
            raise ValueError(f"{self!r} reads the current states, but the node set has no x")
        if nodes.x.dim() != 2 or nodes.x.size(0) != nodes.num_nodes:
            raise ValueError(
                f"{self!r} needs x of shape ({nodes.num_nodes}, channels), but it has "
                f"{tuple(nodes.x.shape)}"
            )
        if nodes.num_nodes == 0:
            nothing = torch.zeros(2, 0, dtype=torch.long, device=nodes.x.device)
            return relation_inside(nodes, nothing)
        counts = nodes.ptr.diff()
        fewest = int(counts[counts > 0].min())
        if fewest <= self.k:
            raise ValueError(
                f"{self!r} needs more than {self.k} nodes in every example, but one has {fewest}; "
                f"use a smaller k or more nodes"
            )
        # Distances do not exist in 16 bits.
        x = nodes.nodes.pad(nodes.x.detach().to(torch.promote_types(nodes.x.dtype, torch.float32)))
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        is_node = nodes.nodes.mask()
        distance = distance.masked_fill(~is_node.unsqueeze(1), torch.inf)
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        # A stable sort gives ties to the lowest index; topk promises no order.
        nearest = distance.argsort(dim=-1, stable=True)[..., : self.k]
        source = nodes.nodes.unpad(nearest + nodes.ptr[:-1].view(-1, 1, 1)).sort(1).values
        target = torch.arange(nodes.num_nodes, device=source.device).unsqueeze(1)
        edges = torch.stack([source.flatten(), target.expand_as(source).flatten()])
        return relation_inside(nodes, edges)

    def __repr__(self) -> str:
        return f"knn({self.k})"
