"""Rules that users write as functions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable

from torch import Tensor

from nsm_graph.relation import Relation
from nsm_graph.topology.base import Topology, same_set
from nsm_graph.topology.node_set import NodeSet

RuleFunction = Callable[..., Relation | Tensor]


class Rule(Topology):
    """A function of one node set, or of sources and targets, that returns edges."""

    def __init__(self, function: RuleFunction, is_dynamic: bool = False) -> None:
        super().__init__()
        self.function = function
        self.is_dynamic = is_dynamic
        self.joins_two_sets = _takes_two(function)
        self.__module__ = getattr(function, "__module__", __name__)

    def __reduce__(self) -> str | tuple[type, tuple]:
        # A decorated function is found by its name, as functions are: that name is now the rule.
        name = getattr(self.function, "__qualname__", "")
        if getattr(sys.modules.get(self.__module__), name, None) is self:
            return name
        return Rule, (self.function, self.is_dynamic)

    def forward(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
        if self.joins_two_sets:
            targets = sources if targets is None else targets
            edges = self.function(sources, targets)
        else:
            targets = same_set(self, sources, targets)
            edges = self.function(sources)
        size = (sources.num_nodes, targets.num_nodes)
        if not isinstance(edges, Relation):
            try:
                return Relation.from_edge_index(edges, size)
            except ValueError as error:
                raise ValueError(f"{self!r}: {error}") from error
        if edges.size != size:
            nodes = f"{size[0]} nodes" if targets is sources else f"{size[0]} -> {size[1]} nodes"
            raise ValueError(
                f"{self!r} made a relation {edges.size[0]} -> {edges.size[1]} for {nodes}; use "
                f"nodes.num_nodes on both sides"
            )
        return edges

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", "rule")


def rule(
    function: RuleFunction | None = None, *, is_dynamic: bool = False
) -> Rule | Callable[[RuleFunction], Rule]:
    """Turns a function into a topology; use as a decorator.

    Args:
        function: Takes a :class:`NodeSet`, or two (sources and targets), and returns a relation or
            an ``edge_index`` over their nodes.
        is_dynamic: Whether it reads ``nodes.x`` or ``nodes.step`` and must be asked at every step.

    Example:
        >>> import torch
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


def _takes_two(function: RuleFunction) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters) == 2
