"""The passes of one update: which rows each computes, and from which edges.

Legend: P pages, R rows of a pass that are computed, C channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nsm_graph.mmsb.neighbourhood import Incoming, Neighbourhood, neighbourhood_of
from nsm_graph.mmsb.page_cache import PropagationCache
from nsm_graph.mmsb.rewiring import differs, is_same_rule
from nsm_graph.mmsb.row_set import RowSet
from nsm_graph.mmsb.shadow_graph import ShadowGraph, edges_of, node_set
from nsm_graph.partition import Partition
from nsm_graph.topology import NodeSet

if TYPE_CHECKING:
    from nsm_graph.mmsb.propagation import Propagation
    from nsm_graph.mmsb.propagation_pass import PropagationPass


class Setting(NamedTuple):
    """What the pages stand in after an update."""

    examples: Partition
    shadow_graph: ShadowGraph
    attributes: dict[str, Tensor] | None

    def ask(self, pages: Tensor, step: int) -> NodeSet:
        return node_set(self.examples, pages, step, self.attributes)


class Steps:
    """The passes of one update."""

    def __init__(
        self,
        stack: Propagation,
        cache: PropagationCache,
        setting: Setting,
        fixed: Neighbourhood | None,
        num_appended: int,
        new_to_old: Tensor | None,
        is_whole: bool = False,
    ) -> None:
        self.is_whole = is_whole  #: compute every page, as a run does
        self.stack, self.cache, self.setting, self.fixed = stack, cache, setting, fixed
        self.buffers = cache.buffers
        self.num_appended, self.new_to_old = num_appended, new_to_old
        self.last = RowSet(0, 0)  #: the final pages that were computed
        # The last edges that were asked for: in a stream every pass asks for the same.
        self._incoming: tuple[Neighbourhood, RowSet, list[Incoming]] | None = None

    def run(self, rows: RowSet) -> list[Neighbourhood]:
        """From rows of P_0 that differ; returns who hears whom in every pass."""
        neighbourhoods: list[Neighbourhood] = []
        for step, refine in enumerate(self.stack.passes):
            neighbourhood, reached = self._reach(step, rows)
            neighbourhoods.append(neighbourhood)
            if reached.count > 0:
                self._refine(step, refine, neighbourhood, rows, reached)
            rows = reached
        if self.stack.final_norm is not None and rows.count > 0:
            last = rows.take(self.buffers.snapshots[-1])
            rows.put(self.buffers.final, self.stack.final_norm(last))
        self.last = rows
        return neighbourhoods

    def _reach(self, step: int, rows: RowSet) -> tuple[Neighbourhood, RowSet]:
        """Who hears whom in a pass, and the pages that it has to compute."""
        before, old = self.buffers.snapshots[step], self.cache.neighbourhoods[step]
        new = self.fixed
        if new is None:
            new = neighbourhood_of(self.setting.shadow_graph, self.setting.ask(before, step))
        num_pages, device = before.size(0), before.device
        if self.is_whole:
            return new, RowSet(0, num_pages)
        reached = new.reached_by(rows)
        if not is_same_rule(new, old) or self.new_to_old is not None:
            new_to_old = self.new_to_old
            if new_to_old is None and self.num_appended > 0:
                new_to_old = torch.arange(num_pages, device=device)
                new_to_old[num_pages - self.num_appended :] = -1
            reached = reached.union(differs(new, old, new_to_old), num_pages, device)
        if reached.count > new.whole_share * num_pages:
            reached = RowSet(0, num_pages)
        return new, reached

    def _refine(
        self,
        step: int,
        refine: PropagationPass,
        neighbourhood: Neighbourhood,
        rows: RowSet,
        reached: RowSet,
    ) -> None:
        before = self.buffers.snapshots[step]
        key, value = self.buffers.keys[step], self.buffers.values[step]
        pages = reached.take(before)
        if reached.count == rows.count:
            query, new_key, new_value = refine.project(pages)
        else:
            query = refine.project_queries(pages)
            new_key, new_value = refine.project_sources(rows.take(before))
        rows.put(key, refine.router.split_heads(new_key))
        rows.put(value, refine.router.split_heads(new_value))
        parts = [
            refine.router.attend(query[targets], key[sources], value[sources], relation)[0]
            for relation, sources, targets in self._edges_into(step, neighbourhood, reached)
        ]
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        reached.put(self.buffers.snapshots[step + 1], refine.write(pages, attended))

    def _edges_into(self, step: int, neighbourhood: Neighbourhood, rows: RowSet) -> list[Incoming]:
        if self._incoming is not None:
            asked, known, incoming = self._incoming
            if asked is neighbourhood and known.is_same_range(rows):
                return incoming
        if rows.count == self.buffers.count and rows.count > 1:
            nodes = self.setting.ask(self.buffers.snapshots[step], step)
            whole = slice(0, rows.count)
            incoming = [Incoming(edges_of(self.setting.shadow_graph, nodes), whole, whole)]
        else:
            incoming = neighbourhood.into(rows)
        self._incoming = neighbourhood, rows, incoming
        return incoming
