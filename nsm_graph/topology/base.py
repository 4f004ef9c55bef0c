"""What a topology is: a rule that makes a relation for a node set, and its set algebra."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nsm_graph.partition import Partition
from nsm_graph.relation import Relation


@dataclass(frozen=True, eq=False)
class NodeSet:
    """The nodes a rule is applied to.

    Args:
        nodes: How the nodes fall into examples.
        x: Current features (the states), ``[N, C]``, for dynamic rules.
        slots: Slot of each node, ``[N]``.
        step: Which segment or pass this is.
        attributes: Anything else a rule wants to read, one row per node.
    """

    nodes: Partition
    x: Tensor | None = None
    slots: Tensor | None = None
    step: int = 0
    attributes: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def from_counts(cls, counts: list[int], x: Tensor | None = None) -> NodeSet:
        """A node set with the given number of nodes in each example."""
        if min(counts, default=0) < 0 or (x is not None and x.size(0) != sum(counts)):
            rows = "" if x is None else f", and one row of x for each ({x.size(0)} given)"
            raise ValueError(f"counts must be numbers of nodes{rows}, but are {counts}")
        ptr = torch.tensor([0, *counts], device=None if x is None else x.device).cumsum(0)
        return cls(Partition.from_ptr(ptr), x)

    @property
    def ptr(self) -> Tensor:
        return self.nodes.ptr

    @property
    def num_nodes(self) -> int:
        return self.nodes.num_rows

    @property
    def batch(self) -> Tensor:
        """The example of every node, ``[N]``."""
        return self.nodes.batch

    @property
    def position(self) -> Tensor:
        """The index of every node inside its example, ``[N]``."""
        return self.nodes.place


class Topology:
    r"""A rule: node set in, relation among its nodes out.

    Subclasses implement :meth:`__call__`; :func:`rule` turns a function into a topology. Rules
    compose as sets of edges: ``a | b`` holds the edges of either, ``a & b`` of both, ``a - b`` of
    the first without the second, and ``~a`` all others inside each example.
    """

    #: Whether the rule reads the current states or the step, and must be asked at every step.
    is_dynamic: bool = False

    def __call__(self, nodes: NodeSet) -> Relation:
        raise NotImplementedError

    def __or__(self, other: Topology) -> Topology:
        return Combined(self, other, "|")

    def __and__(self, other: Topology) -> Topology:
        return Combined(self, other, "&")

    def __sub__(self, other: Topology) -> Topology:
        return Combined(self, other, "-")

    def __invert__(self) -> Topology:
        return Combined(Complete(), self, "-")


class Complete(Topology):
    """Every node to every node of its example, itself included."""

    def __call__(self, nodes: NodeSet) -> Relation:
        return Relation.between(nodes.nodes, nodes.nodes)

    def __repr__(self) -> str:
        return "complete()"


class Combined(Topology):
    """Two rules under a set operation; duplicate edges become one."""

    def __init__(self, left: Topology, right: Topology, operator: str) -> None:
        for side in (left, right):
            if not isinstance(side, Topology):
                raise ValueError(
                    f"{operator} combines two topologies, but got {type(side).__name__}; wrap a "
                    f"function with topology.rule"
                )
        self.left, self.right, self.operator = left, right, operator
        self.is_dynamic = left.is_dynamic or right.is_dynamic

    def __call__(self, nodes: NodeSet) -> Relation:
        relations = self.left(nodes), self.right(nodes)
        left, right = (_edge_keys(relation) for relation in relations)
        if self.operator == "|":
            keys = torch.cat([left, right]).unique()
        else:
            is_shared = torch.isin(left, right)
            keys = left[is_shared if self.operator == "&" else ~is_shared].unique()
        # Keys sort by target, then by source.
        num_nodes = max(nodes.num_nodes, 1)
        edge_index = torch.stack([keys % num_nodes, keys // num_nodes])
        if any(relation.targets is None for relation in relations):
            return Relation(edge_index, (nodes.num_nodes, nodes.num_nodes))
        return relation_inside(nodes, edge_index)

    def __repr__(self) -> str:
        return f"({self.left!r} {self.operator} {self.right!r})"


class Rule(Topology):
    """A function of a node set that returns a relation or an ``edge_index``."""

    def __init__(
        self, function: Callable[[NodeSet], Relation | Tensor], is_dynamic: bool = False
    ) -> None:
        self.function = function
        self.is_dynamic = is_dynamic
        self.__module__ = getattr(function, "__module__", __name__)

    def __reduce__(self) -> str | tuple[type, tuple]:
        # A decorated function is found by its name, as functions are: that name is now the rule.
        name = getattr(self.function, "__qualname__", "")
        if getattr(sys.modules.get(self.__module__), name, None) is self:
            return name
        return Rule, (self.function, self.is_dynamic)

    def __call__(self, nodes: NodeSet) -> Relation:
        edges = self.function(nodes)
        size = (nodes.num_nodes, nodes.num_nodes)
        if not isinstance(edges, Relation):
            try:
                return Relation.from_edge_index(edges, size)
            except ValueError as error:
                raise ValueError(f"{self!r}: {error}") from error
        if edges.size != size:
            raise ValueError(
                f"{self!r} made a relation {edges.size[0]} -> {edges.size[1]} for "
                f"{nodes.num_nodes} nodes; use nodes.num_nodes on both sides"
            )
        return edges

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", "rule")


def rule(
    function: Callable[[NodeSet], Relation | Tensor] | None = None, *, is_dynamic: bool = False
) -> Rule | Callable[[Callable[[NodeSet], Relation | Tensor]], Rule]:
    """Turns a function into a topology; use as a decorator.

    Args:
        function: Takes a :class:`NodeSet`, returns a relation or an ``edge_index`` over its nodes.
        is_dynamic: Whether it reads ``nodes.x`` or ``nodes.step`` and must be asked at every step.

    Example:
        >>> @rule
        ... def chain(nodes):
        ...     i = torch.arange(nodes.num_nodes - 1)
        ...     edges = torch.stack([i, i + 1])
        ...     return edges[:, nodes.batch[i] == nodes.batch[i + 1]]
        >>> chain(NodeSet.from_counts([2, 3])).edge_index
        tensor([[0, 2, 3],
                [1, 3, 4]])
    """
    if function is None:
        return lambda wrapped: Rule(wrapped, is_dynamic)
    return Rule(function, is_dynamic)


def relation_inside(nodes: NodeSet, edge_index: Tensor) -> Relation:
    """A general relation of edges that stay inside examples; its dense view is per example."""
    size = (nodes.num_nodes, nodes.num_nodes)
    return Relation(edge_index, size, nodes.nodes, nodes.nodes)


def _edge_keys(relation: Relation) -> Tensor:
    src, dst = relation.edge_index
    return dst * max(relation.num_src, 1) + src
