"""What a topology looks like in numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nsm_graph.relation import Relation
from nsm_graph.topology.spectrum import spectral_gap

#: The diameter looks at so many 64-bit words at a time (128 MiB).
_WORDS_AT_A_TIME = 2**24


class Summary(NamedTuple):
    """Numbers of one topology on one example; printed, a small table."""

    name: str
    num_src: int
    num_dst: int
    num_edges: int
    degree: tuple[int, float, int]  #: edges that enter a target: least, mean, most
    diameter: float | None  #: longest of the shortest paths; infinite where a node is out of reach
    spectral_gap: float | None  #: 0 where the graph falls into parts, 1 or more where it is dense
    cost: float  #: edges, as a share of those of ``complete()``: attention costs as much

    def __str__(self) -> str:
        over = f"{self.num_src} nodes"
        if self.diameter is None:
            over = f"{self.num_src} sources and {self.num_dst} targets"
        least, mean, most = self.degree
        lines = [
            f"{self.name} over {over}",
            f"edges         {self.num_edges} ({self.cost:.1%} of complete)",
            f"degree        min {least}, mean {mean:.1f}, max {most}",
        ]
        if self.diameter is not None:
            lines.append(f"diameter      {self.diameter:g}")
        if self.spectral_gap is not None:
            lines.append(f"spectral gap  {self.spectral_gap:.4f}")
        return "\n".join(lines)


def summarise(relation: Relation, name: str) -> Summary:
    """The numbers of a relation over one example.

    Raises:
        ValueError: If there are no nodes, or several examples.
    """
    if min(relation.size) == 0:
        raise ValueError(
            f"{name} over {relation.num_src} -> {relation.num_dst} nodes: there is nothing to "
            f"describe; pass at least one node"
        )
    if relation.num_examples > 1:
        raise ValueError(
            f"{name} was asked about {relation.num_examples} examples; describe them one by one"
        )
    num_src, num_dst = relation.size
    if relation.is_complete:
        least = most = num_src
    elif relation.is_causal:
        least, most = 1, num_dst
    else:
        least, most = (int(value) for value in relation.in_degree.aminmax())
    is_one_set = relation.sources is relation.targets
    return Summary(
        name,
        num_src,
        num_dst,
        relation.num_edges,
        (least, relation.num_edges / num_dst, most),
        diameter(relation) if is_one_set else None,
        spectral_gap(relation.edge_index, num_src) if is_one_set else None,
        relation.num_edges / (num_src * num_dst),
    )


def diameter(relation: Relation) -> float:
    """The longest of the shortest paths among the nodes of one set, along edges.

    Every node holds a bit for each node that reaches it; a step passes the bits on.
    """
    num_nodes = relation.num_src
    if relation.is_complete:
        return float(num_nodes > 1)
    if relation.is_causal:  # nothing leads back to the first node
        return math.inf if num_nodes > 1 else 0.0
    ptr, index, _ = (part.cpu().numpy() for part in relation.csr)
    words = (num_nodes + 63) // 64
    reached = np.zeros((num_nodes, words), dtype=np.uint64)
    node = np.arange(num_nodes)
    reached[node, node // 64] = np.uint64(1) << (node % 64).astype(np.uint64)
    everyone = np.bitwise_or.reduce(reached, axis=0)
    has_edges = np.flatnonzero(np.diff(ptr))
    num_steps = 0
    while not (reached == everyone).all():
        wider = reached.copy()
        for rows in _pieces(has_edges, np.diff(ptr)[has_edges], words):
            edges = index[ptr[rows[0]] : ptr[rows[-1] + 1]]
            wider[rows] |= np.bitwise_or.reduceat(reached[edges], ptr[rows] - ptr[rows[0]], axis=0)
        if (wider == reached).all():
            return math.inf
        reached = wider
        num_steps += 1
    return float(num_steps)


def _pieces(rows: np.ndarray, degree: np.ndarray, words: int) -> list[np.ndarray]:
    """Rows that are looked at together; only empty rows lie between them."""
    if rows.size == 0:
        return []
    piece = np.cumsum(degree) * words // _WORDS_AT_A_TIME
    return np.split(rows, np.flatnonzero(np.diff(piece)) + 1)
