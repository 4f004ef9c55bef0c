"""Static rules."""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.relation import Relation
from nsm_graph.topology.base import Complete, NodeSet, Topology, relation_inside


def complete() -> Topology:
    r"""Every node to every node of its example, itself included; stores no edges.

    Example:
        >>> complete()(NodeSet.from_counts([2, 3])).num_edges
        13
    """
    return Complete()


def ring(k: int = 1) -> Topology:
    r"""Each node to the k before and the k after it, around its example; not to itself.

    Example:
        >>> ring()(NodeSet.from_counts([4])).num_edges
        8
    """
    return Ring(k)


def star(hubs: int = 1) -> Topology:
    r"""The first ``hubs`` nodes of each example to and from all others of it.

    Example:
        >>> star()(NodeSet.from_counts([4])).num_edges
        6
    """
    return Star(hubs)


def self_loops() -> Topology:
    """Each node to itself.

    Example:
        >>> (ring() | self_loops())(NodeSet.from_counts([4])).num_edges
        12
    """
    return SelfLoops()


def from_edge_index(edge_index: Tensor, num_nodes: int | None = None) -> Topology:
    r"""The same fixed edges in every example; nodes count from 0 inside the example.

    Args:
        edge_index: ``[2, E]``, as PyG has it.
        num_nodes: Nodes of an example; ``None`` for the largest index plus one. An example
            without nodes has no edges.

    Example:
        >>> chain = from_edge_index(torch.tensor([[0, 1], [1, 2]]))
        >>> chain(NodeSet.from_counts([3, 3])).edge_index
        tensor([[0, 1, 3, 4],
                [1, 2, 4, 5]])
    """
    return FixedEdges(edge_index, num_nodes)


class Ring(Topology):
    def __init__(self, k: int) -> None:
        if k < 1:
            raise ValueError(f"ring(k) joins the k nodes on either side, but k is {k}; use k >= 1")
        self.k = k

    def __call__(self, nodes: NodeSet) -> Relation:
        counts = nodes.ptr.diff()[nodes.batch].unsqueeze(1)
        offset = torch.arange(1, self.k + 1, device=counts.device)
        offset = torch.cat([-offset, offset])
        target = torch.arange(nodes.num_nodes, device=counts.device).unsqueeze(1)
        first = nodes.ptr[nodes.batch].unsqueeze(1)
        source = first + (target - first + offset) % counts.clamp(min=1)
        # In a small example both ways round meet: keep each neighbour once, and never the node.
        source = source.sort(1).values
        is_new = torch.ones_like(source, dtype=torch.bool)
        is_new[:, 1:] = source[:, 1:] != source[:, :-1]
        is_new &= source != target
        edges = torch.stack([source[is_new], target.expand_as(source)[is_new]])
        return relation_inside(nodes, edges)

    def __repr__(self) -> str:
        return f"ring({self.k})"


class Star(Topology):
    def __init__(self, hubs: int) -> None:
        if hubs < 1:
            raise ValueError(f"star(hubs) needs at least one hub, but hubs is {hubs}")
        self.hubs = hubs

    def __call__(self, nodes: NodeSet) -> Relation:
        src, dst = Complete()(nodes).edge_index
        is_hub = nodes.position < self.hubs
        kept = (is_hub[src] | is_hub[dst]) & (src != dst)
        return relation_inside(nodes, torch.stack([src[kept], dst[kept]]))

    def __repr__(self) -> str:
        return f"star({self.hubs})"


class SelfLoops(Topology):
    def __call__(self, nodes: NodeSet) -> Relation:
        index = torch.arange(nodes.num_nodes, device=nodes.ptr.device)
        return relation_inside(nodes, torch.stack([index, index]))

    def __repr__(self) -> str:
        return "self_loops()"


class FixedEdges(Topology):
    def __init__(self, edge_index: Tensor, num_nodes: int | None) -> None:
        size = None if num_nodes is None else (num_nodes, num_nodes)
        relation = Relation.from_edge_index(edge_index, size)
        self.edge_index = relation.edge_index
        self.num_nodes = max(relation.size)

    def __call__(self, nodes: NodeSet) -> Relation:
        counts = nodes.ptr.diff()
        holds_nodes = counts > 0
        if bool((holds_nodes & (counts != self.num_nodes)).any()):
            raise ValueError(
                f"{self!r} is for examples of {self.num_nodes} nodes, but the examples have "
                f"{counts.unique().tolist()}; make a topology for that node count"
            )
        edge_index = self.edge_index.to(nodes.ptr.device)
        edges = edge_index.unsqueeze(1) + nodes.ptr[:-1][holds_nodes].view(1, -1, 1)
        return relation_inside(nodes, edges.flatten(1))

    def __repr__(self) -> str:
        return f"from_edge_index({self.edge_index.size(1)} edges, {self.num_nodes} nodes)"
