"""Rules that hold edges somebody gives: an edge_index, a matrix, a networkx graph, PyG data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsm_graph.edge_lists import show_edges
from nsm_graph.relation import Relation
from nsm_graph.topology.base import Pattern, Topology
from nsm_graph.topology.checks import as_cpu_index
from nsm_graph.topology.rows import Rows, rows_from_keys

if TYPE_CHECKING:
    from torch_geometric.data import Data


def from_edge_index(
    edge_index: Tensor,
    num_nodes: int | tuple[int, int] | None = None,
    *,
    edge_attr: Tensor | None = None,
) -> Topology:
    r"""The same fixed edges in every example; nodes count from 0 inside the example.

    Args:
        edge_index: ``[2, E]``, as PyG has it. Repeated edges count once.
        num_nodes: Nodes of an example, or the pair of its sources and targets; ``None`` for the
            largest index plus one. An example without nodes has no edges.
        edge_attr: What is known of each edge (a type, a length), ``[E, ...]``; a bias reads it
            as ``edges.attr``, see :meth:`Topology.biased`. (default: :obj:`None`)

    Raises:
        ValueError: If an index is wrong, there are neither edges nor ``num_nodes``, or repeated
            edges have attributes of their own; when asked, if an example has other numbers of
            nodes.

    Example:
        >>> chain = from_edge_index(torch.tensor([[0, 1], [1, 2]]))
        >>> chain(NodeSet.from_counts([3, 3])).edge_index
        tensor([[0, 1, 3, 4],
                [1, 2, 4, 5]])
    """
    return FixedEdges(edge_index, num_nodes, edge_attr)


def from_adjacency(adjacency: Any, *, weights: bool = False) -> Topology:
    r"""The entries of a matrix that are not zero: row i, column j is an edge from i to j.

    Args:
        adjacency: ``[N, N]`` (or ``[sources, targets]``): a tensor, dense or sparse, or anything
            that numpy can read.
        weights: Keep the entries as attributes of the edges. (default: :obj:`False`)

    Example:
        >>> from_adjacency([[0, 1], [0, 0]])(NodeSet.from_counts([2])).edge_index
        tensor([[0],
                [1]])
    """
    if hasattr(adjacency, "toarray"):  # scipy's sparse matrices
        adjacency = adjacency.toarray()
    matrix = torch.as_tensor(adjacency)
    matrix = matrix if matrix.layout == torch.strided else matrix.to_dense()
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(
            f"from_adjacency needs a matrix with at least one row and column, but got shape "
            f"{tuple(matrix.shape)}"
        )
    is_nan = matrix.isnan()
    if bool(is_nan.any()):
        row, column = is_nan.nonzero()[0].tolist()
        raise ValueError(
            f"from_adjacency cannot tell whether NaN is an edge: {int(is_nan.sum())} entries are, "
            f"the first at row {row}, column {column}"
        )
    edge_index = matrix.nonzero().T
    attr = matrix[edge_index[0], edge_index[1]] if weights else None
    num_src, num_dst = matrix.shape
    size = num_src if num_src == num_dst else (num_src, num_dst)
    return FixedEdges(edge_index, size, attr, "from_adjacency")


def from_networkx(graph: Any, *, attribute: str | None = None) -> Topology:
    r"""The edges of a networkx graph, nodes in its order; undirected ones run both ways.

    Args:
        graph: A ``networkx.Graph`` or ``DiGraph``.
        attribute: Name of an edge attribute (a number) to keep. (default: :obj:`None`)

    Raises:
        ValueError: If it has no nodes, or an edge lacks the attribute.

    Example:
        >>> import networkx as nx
        >>> from_networkx(nx.petersen_graph()).describe(10).diameter
        2.0
    """
    if not hasattr(graph, "is_directed") or not hasattr(graph, "nodes"):
        raise ValueError(f"from_networkx needs a networkx graph, but got {type(graph).__name__}")
    row = {node: i for i, node in enumerate(graph.nodes)}
    if not row:
        raise ValueError("from_networkx got a graph without nodes; add at least one")
    edges, values = [], []
    for source, target, data in graph.edges(data=True):
        if attribute is not None and attribute not in data:
            raise ValueError(
                f"from_networkx was asked for the attribute {attribute!r}, but the edge "
                f"{source!r} -> {target!r} has {sorted(map(str, data)) or 'none'}"
            )
        both = not graph.is_directed() and source != target
        for i, j in ((source, target), (target, source))[: 1 + both]:
            edges.append((row[i], row[j]))
            values.append(None if attribute is None else data[attribute])
    edge_index = torch.tensor(edges, dtype=torch.long).view(-1, 2).T
    attr = None if attribute is None else torch.tensor(values)
    return FixedEdges(edge_index, len(row), attr, "from_networkx")


def from_data(data: Data) -> Topology:
    r"""The edges of a PyG ``Data``, with its ``edge_attr`` where it has one.

    Raises:
        ValueError: If it has no ``edge_index``, or no nodes.

    Example:
        >>> from torch_geometric.data import Data
        >>> from_data(Data(edge_index=torch.tensor([[0], [2]]), num_nodes=4))
        from_data(1 edges, 4 nodes)
    """
    if getattr(data, "edge_index", None) is None:
        raise ValueError(f"from_data needs an edge_index, but got {data!r}")
    return FixedEdges(data.edge_index, data.num_nodes, data.edge_attr, "from_data")


class FixedEdges(Pattern):
    """Edges of one example, with what is known of them."""

    def __init__(
        self,
        edge_index: Tensor,
        num_nodes: int | tuple[int, int] | None,
        edge_attr: Tensor | None = None,
        name: str = "from_edge_index",
    ) -> None:
        super().__init__()
        self.name = name
        size = (num_nodes, num_nodes) if isinstance(num_nodes, int) else num_nodes
        try:
            relation = Relation.from_edge_index(edge_index, size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if num_nodes is None:
            size = (max(relation.size),) * 2
        assert size is not None
        if min(size) == 0:
            raise ValueError(
                f"{name} got an empty graph of {size[0]} -> {size[1]} nodes; give it edges, or say "
                f"with num_nodes= how many nodes an example has"
            )
        self.size = (int(size[0]), int(size[1]))
        self.joins_two_sets = not isinstance(num_nodes, int) and num_nodes is not None
        src, dst = as_cpu_index(relation.edge_index)
        keys, order = (dst * self.size[0] + src).sort(stable=True)
        is_first = torch.ones_like(keys, dtype=torch.bool)
        is_first[1:] = keys[1:] != keys[:-1]
        self.keys = keys[is_first]
        self.edge_attr: Tensor | None
        attr = None
        if edge_attr is not None:
            if edge_attr.dim() == 0 or edge_attr.size(0) != keys.numel():
                raise ValueError(
                    f"{name} needs one row of edge_attr for each of the {keys.numel()} edges, but "
                    f"it has shape {tuple(edge_attr.shape)}"
                )
            if not bool(is_first.all()):
                is_repeated = torch.zeros_like(is_first)
                is_repeated[order[~is_first]] = True
                raise ValueError(
                    f"{name} got edges more than once, each with attributes of its own; keep one "
                    f"({show_edges(torch.stack([src, dst]), is_repeated)})"
                )
            attr = edge_attr[order.to(edge_attr.device)]
        self.register_buffer("edge_attr", attr, persistent=False)

    def rows(self, num_src: int, num_dst: int) -> Rows:
        if (num_src, num_dst) != self.size:
            sources, targets = self.size
            nodes = f"{sources}" if not self.joins_two_sets else f"{sources} -> {targets}"
            counts = f"{num_src}" if num_src == num_dst else f"{num_src} -> {num_dst}"
            raise ValueError(
                f"{self!r} is for examples of {nodes} nodes, but one has {counts}; make a topology "
                f"for that node count"
            )
        return rows_from_keys(self.keys, self.size)

    def attributes_of(self, relation: Relation) -> Tensor | None:
        """The attributes of a relation that this rule made, in its order."""
        if self.edge_attr is None:
            return None
        num_examples = relation.num_edges // max(self.keys.numel(), 1)
        attr = self.edge_attr.to(relation.device)
        return attr.repeat(num_examples, *[1] * (attr.dim() - 1))

    def __repr__(self) -> str:
        sources, targets = self.size
        nodes = f"{sources} -> {targets}" if self.joins_two_sets else f"{sources}"
        return f"{self.name}({self.keys.numel()} edges, {nodes} nodes)"
