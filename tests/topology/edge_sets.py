"""What tests of rules share: edges as sets, and rules of given edges."""

import torch

from nsm_graph import topology
from nsm_graph.topology import NodeSet


def edges_of(rule, counts, x=None):
    """Edges in order; a rule must name no edge twice, stay inside its nodes, and go by target."""
    relation = rule(NodeSet.from_counts(counts, x))
    assert relation.size == (sum(counts), sum(counts))
    edges = [tuple(edge) for edge in relation.edge_index.T.tolist()]
    assert edges == sorted(set(edges), key=lambda edge: edge[::-1])
    assert all(0 <= node < sum(counts) for edge in edges for node in edge)
    if relation.degree is not None:
        assert relation.num_edges == relation.degree * relation.num_dst
    return edges


def between(rule, source_counts, target_counts):
    sources, targets = (NodeSet.from_counts(c) for c in (source_counts, target_counts))
    relation = rule(sources, targets)
    assert relation.size == (sum(source_counts), sum(target_counts))
    return set(map(tuple, relation.edge_index.T.tolist()))


def in_each_example(counts, edges_of_one):
    first, edges = 0, set()
    for count in counts:
        edges |= {(first + i, first + j) for i, j in edges_of_one(count)}
        first += count
    return edges


def fixed(edges):
    """A rule of exactly these edges, duplicates and order kept."""
    edge_index = torch.tensor(edges, dtype=torch.long).view(-1, 2).T
    return topology.rule(lambda node_set: edge_index)
