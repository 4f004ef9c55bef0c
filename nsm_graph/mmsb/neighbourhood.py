"""Whom a change reaches: the shadow graph by source, and a few of its rows by target.

A rule whose sources are a range of places (``complete``, ``causal``, ``window``, ``band``) answers
by arithmetic; nothing is built for the pages that a change does not reach. Any other answers from
its edges, which it lists once.

Legend: P pages, R of them asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nsm_graph.mmsb.row_set import RowSet
from nsm_graph.mmsb.shadow_graph import ShadowGraph, edges_of
from nsm_graph.partition import Partition
from nsm_graph.relation import Relation
from nsm_graph.topology import NodeSet
from nsm_graph.topology.base import Complete
from nsm_graph.topology.rows import rows_from_ranges
from nsm_graph.topology.spans import Span
from nsm_graph.topology.stepwise import Scheduled

#: A block of targets and sources is dense if at least this share of it holds edges.
MIN_DENSE_FILL = 0.5
#: A pass that reaches more than this share of the pages is computed as a whole (measured with 128
#: channels: parts of a window or a ring take as long at 0.8).
WHOLE_SHARE = 0.8
#: The same where the parts have a mask, and the whole has an operation that leaves half out.
WHOLE_SHARE_CAUSAL = 0.5
#: A block with a mask holds at most so many pairs; more targets make several blocks. A mask of all
#: targets would take memory that grows with the square of the pages.
MAX_MASKED_PAIRS = 2**20


class Incoming(NamedTuple):
    """The edges that enter some pages."""

    relation: Relation  #: from the sources in the one range to the targets in the other
    sources: slice
    targets: slice  #: of the R pages that were asked about


class Neighbourhood(Protocol):
    """What delta propagation asks a shadow graph."""

    @property
    def whole_share(self) -> float:
        """From which share of the pages on it is cheaper to compute all."""
        ...

    def reached_by(self, changed: RowSet) -> RowSet:
        """Pages that an edge enters from a changed one, and the changed ones themselves."""
        ...

    def into(self, rows: RowSet) -> list[Incoming]:
        """All edges that enter these pages, in one part or several with targets of their own."""
        ...


def neighbourhood_of(
    shadow_graph: ShadowGraph, nodes: NodeSet, relation: Relation | None = None
) -> Neighbourhood:
    """The cheapest way to ask a shadow graph about these pages; it may have given its relation."""
    by_range = range_neighbourhood(shadow_graph, nodes.step, nodes.nodes)
    if by_range is not None:
        return by_range
    relation = edges_of(shadow_graph, nodes) if relation is None else relation
    if relation.bias is None and relation.sources is relation.targets is not None:
        if relation.is_complete:
            return RangeNeighbourhood(relation.sources, None, None)
        if relation.is_causal:
            return RangeNeighbourhood(relation.sources, None, 0)
    return ListedNeighbourhood(relation)


def range_neighbourhood(
    shadow_graph: ShadowGraph, step: int, examples: Partition
) -> RangeNeighbourhood | None:
    """The answer by arithmetic, where the rule has one."""
    while isinstance(shadow_graph, Scheduled):
        shadow_graph = shadow_graph.at(step)
    if isinstance(shadow_graph, Complete):
        return RangeNeighbourhood(examples, None, None)
    if isinstance(shadow_graph, Span):
        return RangeNeighbourhood(examples, shadow_graph.before, shadow_graph.after)
    return None


@dataclass(frozen=True, eq=False)
class RangeNeighbourhood:
    """Sources from so many places before a page to so many after it; ``None`` for all."""

    examples: Partition
    before: int | None
    after: int | None

    @property
    def whole_share(self) -> float:
        is_causal = self.before is None and self.after == 0
        return WHOLE_SHARE_CAUSAL if is_causal else WHOLE_SHARE

    @property
    def is_long(self) -> bool:
        """Whether a page hears all on one side: its edges are blocks rather than lists."""
        return self.before is None or self.after is None

    @property
    def _reach(self) -> tuple[int, int]:
        most = self.examples.num_rows
        before = most if self.before is None else self.before
        return before, most if self.after is None else self.after

    def reached_by(self, changed: RowSet) -> RowSet:
        before, after = self._reach
        num_pages = self.examples.num_rows
        if changed.count == 0:
            return changed
        if self.examples.num_examples == 1 and changed.index is None:
            start, stop = max(changed.start - after, 0), min(changed.stop + before, num_pages)
            return RowSet(start, stop)
        # A change at s reaches s - after ... s + before: one more from the first, one less from
        # the one behind the last.
        rows = changed.rows(self.examples.ptr.device)
        low, high = self._bounds(rows)
        steps = torch.zeros(num_pages + 1, dtype=torch.long, device=rows.device)
        one = torch.ones_like(rows)
        steps.index_add_(0, torch.maximum(rows - after, low), one)
        steps.index_add_(0, torch.minimum(rows + before + 1, high), -one)
        return RowSet.where(steps[:-1].cumsum(0) > 0)

    def into(self, rows: RowSet) -> list[Incoming]:
        if self.examples.num_examples == 1 and rows.index is None:
            return self._into_neighbours(rows, 0)
        return self._into_each(rows) or [self._into_any(rows)]

    def ranges(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """First source of each page, and the one behind its last."""
        before, after = self._reach
        low, high = self._bounds(rows)
        return torch.maximum(rows - before, low), torch.minimum(rows + after + 1, high)

    def _bounds(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        ptr = self.examples.ptr
        example = torch.searchsorted(ptr, rows, right=True) - 1
        return ptr[example], ptr[example + 1]

    def _into_neighbours(self, rows: RowSet, first_target: int) -> list[Incoming]:
        """Neighbouring pages of a single example: their sources are a range as well."""
        before, after = self._reach
        num_pages, device = self.examples.num_rows, self.examples.ptr.device
        start, last = rows.start, rows.stop - 1
        low, high = max(start - before, 0), min(last + after + 1, num_pages)
        sources = Partition.uniform(1, high - low, device)
        targets = Partition.uniform(1, rows.count, device)
        where = slice(low, high), slice(first_target, first_target + rows.count)
        if max(last - before, 0) == low and min(start + after + 1, num_pages) == high:
            return [Incoming(Relation.between(sources, targets), *where)]
        page = torch.arange(start, rows.stop, device=device)
        first = (page - before).clamp(min=0) - low
        end = (page + after + 1).clamp(max=num_pages) - low
        num_pairs = rows.count * (high - low)
        if int((end - first).sum()) < MIN_DENSE_FILL * num_pairs:
            size = (high - low, rows.count)
            listed = Relation.from_rows(*rows_from_ranges(first, end), size, sources, targets)
            return [Incoming(listed, *where)]
        if num_pairs > MAX_MASKED_PAIRS and rows.count > 1:
            num_rows = max(MAX_MASKED_PAIRS // (high - low), 1)
            return [
                part
                for at in range(start, rows.stop, num_rows)
                for part in self._into_neighbours(
                    RowSet(at, min(at + num_rows, rows.stop)), first_target + at - start
                )
            ]
        return [Incoming(_masked_block(first, end, sources, targets), *where)]

    def _into_each(self, rows: RowSet) -> list[Incoming]:
        """Example by example, where that is little to do at a time: neighbours in each, many pairs.

        Empty where another way is better.
        """
        page, ptr = rows.rows(self.examples.ptr.device), self.examples.ptr
        ends, starts = torch.searchsorted(page, ptr).tolist(), ptr.tolist()
        touched = [b for b in range(len(starts) - 1) if ends[b] < ends[b + 1]]
        sizes = [(ends[b + 1] - ends[b]) * (starts[b + 1] - starts[b]) for b in touched]
        if sum(sizes) <= MAX_MASKED_PAIRS:
            return []
        parts: list[Incoming] = []
        for b in touched:
            first, last = int(page[ends[b]]), int(page[ends[b + 1] - 1])
            if last - first + 1 != ends[b + 1] - ends[b]:
                return []
            alone = Partition.uniform(1, starts[b + 1] - starts[b], ptr.device)
            own = RangeNeighbourhood(alone, self.before, self.after)
            inside = RowSet(first - starts[b], last + 1 - starts[b])
            for part in own._into_neighbours(inside, ends[b]):
                moved = slice(part.sources.start + starts[b], part.sources.stop + starts[b])
                parts.append(part._replace(sources=moved))
        return parts

    def _into_any(self, rows: RowSet) -> Incoming:
        page = rows.rows(self.examples.ptr.device)
        ends = torch.searchsorted(page, self.examples.ptr)
        targets = Partition.from_ptr(ends)
        every_source, every_target = slice(0, self.examples.num_rows), slice(0, rows.count)
        block = Relation.between(self.examples, targets)
        if self.before is None and self.after is None:
            return Incoming(block, every_source, every_target)
        first, end = self.ranges(page)
        if int((end - first).sum()) < MIN_DENSE_FILL * block.num_edges:
            low, high = int(first.min()), int(end.max())
            listed = rows_from_ranges(first - low, end - low)
            relation = Relation.from_rows(*listed, (high - low, rows.count))
            return Incoming(relation, slice(low, high), every_target)
        masked = _masked_block(first, end, self.examples, targets)
        return Incoming(masked, every_source, every_target)


def _masked_block(first: Tensor, end: Tensor, sources: Partition, targets: Partition) -> Relation:
    """Every pair of an example, and those outside of the ranges masked."""
    block = Relation.between(sources, targets)
    if sources.num_examples == 1:
        source = torch.arange(sources.num_rows, device=first.device)
        is_absent = (source < first.unsqueeze(1)) | (source >= end.unsqueeze(1))
    else:
        source, target = block.edge_index
        is_absent = (source < first[target]) | (source >= end[target])
    bias = torch.zeros(block.num_edges, device=first.device)
    return block.with_bias(bias.masked_fill_(is_absent.flatten(), -torch.inf))


@dataclass(frozen=True, eq=False)
class ListedNeighbourhood:
    """Answers from the edges; those by source are sorted when first asked for."""

    relation: Relation

    @property
    def whole_share(self) -> float:
        return WHOLE_SHARE

    def reached_by(self, changed: RowSet) -> RowSet:
        if changed.count == 0:
            return changed
        num_pages, device = self.relation.num_dst, self.relation.device
        is_reached = changed.mask(num_pages, device)
        ptr, target, _ = self.relation.csc
        edges, _ = listed_edges(ptr, changed.rows(device))
        is_reached[target[edges].long()] = True
        return RowSet.where(is_reached)

    def into(self, rows: RowSet) -> list[Incoming]:
        num_src = self.relation.num_src
        where = slice(0, num_src), slice(0, rows.count)
        if rows.count == self.relation.num_dst:
            return [Incoming(self.relation, *where)]
        ptr, source, perm = self.relation.csr
        edges, degree = listed_edges(ptr, rows.rows(self.relation.device))
        relation = Relation.from_rows(source[edges], degree, (num_src, rows.count))
        if self.relation.bias is not None:
            relation = relation.with_bias(self.relation.bias[perm[edges]])
        return [Incoming(relation, *where)]


def listed_edges(ptr: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the edges of some groups, and how many each has."""
    first, end = ptr[rows].long(), ptr[rows + 1].long()
    return rows_from_ranges(first, end).index, end - first
