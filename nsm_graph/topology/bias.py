"""What is known of an edge becomes a bias on the scores of attention over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nsm_graph.relation import Relation
from nsm_graph.topology.base import Topology, ask
from nsm_graph.topology.checks import at_least, show_rows
from nsm_graph.topology.given import FixedEdges
from nsm_graph.topology.node_set import NodeSet


@dataclass(frozen=True, eq=False)
class Edges:
    """The edges a bias is asked for, and what is known of them.

    Args:
        relation: The edges.
        sources: Nodes they leave.
        targets: Nodes they enter.
        given: What :func:`from_edge_index` and its kind were given for them, ``[E, ...]``.
        rule: Who made them.
    """

    relation: Relation
    sources: NodeSet
    targets: NodeSet
    given: Tensor | None
    rule: Topology

    @property
    def source(self) -> Tensor:
        """``[E]``, rows of the sources."""
        return self.relation.edge_index[0]

    @property
    def target(self) -> Tensor:
        """``[E]``, rows of the targets."""
        return self.relation.edge_index[1]

    @property
    def offset(self) -> Tensor:
        """``[E]``, place of the source minus place of the target, inside their example."""
        return self.sources.position[self.source] - self.targets.position[self.target]

    @property
    def distance(self) -> Tensor:
        """``[E]``, how many places source and target lie apart."""
        return self.offset.abs()

    @property
    def attr(self) -> Tensor:
        """``[E, ...]``, the attributes that the edges were given with."""
        if self.given is None:
            raise ValueError(
                f"{self.rule!r} knows no attributes of its edges; give edge_attr to "
                f"from_edge_index(...) and call .biased(...) on that rule, then combine"
            )
        return self.given


class Biased(Topology):
    r"""A rule whose edges carry a bias: a number, or one per head, added to attention scores.

    Made by :meth:`Topology.biased`. A bias that is a module is trained with the machine.

    Args:
        rule: Makes the edges.
        bias: Takes :class:`Edges`, returns ``[E]`` or ``[E, H]``.
        is_dynamic: Whether the bias reads states or the step; a rule may be dynamic by itself.

    Example:
        >>> from nsm_graph.topology import band
        >>> rule = band(1).biased(lambda edges: -0.5 * edges.distance)   # ALiBi
        >>> rule(NodeSet.from_counts([2])).bias.sum()
        tensor(-1.)
    """

    def __init__(self, rule: Topology, bias: Callable[[Edges], Tensor], is_dynamic: bool) -> None:
        super().__init__()
        if not callable(bias):
            raise ValueError(f"biased takes a function of edges, but got {type(bias).__name__}")
        self.rule, self.bias = rule, bias
        self.is_dynamic = rule.is_dynamic or is_dynamic

    def forward(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
        relation = ask(self.rule, sources, targets)
        given = None
        if isinstance(self.rule, FixedEdges):
            given = self.rule.attributes_of(relation)
        targets = sources if targets is None else targets
        bias = self.bias(Edges(relation, sources, targets, given, self.rule))
        if not isinstance(bias, Tensor):
            raise ValueError(f"{self!r}: the bias must be a tensor, but is {type(bias).__name__}")
        try:
            return relation.with_bias(bias)
        except ValueError as error:
            raise ValueError(f"{self!r}: {error}") from None

    def __repr__(self) -> str:
        name = getattr(self.bias, "__name__", type(self.bias).__name__)
        return f"{self.rule!r}.biased({name})"


class DistanceBias(nn.Module):
    r"""A learned number for each head and each offset between source and target.

    Args:
        heads: Number of heads.
        max_distance: Offsets beyond it count as it. (default: :obj:`16`)

    Example:
        >>> from nsm_graph.topology import ring
        >>> ring(2).biased(DistanceBias(heads=4))(NodeSet.from_counts([8])).bias.shape
        torch.Size([32, 4])
    """

    def __init__(self, heads: int, max_distance: int = 16) -> None:
        super().__init__()
        at_least("DistanceBias", "heads", heads, 1)
        at_least("DistanceBias", "max_distance", max_distance, 1)
        self.max_distance = max_distance
        self.weight = nn.Parameter(torch.empty(2 * max_distance + 1, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, edges: Edges) -> Tensor:
        most = self.max_distance
        return self.weight[edges.offset.clamp(-most, most) + most]


class TypeBias(nn.Module):
    r"""A learned number for each head and each type of edge, where edges were given types.

    Args:
        heads: Number of heads.
        num_types: Number of types; attributes are integers from 0.

    Raises:
        ValueError: When asked, if the attributes are no such integers.

    Example:
        >>> from nsm_graph.topology import from_edge_index
        >>> edge_index = torch.tensor([[0, 1], [1, 2]])
        >>> chain = from_edge_index(edge_index, edge_attr=torch.tensor([0, 1]))
        >>> chain.biased(TypeBias(4, num_types=2))(NodeSet.from_counts([3])).bias.shape
        torch.Size([2, 4])
    """

    def __init__(self, heads: int, num_types: int) -> None:
        super().__init__()
        at_least("TypeBias", "heads", heads, 1)
        at_least("TypeBias", "num_types", num_types, 1)
        self.weight = nn.Parameter(torch.empty(num_types, heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, edges: Edges) -> Tensor:
        kind = edges.attr
        num_types = self.weight.size(0)
        if kind.dim() != 1 or kind.is_floating_point():
            raise ValueError(
                f"TypeBias needs one integer for each edge, but edges.attr has shape "
                f"{tuple(kind.shape)} and dtype {kind.dtype}"
            )
        is_wrong = (kind < 0) | (kind >= num_types)
        if bool(is_wrong.any()):
            raise ValueError(
                f"TypeBias knows the types 0..{num_types - 1}, but edges.attr has "
                f"{show_rows(kind, is_wrong)}"
            )
        return self.weight[kind.long()]
