"""Regular neighbourhoods: ring, path, grid, torus."""

from __future__ import annotations

import math

import torch

from nsm_graph.topology.base import Pattern, Topology
from nsm_graph.topology.checks import at_least
from nsm_graph.topology.rows import Rows, rows_from_table


def ring(k: int = 1) -> Topology:
    r"""Each node to the k before and the k after it, around its example; not to itself.

    Example:
        >>> ring()(NodeSet.from_counts([4])).num_edges
        8
    """
    return Ring(k)


def path() -> Topology:
    r"""Each node to the one before and the one after it; the ends have one neighbour.

    Example:
        >>> path()(NodeSet.from_counts([3])).edge_index
        tensor([[1, 0, 2, 1],
                [0, 1, 1, 2]])
    """
    return Grid((None,), is_torus=False)


def grid(*shape: int) -> Topology:
    r"""Each node to its neighbours along every axis of a grid, whose last index runs fastest.

    Args:
        shape: Nodes along each axis; their product is the number of nodes of an example.

    Example:
        >>> grid(2, 3)(NodeSet.from_counts([6])).num_edges
        14
    """
    return Grid(shape, is_torus=False)


def torus(*shape: int) -> Topology:
    r"""A grid whose ends meet along every axis.

    Example:
        >>> torus(3, 3)(NodeSet.from_counts([9]))
        Relation(9 -> 9, 36 edges, 4 a target)
    """
    return Grid(shape, is_torus=True)


class Ring(Pattern):
    def __init__(self, k: int) -> None:
        super().__init__()
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"ring(k) joins the k nodes on either side, but k is {k}; use k >= 1")
        self.k = k

    def rows(self, num_src: int, num_dst: int) -> Rows:
        # In a small example both ways round meet, and the table holds a neighbour twice.
        k = min(self.k, num_src // 2)
        offset = torch.arange(1, k + 1)
        target = torch.arange(num_dst).unsqueeze(1)
        return rows_from_table((target + torch.cat([-offset, offset])) % num_src)

    def __repr__(self) -> str:
        return f"ring({self.k})"


class Grid(Pattern):
    """Neighbours along every axis; a single axis of any length is a path."""

    def __init__(self, shape: tuple[int | None, ...], is_torus: bool) -> None:
        super().__init__()
        self.name = "torus" if is_torus else "grid"
        if not shape:
            raise ValueError(f"{self.name}(*shape) needs the nodes along each axis; got none")
        for size in shape:
            if size is not None:
                at_least(f"{self.name}(*shape)", "every axis", size, 1)
        self.shape, self.is_torus = shape, is_torus

    def rows(self, num_src: int, num_dst: int) -> Rows:
        shape = [num_src if size is None else size for size in self.shape]
        if math.prod(shape) != num_src:
            raise ValueError(
                f"{self!r} has {math.prod(shape)} nodes, but an example has {num_src}; choose a "
                f"shape whose product is {num_src}"
            )
        target = torch.arange(num_src)
        sources, is_edge = [], []
        stride = num_src
        for size in shape:
            stride //= size
            place = target // stride % size
            for step in (-1, 1):
                there = (place + step) % size if self.is_torus else place + step
                sources.append(target + (there - place) * stride)
                is_edge.append((there >= 0) & (there < size) & (there != place))
        return rows_from_table(torch.stack(sources, 1), torch.stack(is_edge, 1))

    def __repr__(self) -> str:
        if self.shape == (None,):
            return "path()"
        return f"{self.name}({', '.join(map(str, self.shape))})"
