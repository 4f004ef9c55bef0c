"""Random graphs that are drawn once for each number of nodes, from a seed, the same everywhere.

Legend: an undirected edge is the number ``lower node * N + higher node``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.topology.base import Pattern, Topology
from nsm_graph.topology.checks import at_least
from nsm_graph.topology.rows import Rows, rows_from_pairs, rows_from_table
from nsm_graph.topology.sets import contains
from nsm_graph.topology.spectrum import spectral_gap

#: Graphs that an expander draws before it takes the best of them. About every second one is good.
MAX_DRAWS = 16


def small_world(k: int = 2, p: float = 0.1, seed: int = 0) -> Topology:
    r"""Watts and Strogatz: a ring of k on either side, each edge moved with probability ``p``.

    The number of edges is that of ``ring(k)``; every edge runs both ways.

    Raises:
        ValueError: If ``k`` or ``p`` is out of range; when asked, if an example has no more than
            2 k nodes.

    Example:
        >>> small_world(2, 0.2).describe(64).num_edges
        256
    """
    return SmallWorld(k, p, seed)


def random_regular(degree: int = 4, seed: int = 0) -> Topology:
    r"""A random graph in which every node has ``degree`` neighbours; edges run both ways.

    Raises:
        ValueError: When asked, if an example has no more than ``degree`` nodes, or the number of
            nodes and ``degree`` are both odd (such a graph does not exist).

    Example:
        >>> random_regular(4)(NodeSet.from_counts([64]))
        Relation(64 -> 64, 256 edges, 4 a target)
    """
    return RandomRegular(degree, seed)


def expander(degree: int = 4, seed: int = 0) -> Topology:
    r"""A random regular graph that mixes as fast as one of its degree can.

    Graphs are drawn until the second eigenvalue of the adjacency matrix is at most
    :math:`2 \sqrt{d - 1}`, which no large graph can undercut (Alon and Boppana): what one node
    knows reaches all in a number of steps that grows with the logarithm of their number. It
    seldom takes more than three; after sixteen the best one is kept.

    Raises:
        ValueError: As :func:`random_regular`; and if ``degree`` is below 3, which makes rings.

    Example:
        >>> from nsm_graph.topology import ring
        >>> lattice, mixed = ring(2).describe(256), expander(4).describe(256)
        >>> lattice.num_edges == mixed.num_edges, lattice.diameter, mixed.diameter
        (True, 64.0, 7.0)
    """
    return Expander(degree, seed)


class SmallWorld(Pattern):
    def __init__(self, k: int, p: float, seed: int) -> None:
        super().__init__()
        at_least("small_world(k, p)", "k", k, 1)
        if not 0 <= p <= 1:
            raise ValueError(f"small_world(k, p) needs a probability p in [0, 1], but p is {p}")
        self.k, self.p, self.seed = k, p, seed

    def rows(self, num_src: int, num_dst: int) -> Rows:
        n = num_src
        if n <= 2 * self.k:
            raise ValueError(
                f"{self!r} needs more than {2 * self.k} nodes in every example, but one has {n}; "
                f"use a smaller k or more nodes"
            )
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.arange(n).repeat_interleave(self.k)
        end = (start + torch.arange(1, self.k + 1).repeat(n)) % n
        moves = (torch.rand(start.numel(), generator=generator) < self.p).nonzero().flatten()
        for _ in range(100):  # an edge that finds no free place in so many tries stays
            if moves.numel() == 0:
                break
            wanted = torch.randint(n, moves.shape, generator=generator)
            keys = _undirected(start[moves], wanted, n)
            taken = contains(_undirected(start, end, n).sort().values, keys)
            is_free = (wanted != start[moves]) & ~taken & _is_first(keys)
            end[moves[is_free]] = wanted[is_free]
            moves = moves[~is_free]
        return rows_from_pairs(torch.cat([start, end]), torch.cat([end, start]), (n, n))

    def __repr__(self) -> str:
        return f"small_world({self.k}, {self.p}, seed={self.seed})"


class RandomRegular(Pattern):
    name = "random_regular"
    least_degree = 1

    def __init__(self, degree: int, seed: int) -> None:
        super().__init__()
        at_least(f"{self.name}(degree)", "degree", degree, self.least_degree)
        self.degree, self.seed = degree, seed

    def rows(self, num_src: int, num_dst: int) -> Rows:
        if num_src <= self.degree:
            raise ValueError(
                f"{self!r} needs more than {self.degree} nodes in every example, but one has "
                f"{num_src}; use a smaller degree or more nodes"
            )
        if num_src * self.degree % 2 == 1:
            raise ValueError(
                f"{self!r} needs an even number of nodes, since its degree is odd, but an example "
                f"has {num_src}; use degree {self.degree - 1} or {self.degree + 1}"
            )
        return self._draw(num_src, torch.Generator().manual_seed(self.seed))

    def _draw(self, num_nodes: int, generator: torch.Generator) -> Rows:
        return _regular(num_nodes, self.degree, generator)

    def __repr__(self) -> str:
        return f"{self.name}({self.degree}, seed={self.seed})"


class Expander(RandomRegular):
    name = "expander"
    least_degree = 3

    def _draw(self, num_nodes: int, generator: torch.Generator) -> Rows:
        best, widest = None, -1.0
        wanted = 1 - 2 * (self.degree - 1) ** 0.5 / self.degree
        for _ in range(MAX_DRAWS):
            rows = _regular(num_nodes, self.degree, generator)
            target = torch.arange(num_nodes).repeat_interleave(self.degree)
            gap = spectral_gap(torch.stack([rows.index, target]), num_nodes)
            if gap > widest:
                best, widest = rows, gap
            if gap >= wanted:
                break
        assert best is not None
        return best


def _regular(n: int, degree: int, generator: torch.Generator) -> Rows:
    """Pairs the ends of edges at random, then exchanges ends until no edge is double or a loop."""
    if degree > (n - 1) // 2 and degree < n:
        # A crowded graph is what an empty one leaves over.
        source, target = torch.arange(n).repeat(n, 1), torch.arange(n).unsqueeze(1)
        is_edge = source != target
        if degree < n - 1:
            rest = _regular(n, n - 1 - degree, generator).index.view(n, -1)
            is_edge.scatter_(1, rest, False)
        return rows_from_table(source, is_edge)
    while True:
        ends = torch.arange(n).repeat_interleave(degree)
        start, end = ends[torch.randperm(ends.numel(), generator=generator)].view(2, -1)
        for _ in range(200):
            is_bad = (start == end) | ~_is_first(_undirected(start, end, n))
            bad, good = is_bad.nonzero().flatten(), (~is_bad).nonzero().flatten()
            if bad.numel() == 0:
                return rows_from_pairs(torch.cat([start, end]), torch.cat([end, start]), (n, n))
            partner = good[torch.randperm(good.numel(), generator=generator)[: bad.numel()]]
            bad = bad[: partner.numel()]
            end[bad], end[partner] = end[partner], end[bad]


def _undirected(a: Tensor, b: Tensor, num_nodes: int) -> Tensor:
    return torch.minimum(a, b) * num_nodes + torch.maximum(a, b)


def _is_first(keys: Tensor) -> Tensor:
    """Whether no equal key stands before."""
    ordered, order = keys.sort(stable=True)
    is_first = torch.ones_like(keys, dtype=torch.bool)
    is_first[order[1:]] = ordered[1:] != ordered[:-1]
    return is_first
