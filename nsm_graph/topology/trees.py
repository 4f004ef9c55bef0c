"""Rules with leaders: star, tree, hierarchical, and trees given by their parents."""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.partition import holds_integers
from nsm_graph.topology.base import Pattern, Topology
from nsm_graph.topology.checks import as_cpu_index, at_least, find_cycle, show_rows
from nsm_graph.topology.rows import Rows, rows_from_pairs, rows_from_table


def star(hubs: int = 1) -> Topology:
    r"""The first ``hubs`` nodes of each example to and from all others of it.

    Example:
        >>> star()(NodeSet.from_counts([4])).num_edges
        6
    """
    return Star(hubs)


def tree(branching: int = 2) -> Topology:
    r"""Each node to and from its parent, level by level: node i has ``branching`` children.

    Example:
        >>> tree(2)(NodeSet.from_counts([5])).edge_index
        tensor([[1, 2, 0, 3, 4, 0, 1, 1],
                [0, 0, 1, 1, 1, 2, 3, 4]])
    """
    return Tree(branching)


def hierarchical(size: int = 4) -> Topology:
    r"""Groups of ``size`` nodes, groups of ``size`` groups, and so on: each complete.

    The first node of a group leads it and stands for it one level up, so that every node reaches
    every other in a number of steps that grows with the logarithm of their number.

    Example:
        >>> hierarchical(3).describe(27).diameter
        5.0
    """
    return Hierarchical(size)


def from_parents(parents: Tensor | list[int]) -> Topology:
    r"""A tree (or several) given by the parent of every node; edges run both ways.

    Args:
        parents: The parent of each node of an example, -1 for a root, ``[N]``.

    Raises:
        ValueError: If a parent does not exist, or nodes are ancestors of themselves.

    Example:
        >>> from_parents([-1, 0, 0, 2])(NodeSet.from_counts([4])).num_edges
        6
    """
    return Parents(torch.as_tensor(parents))


class Star(Pattern):
    def __init__(self, hubs: int) -> None:
        super().__init__()
        if hubs < 1:
            raise ValueError(f"star(hubs) needs at least one hub, but hubs is {hubs}")
        self.hubs = hubs

    def rows(self, num_src: int, num_dst: int) -> Rows:
        hub = torch.arange(min(self.hubs, num_src)).repeat_interleave(num_src)
        other = torch.arange(num_src).repeat(min(self.hubs, num_src))
        hub, other = hub[hub != other], other[hub != other]
        src, dst = torch.cat([hub, other]), torch.cat([other, hub])
        return rows_from_pairs(src, dst, (num_src, num_dst))

    def __repr__(self) -> str:
        return f"star({self.hubs})"


class Tree(Pattern):
    def __init__(self, branching: int) -> None:
        super().__init__()
        at_least("tree(branching)", "branching", branching, 1)
        self.branching = branching

    def rows(self, num_src: int, num_dst: int) -> Rows:
        node = torch.arange(num_src).unsqueeze(1)
        children = node * self.branching + torch.arange(1, self.branching + 1)
        parent = torch.where(node > 0, (node - 1) // self.branching, num_src)
        source = torch.cat([parent, children], 1)
        return rows_from_table(source, source < num_src)

    def __repr__(self) -> str:
        return f"tree({self.branching})"


class Hierarchical(Pattern):
    def __init__(self, size: int) -> None:
        super().__init__()
        at_least("hierarchical(size)", "size", size, 2)
        self.size = size

    def rows(self, num_src: int, num_dst: int) -> Rows:
        pairs, stride = [], 1
        while stride < num_src:
            leader = torch.arange(0, num_src, stride).unsqueeze(1)
            group = leader - leader % (stride * self.size)
            source = group + torch.arange(self.size) * stride
            leader = leader.expand_as(source)
            is_edge = (source < num_src) & (source != leader)
            pairs.append(torch.stack([source[is_edge], leader[is_edge]]))
            stride *= self.size
        nothing = torch.zeros(2, 0, dtype=torch.long)
        src, dst = torch.cat([nothing, *pairs], 1)
        return rows_from_pairs(src, dst, (num_src, num_dst))

    def __repr__(self) -> str:
        return f"hierarchical({self.size})"


class Parents(Pattern):
    def __init__(self, parents: Tensor) -> None:
        super().__init__()
        if parents.dim() != 1 or parents.numel() == 0 or not holds_integers(parents):
            raise ValueError(
                f"from_parents(parents) needs one integer for each node, but got shape "
                f"{tuple(parents.shape)} and dtype {parents.dtype}"
            )
        parents = as_cpu_index(parents)
        is_wrong = (parents < -1) | (parents >= parents.numel())
        if bool(is_wrong.any()):
            raise ValueError(
                f"from_parents(parents) needs parents in -1..{parents.numel() - 1}, but has "
                f"{show_rows(parents, is_wrong)}"
            )
        cycle = find_cycle(parents.tolist())
        if cycle:
            shown = " -> ".join(map(str, [*cycle[:6], "..."] if len(cycle) > 6 else cycle))
            raise ValueError(
                f"from_parents(parents) needs a tree, but these are their own ancestors: {shown} "
                f"-> {cycle[0]}; give one of them the parent -1"
            )
        self.parents = parents

    def rows(self, num_src: int, num_dst: int) -> Rows:
        if num_src != self.parents.numel():
            raise ValueError(
                f"{self!r} is for examples of {self.parents.numel()} nodes, but one has {num_src}; "
                f"make a topology for that node count"
            )
        node = (self.parents >= 0).nonzero().flatten()
        parent = self.parents[node]
        src, dst = torch.cat([node, parent]), torch.cat([parent, node])
        return rows_from_pairs(src, dst, (num_src, num_dst))

    def __repr__(self) -> str:
        return f"from_parents({self.parents.numel()} nodes)"
