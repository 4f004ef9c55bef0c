"""What may stand for a shadow graph, and the edges it means for given pages."""

from __future__ import annotations

from torch import Tensor

from nsm_graph.partition import Partition, ptr_from_batch
from nsm_graph.relation import Relation
from nsm_graph.topology import NodeSet, Topology

#: A rule, a relation over all pages of the batch, or PyG's ``edge_index`` over them.
ShadowGraph = Topology | Relation | Tensor


def check_shadow_graph(shadow_graph: object) -> None:
    """Raises unless it is something that edges follow from."""
    if isinstance(shadow_graph, Topology | Relation | Tensor):
        return
    raise ValueError(
        f"shadow_graph must be a topology, a Relation or an edge_index, but is {shadow_graph!r}; "
        f"use nsm_graph.topology, or wrap a function with topology.rule"
    )


def partition_of(batch: Tensor | Partition | None, pages: Tensor) -> Partition:
    """How the pages fall into examples, or a ``ValueError``."""
    num_pages = pages.size(0)
    if num_pages == 0:
        raise ValueError("pages has no rows: an empty graph; give it at least one page")
    if batch is None:
        return Partition.uniform(1, num_pages, pages.device)
    if isinstance(batch, Partition):
        examples = batch
    else:
        batch_size = int(batch.max()) + 1 if batch.numel() > 0 else 0
        examples = Partition.from_ptr(ptr_from_batch(batch, batch_size))
    if examples.num_rows != num_pages:
        raise ValueError(f"batch has {examples.num_rows} entries, but pages has {num_pages} rows")
    return examples


def node_set(
    examples: Partition, pages: Tensor, step: int, attributes: dict[str, Tensor] | None
) -> NodeSet:
    """What a rule is asked about: the pages as they are before a pass."""
    return NodeSet(examples, x=pages, step=step, attributes=attributes or {})


def is_fixed(shadow_graph: ShadowGraph) -> bool:
    """Whether every pass has the same edges."""
    return not (isinstance(shadow_graph, Topology) and shadow_graph.is_dynamic)


def edges_of(shadow_graph: ShadowGraph, nodes: NodeSet) -> Relation:
    """The relation that a shadow graph means for these pages, or a ``ValueError`` naming it."""
    size = (nodes.num_nodes, nodes.num_nodes)
    if isinstance(shadow_graph, Topology):
        relation = shadow_graph(nodes)
    elif isinstance(shadow_graph, Relation):
        relation = shadow_graph
    else:
        try:
            relation = Relation.from_edge_index(shadow_graph, size)
        except ValueError as error:
            raise ValueError(f"shadow_graph: {error}") from error
    if relation.size != size:
        raise ValueError(
            f"shadow_graph: {_name(shadow_graph)} goes from {relation.num_src} to "
            f"{relation.num_dst} nodes, but there are {size[0]} pages; make it for the same batch"
        )
    if relation.num_edges == 0:
        raise ValueError(
            f"shadow_graph: {_name(shadow_graph)} has no edge among the {size[0]} pages; nothing "
            f"would be routed. Add edges, for example with topology.self_loops()"
        )
    return relation


def _name(shadow_graph: ShadowGraph) -> str:
    return "the edge_index" if isinstance(shadow_graph, Tensor) else repr(shadow_graph)
