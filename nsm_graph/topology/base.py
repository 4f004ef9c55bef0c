"""What a topology is: a rule that makes a relation for a node set, and its set algebra."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nsm_graph.relation import Relation
from nsm_graph.topology import sets
from nsm_graph.topology.node_set import NodeSet
from nsm_graph.topology.rows import (
    Memo,
    Rows,
    keys_of,
    relation_of_one,
    rows_from_keys,
    tile,
)
from nsm_graph.topology.summary import Summary, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from nsm_graph.topology.bias import Biased, Edges


class Topology(nn.Module):
    r"""A rule: node sets in, relation out.

    ``rule(nodes)`` gives edges among the nodes of one set; ``rule(sources, targets)`` from one set
    to another, where the rule has a meaning there. Rules compose as sets of edges: ``a | b`` holds
    the edges of either, ``a & b`` of both, ``a - b`` of the first without the second, and ``~a``
    all others inside each example. Biases are functions on edges: where two sets with biases are
    combined, the biases of an edge add up, and a set that lacks the edge adds nothing.

    Subclasses implement :meth:`forward`; :func:`rule` turns a function into a topology. A rule is
    a module, so that what it learns is trained, moved and saved with the machine that holds it.
    """

    #: Whether the rule reads the current states or the step, and must be asked at every step.
    is_dynamic: bool = False
    #: Whether the edges of an example follow from its numbers of nodes alone: see :class:`Pattern`.
    is_pattern: bool = False

    if TYPE_CHECKING:

        def __call__(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation: ...

    def forward(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
        """The edges from sources to targets; without targets among the sources."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draws anew what the rules that this one is made of have learned."""
        for part in self.children():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()

    # Algebra ####################################################################

    def __or__(self, other: Topology) -> Topology:
        return Combined(self, other, "|")

    def __and__(self, other: Topology) -> Topology:
        return Combined(self, other, "&")

    def __sub__(self, other: Topology) -> Topology:
        return Combined(self, other, "-")

    def __invert__(self) -> Topology:
        return Combined(Complete(), self, "-")

    def with_self(self) -> Topology:
        """These edges, and each node to itself."""
        return self | SelfLoops()

    def reverse(self) -> Topology:
        """The same edges the other way round; biases stay with their edges."""
        return Reversed(self)

    def power(self, k: int) -> Topology:
        """An edge to every node that lies at most k steps away; a loop only where one was.

        ``ring(1).power(3)`` is ``ring(3)``. Biases are left behind.
        """
        return Power(self, k)

    def biased(self, bias: Callable[[Edges], Tensor], *, is_dynamic: bool = False) -> Biased:
        """These edges with a bias on the scores of attention over them; see :class:`Biased`."""
        from nsm_graph.topology.bias import Biased

        return Biased(self, bias, is_dynamic)

    # What there is to see #######################################################

    def describe(self, nodes: NodeSet | int) -> Summary:
        """Degree, diameter, spectral gap, number of edges and cost on so many nodes.

        Example:
            >>> from nsm_graph.topology import ring
            >>> print(ring(2).describe(16))
            ring(2) over 16 nodes
            edges         64 (25.0% of complete)
            degree        min 4, mean 4.0, max 4
            diameter      4
            spectral gap  0.1845
        """
        nodes = NodeSet.from_counts([nodes]) if isinstance(nodes, int) else nodes
        return summarise(self(nodes), repr(self))

    def plot(self, nodes: NodeSet | int = 16, **options: Any) -> Axes:
        """Draws the edges with matplotlib; see :func:`nsm_graph.topology.drawing.draw`."""
        from nsm_graph.topology.drawing import draw

        nodes = NodeSet.from_counts([nodes]) if isinstance(nodes, int) else nodes
        return draw(self(nodes), repr(self), **options)


class Pattern(Topology):
    """A rule whose edges in an example follow from its numbers of nodes alone.

    Subclasses implement :meth:`rows` for one example. It is worked out once for each pair of
    numbers, and a batch repeats it.
    """

    is_pattern = True
    #: Whether it has a meaning from one node set to another.
    joins_two_sets = False

    def __init__(self) -> None:
        super().__init__()
        self._memo = Memo()

    def rows(self, num_src: int, num_dst: int) -> Rows:
        """The edges of one example with at least one node on each side, on the CPU."""
        raise NotImplementedError

    def forward(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
        if not self.joins_two_sets:
            targets = same_set(self, sources, targets)
        targets = sources if targets is None else targets
        check_examples(self, sources, targets)
        device = sources.ptr.device

        def one(num_src: int, num_dst: int) -> Relation:
            size = (num_src, num_dst)
            return self._memo.get(
                (*size, device), lambda: relation_of_one(rows_or_none(self, *size), size, device)
            )

        return tile(one, sources.nodes, targets.nodes)


class Complete(Pattern):
    """Every node to every node of its example, itself included."""

    joins_two_sets = True

    def rows(self, num_src: int, num_dst: int) -> Rows:
        return Rows(torch.arange(num_src).repeat(num_dst), num_src)

    def forward(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
        targets = sources if targets is None else targets
        check_examples(self, sources, targets)
        return Relation.between(sources.nodes, targets.nodes)

    def __repr__(self) -> str:
        return "complete()"


class SelfLoops(Pattern):
    """Each node to itself."""

    def rows(self, num_src: int, num_dst: int) -> Rows:
        return Rows(torch.arange(num_src), 1)

    def __repr__(self) -> str:
        return "self_loops()"


# Operations ########################################################################


class Operation(Pattern):
    """A rule made of rules: a pattern where they all are, else asked on every node set."""

    joins_two_sets = True

    def __init__(self, *parts: Topology) -> None:
        super().__init__()
        self.is_dynamic = any(part.is_dynamic for part in parts)
        self.is_pattern = all(part.is_pattern for part in parts)
        self.joins_two_sets = all(getattr(part, "joins_two_sets", True) for part in parts)

    def forward(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
        if self.is_pattern:
            return super().forward(sources, targets)
        return self.relate(sources, targets)

    def relate(self, sources: NodeSet, targets: NodeSet | None) -> Relation:
        """The edges, from the relations that the parts make."""
        raise NotImplementedError


class Combined(Operation):
    """Two rules under a set operation; duplicate edges become one."""

    def __init__(self, left: Topology, right: Topology, operator: str) -> None:
        for side in (left, right):
            if not isinstance(side, Topology):
                raise ValueError(
                    f"{operator} combines two topologies, but got {type(side).__name__}; wrap a "
                    f"function with topology.rule"
                )
        super().__init__(left, right)
        self.left, self.right, self.operator = left, right, operator

    def rows(self, num_src: int, num_dst: int) -> Rows:
        left, right = (_pattern_keys(part, num_src, num_dst) for part in (self.left, self.right))
        return rows_from_keys(sets.combine(left, right, self.operator), (num_src, num_dst))

    def relate(self, sources: NodeSet, targets: NodeSet | None) -> Relation:
        relations = [ask(part, sources, targets) for part in (self.left, self.right)]
        left, right = (_EdgeSet(relation) for relation in relations)
        keys = sets.combine(left.keys, right.keys, self.operator)
        bias = left.bias_of(keys)
        if self.operator != "-":
            other = right.bias_of(keys)
            bias = other if bias is None else bias if other is None else bias + other
        return _relation_of_keys(keys, relations, bias)

    def __repr__(self) -> str:
        return f"({self.left!r} {self.operator} {self.right!r})"


class Reversed(Operation):
    """A rule's edges the other way round."""

    def __init__(self, rule: Topology) -> None:
        super().__init__(rule)
        self.rule = rule

    def rows(self, num_src: int, num_dst: int) -> Rows:
        keys = _pattern_keys(self.rule, num_dst, num_src)
        keys = (keys % num_dst) * num_src + keys // num_dst
        return rows_from_keys(keys.sort().values, (num_src, num_dst))

    def relate(self, sources: NodeSet, targets: NodeSet | None) -> Relation:
        back = (sources,) if targets is None else (targets, sources)
        relation = ask(self.rule, *back).reverse()
        edges = _EdgeSet(relation)
        return _relation_of_keys(edges.keys, [relation], edges.bias_of(edges.keys))

    def __repr__(self) -> str:
        return f"{self.rule!r}.reverse()"


class Power(Operation):
    """An edge to every node at most k steps away."""

    def __init__(self, rule: Topology, k: int) -> None:
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"power(k) takes 1 to k steps, but k is {k}; use k >= 1")
        super().__init__(rule)
        self.rule, self.k = rule, k
        self.joins_two_sets = False

    def rows(self, num_src: int, num_dst: int) -> Rows:
        keys = _pattern_keys(self.rule, num_src, num_src)
        return rows_from_keys(sets.power(keys, num_src, self.k), (num_src, num_src))

    def relate(self, sources: NodeSet, targets: NodeSet | None) -> Relation:
        same_set(self, sources, targets)
        relation = ask(self.rule, sources)
        keys = sets.power(_EdgeSet(relation).keys, sources.num_nodes, self.k)
        return _relation_of_keys(keys, [relation], None)

    def __repr__(self) -> str:
        return f"{self.rule!r}.power({self.k})"


class _EdgeSet:
    """The edges of a relation as ascending keys, and the bias that each carries."""

    def __init__(self, relation: Relation) -> None:
        keys, self.bias = keys_of(relation), relation.bias
        is_ascending = relation.degree is not None or bool((keys.diff() > 0).all())
        if not is_ascending:
            keys, order = keys.sort(stable=True)
            is_first = torch.ones_like(keys, dtype=torch.bool)
            is_first[1:] = keys[1:] != keys[:-1]
            keys = keys[is_first]
            if self.bias is not None:
                self.bias = self.bias[order[is_first]]
        self.keys = keys

    def bias_of(self, asked: Tensor) -> Tensor | None:
        """The bias of every edge that is asked for; 0 for one that is not in the set."""
        if self.bias is None or self.keys.numel() == 0:
            return None
        bias = self.bias[sets.find(self.keys, asked)]
        return bias.masked_fill(~sets.contains(self.keys, asked).unsqueeze(1), 0.0)


def _relation_of_keys(keys: Tensor, parts: list[Relation], bias: Tensor | None) -> Relation:
    size = parts[0].size
    rows = rows_from_keys(keys, size)
    # The dense view is per example where no part leaves its examples.
    stays = all(part.targets is not None for part in parts)
    inside = (parts[0].sources, parts[0].targets) if stays else (None, None)
    relation = Relation.from_rows(*rows, size, *inside)
    return relation if bias is None else relation.with_bias(bias)


# What rules share ##################################################################


def ask(rule: Topology, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
    """What a rule says; rules about one node set are not handed a second."""
    return rule(sources) if targets is None or targets is sources else rule(sources, targets)


def rows_or_none(rule: Topology, num_src: int, num_dst: int) -> Rows:
    """A pattern's rows; an example without nodes on one side has none, whatever the rule."""
    if num_src == 0 or num_dst == 0:
        return Rows(torch.zeros(0, dtype=torch.long), 0)
    assert isinstance(rule, Pattern)
    return rule.rows(num_src, num_dst)


def _pattern_keys(rule: Topology, num_src: int, num_dst: int) -> Tensor:
    index, degree = rows_or_none(rule, num_src, num_dst)
    if isinstance(degree, int):
        target = torch.arange(num_dst).repeat_interleave(degree)
    else:
        target = torch.arange(num_dst).repeat_interleave(degree, output_size=index.numel())
    return target * num_src + index


def same_set(rule: Topology, sources: NodeSet, targets: NodeSet | None) -> NodeSet:
    """The one node set a rule is about, or a ``ValueError``."""
    if targets is None or targets is sources:
        return sources
    raise ValueError(
        f"{rule!r} joins the nodes of one set, but was asked for edges from {sources.num_nodes} "
        f"to {targets.num_nodes} nodes of two; between two sets use complete(), band(), causal(), "
        f"window(), dilated(), blocks(), knn(), radius(), top_k(), threshold(), random(), "
        f"from_edge_index(), sql() or a rule of your own with (sources, targets)"
    )


def check_examples(rule: Topology, sources: NodeSet, targets: NodeSet) -> None:
    """Raises unless both sets stand for the same examples."""
    if sources.nodes.num_examples != targets.nodes.num_examples:
        raise ValueError(
            f"{rule!r} was given {sources.nodes.num_examples} examples of sources, but "
            f"{targets.nodes.num_examples} of targets; build both from the same batch"
        )


# The two rules that the algebra itself needs ########################################


def complete() -> Topology:
    r"""Every node to every node of its example, itself included; stores no edges.

    Example:
        >>> complete()(NodeSet.from_counts([2, 3])).num_edges
        13
    """
    return Complete()


def self_loops() -> Topology:
    """Each node to itself.

    Example:
        >>> from nsm_graph.topology import ring
        >>> (ring() | self_loops())(NodeSet.from_counts([4])).num_edges
        12
    """
    return SelfLoops()
