"""Rules that read the current states and are asked again at every step.

The choice of edges carries no gradient; the attention over them does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nsm_graph.ops.nearest import MEASURES, alike, nearest
from nsm_graph.ops.nearest.reference import best
from nsm_graph.relation import Relation
from nsm_graph.topology.base import Topology, check_examples
from nsm_graph.topology.checks import at_least, check_enough, check_states
from nsm_graph.topology.node_set import NodeSet
from nsm_graph.topology.rows import rows_from_keys

#: Scores ``[B, N, M]`` of targets ``[B, N, C]`` and sources ``[B, M, C]``; larger is more alike.
Score = Callable[[Tensor, Tensor], Tensor]


def knn(k: int = 4, *, metric: str = "euclidean") -> Topology:
    r"""Each node from its k nearest others in the current states.

    Ties go to the lowest index; an example without nodes has no edges. From one node set to
    another, each target from its k nearest sources.

    Args:
        k: How many.
        metric: ``"euclidean"``, or ``"cosine"`` to compare directions.
            (default: :obj:`"euclidean"`)

    Raises:
        ValueError: If ``k`` or ``metric`` is wrong; when asked, if there are no states, or an
            example has no more than ``k`` nodes.

    Example:
        >>> states = torch.tensor([[0.0], [1.0], [5.0]])
        >>> knn(1)(NodeSet.from_counts([3], states)).edge_index
        tensor([[1, 0, 1],
                [0, 1, 2]])
    """
    if k < 1:
        raise ValueError(f"knn(k) needs at least one neighbour, but k is {k}; use k >= 1")
    _check_metric("knn", metric)
    name = f"knn({k})" if metric == "euclidean" else f"knn({k}, metric={metric!r})"
    return MostAlike(name, k, metric, without_self=True)


def top_k(k: int = 4, score: str | Score = "attention") -> Topology:
    r"""Each node from the k that it would attend to most, itself included.

    Args:
        k: How many.
        score: ``"attention"`` for :math:`s_j \cdot s_i / \sqrt{C}`, or a function of targets
            ``[B, N, C]`` and sources ``[B, M, C]`` that gives ``[B, N, M]``, such as
            ``communication.scores`` of an :class:`nsm_graph.nn.StateCommunication`.
            (default: :obj:`"attention"`)

    Raises:
        ValueError: As :func:`knn`, but k may be the number of nodes.

    Example:
        >>> states = torch.tensor([[2.0], [1.0], [-1.0]])
        >>> top_k(1)(NodeSet.from_counts([3], states)).edge_index
        tensor([[0, 0, 2],
                [0, 1, 2]])
    """
    at_least("top_k(k)", "k", k, 1)
    return MostAlike(f"top_k({k}{_name_of(score)})", k, score)


def radius(r: float, *, metric: str = "euclidean") -> Topology:
    r"""Each node from all others at a distance of at most ``r`` in the current states.

    Args:
        r: The distance; for ``"cosine"`` that between the points where the directions meet the
            unit sphere, 0 to 2.
        metric: As in :func:`knn`. (default: :obj:`"euclidean"`)

    Example:
        >>> states = torch.tensor([[0.0], [1.0], [5.0]])
        >>> radius(2.0)(NodeSet.from_counts([3], states)).edge_index
        tensor([[1, 0],
                [0, 1]])
    """
    if not r >= 0:
        raise ValueError(f"radius(r) needs a distance r >= 0, but r is {r}")
    _check_metric("radius", metric)
    name = f"radius({r})" if metric == "euclidean" else f"radius({r}, metric={metric!r})"
    return AlikeEnough(name, -(float(r) ** 2), metric, without_self=True)


def threshold(least: float, score: str | Score = "attention") -> Topology:
    r"""Each node from all whose score is at least so much, itself included if its own is.

    Args:
        least: The smallest score that makes an edge.
        score: As in :func:`top_k`, or ``"cosine"`` for the cosine of the angle between states.
            (default: :obj:`"attention"`)

    Example:
        >>> states = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> threshold(0.5, "cosine")(NodeSet.from_counts([3], states)).num_edges
        7
    """
    name = f"threshold({least}{_name_of(score)})"
    if score == "cosine":
        # On the unit sphere: |a - b|^2 = 2 - 2 cos.
        return AlikeEnough(name, 2.0 * least - 2.0, "cosine")
    return AlikeEnough(name, least, score)


class _ByStates(Topology):
    """What rules that compare states share."""

    is_dynamic = True

    def __init__(self, name: str, score: str | Score) -> None:
        super().__init__()
        self.name = name
        if isinstance(score, str) and score not in MEASURES:
            known = ", ".join(map(repr, MEASURES))
            raise ValueError(
                f"{name}: score must be one of {known} or a function, but is {score!r}"
            )
        if not isinstance(score, str) and not callable(score):
            raise ValueError(f"{name}: score must be a name or a function, but is {score!r}")
        self.score = score

    def _states(self, sources: NodeSet, targets: NodeSet) -> tuple[Tensor, Tensor]:
        """Of targets and sources, ready to be compared."""
        check_examples(self, sources, targets)
        # Distances do not exist in 16 bits.
        rows = [check_states(self, nodes) for nodes in (targets, sources)]
        rows = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in rows]
        if isinstance(self.score, str):
            rows = [MEASURES[self.score].prepare(x) for x in rows]
            if rows[0].size(1) != rows[1].size(1):
                raise ValueError(
                    f"{self!r} compares states of equal width, but targets have {rows[0].size(1)} "
                    f"channels and sources {rows[1].size(1)}; project one"
                )
        return rows[0], rows[1]

    def _scores(self, x: Tensor, y: Tensor, sources: NodeSet, targets: NodeSet) -> Tensor:
        """By the user's function, ``[B, N, M]``; minus infinity for what is no source."""
        assert callable(self.score)
        x, y = targets.nodes.pad(x), sources.nodes.pad(y)
        with torch.no_grad():
            scores = self.score(x, y)
        shape = (x.size(0), x.size(1), y.size(1))
        if not isinstance(scores, Tensor) or scores.shape != shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"{self!r}: the score function must give (examples, targets, sources), {shape}, "
                f"but gave {got}"
            )
        if sources.nodes.is_uniform:
            return scores
        return scores.masked_fill(~sources.nodes.mask().unsqueeze(1), -torch.inf)

    def __repr__(self) -> str:
        return self.name


class MostAlike(_ByStates):
    """A fixed number of sources for every target."""

    def __init__(self, name: str, k: int, score: str | Score, without_self: bool = False) -> None:
        super().__init__(name, score)
        self.k, self.without_self = k, without_self

    def forward(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
        targets = sources if targets is None else targets
        without_self = self.without_self and sources is targets
        x, y = self._states(sources, targets)
        check_enough(self, self.k + int(without_self), sources, targets)
        nodes = (targets.nodes, sources.nodes)
        if isinstance(self.score, str):
            measure = MEASURES[self.score]
            index = nearest(x, y, self.k, measure, *nodes, without_self=without_self)
        else:
            chosen = best(self._scores(x, y, sources, targets), self.k).sort(-1).values
            index = targets.nodes.unpad(chosen + sources.ptr[:-1].view(-1, 1, 1))
        size = (sources.num_nodes, targets.num_nodes)
        return Relation.from_rows(index.flatten(), self.k, size, sources.nodes, targets.nodes)


class AlikeEnough(_ByStates):
    """All sources that are similar enough."""

    def __init__(
        self, name: str, least: float, score: str | Score, without_self: bool = False
    ) -> None:
        super().__init__(name, score)
        self.least, self.without_self = least, without_self

    def forward(self, sources: NodeSet, targets: NodeSet | None = None) -> Relation:
        targets = sources if targets is None else targets
        without_self = self.without_self and sources is targets
        x, y = self._states(sources, targets)
        nodes = (targets.nodes, sources.nodes)
        if isinstance(self.score, str):
            measure = MEASURES[self.score]
            target, source = alike(x, y, self.least, measure, *nodes, without_self=without_self)
        else:
            is_edge = self._scores(x, y, sources, targets) >= self.least
            is_edge = is_edge & targets.nodes.mask().unsqueeze(2)
            example, target, source = is_edge.nonzero(as_tuple=True)
            target, source = target + targets.ptr[example], source + sources.ptr[example]
        size = (sources.num_nodes, targets.num_nodes)
        rows = rows_from_keys(target * size[0] + source, size)
        return Relation.from_rows(*rows, size, sources.nodes, targets.nodes)


def _check_metric(rule: str, metric: str) -> None:
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f'{rule}: metric must be "euclidean" or "cosine", but is {metric!r}')


def _name_of(score: str | Score) -> str:
    if score == "attention":
        return ""
    if isinstance(score, str):
        return f", {score!r}"
    if isinstance(score, nn.Module):
        return f", {type(score).__name__}"
    return f", {getattr(score, '__qualname__', 'score')}"
