"""Delta propagation: only what depends on the changed pages is computed again (M4, M5).

Legend: P pages, R rows of a pass that are computed, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nsm_graph.memory import NodeEdit
from nsm_graph.mmsb.changes import changed_rows, old_rows
from nsm_graph.mmsb.neighbourhood import (
    Neighbourhood,
    neighbourhood_of,
    range_neighbourhood,
)
from nsm_graph.mmsb.page_cache import Inputs, PageBuffers, PropagationCache, Stamp
from nsm_graph.mmsb.row_set import RowSet
from nsm_graph.mmsb.shadow_graph import (
    ShadowGraph,
    check_shadow_graph,
    is_fixed,
    partition_of,
)
from nsm_graph.mmsb.steps import Setting, Steps
from nsm_graph.nn.checks import check_features
from nsm_graph.partition import Partition
from nsm_graph.relation import Relation

if TYPE_CHECKING:
    from nsm_graph.mmsb.propagation import Propagation
    from nsm_graph.mmsb.propagation_pass import PropagationPass


class Change(NamedTuple):
    """What a user says of the pages since the last run."""

    pages: Tensor  #: ``[P, C]``
    changed: Tensor | list[int] | slice | None
    edit: NodeEdit | Tensor | None
    batch: Tensor | Partition | None
    shadow_graph: ShadowGraph | None
    attributes: dict[str, Tensor] | None


class Keeper:
    """Fills a cache while a stack runs."""

    def __init__(self, stack: Propagation, pages: Tensor, setting: Setting) -> None:
        check_still(stack)
        examples, graph, attributes = setting
        by_range = range_neighbourhood(graph, 0, examples)
        buffers = PageBuffers(
            stack.num_passes,
            stack.heads,
            has_final=stack.final_norm is not None,
            is_by_head=by_range is not None and by_range.is_long,
            pages=pages.detach(),
        )
        stamp = Stamp(stack, graph)
        self.setting = setting
        if stamp.has_hooks:
            raise ValueError(_HOOKS)
        inputs = Inputs(graph, attributes)
        self.cache = PropagationCache(buffers, examples, inputs, [], stamp)
        buffers.snapshots[0].copy_(pages.detach())

    def add(
        self,
        step: int,
        refine: PropagationPass,
        relation: Relation,
        key: Tensor,
        value: Tensor,
        pages: Tensor,
    ) -> None:
        """What a pass read and made."""
        buffers, neighbourhoods = self.cache.buffers, self.cache.neighbourhoods
        if step > 0 and is_fixed(self.setting.shadow_graph):
            neighbourhoods.append(neighbourhoods[0])
        else:
            nodes = self.setting.ask(buffers.snapshots[step], step)
            graph = self.setting.shadow_graph
            neighbourhoods.append(neighbourhood_of(graph, nodes, relation))
        buffers.keys[step].copy_(refine.router.split_heads(key.detach()))
        buffers.values[step].copy_(refine.router.split_heads(value.detach()))
        buffers.snapshots[step + 1].copy_(pages.detach())

    def finish(self, final: Tensor) -> PropagationCache:
        self.cache.buffers.final.copy_(final.detach())
        self.cache.is_finite = final.detach().isfinite().all()
        return self.cache


# Checks ############################################################################

_HOOKS = (
    "updates read the weights of router.lin_qkv and would not call its forward hooks; remove them, "
    "or use run without a cache"
)


def check_still(stack: Propagation) -> None:
    """Raises if the stack draws at random: what is kept would not be what a later call gives."""
    if stack.training and any(refine.drops for refine in stack.passes):
        raise ValueError(
            "updates need passes that give the same again, but dropout is active; call eval() first"
        )
    device_type = stack.passes[0].norm_route.weight.device.type
    if torch.is_autocast_enabled(device_type):
        raise ValueError(
            "a cache and updates of it keep the pages' own type, but autocast is active; leave it, "
            "or call the stack's to(torch.bfloat16)"
        )


def cache_of(stack: Propagation, cache: PropagationCache | None) -> PropagationCache:
    """A cache that holds what the stack would compute, or a ``ValueError``."""
    check_still(stack)
    if cache is None:
        raise ValueError("nothing was kept yet; call run(pages, cache=True) first")
    if not isinstance(cache, PropagationCache):
        raise ValueError(
            f"cache must be a PropagationCache, but is {type(cache).__name__}; a run's is "
            f"run(pages, cache=True).cache"
        )
    if not cache.stamp.is_of(stack):
        raise ValueError("the cache was made by another stack; call run(pages, cache=True) of this")
    if not cache.is_whole:
        raise ValueError("the last update was cut short; call run(pages, cache=True) again")
    if not cache.stamp.is_current():
        raise ValueError(
            "the stack's weights or shadow graph are not those that the cache was made with; call "
            "run(pages, cache=True) again after every change of them, and after training"
        )
    if cache.stamp.has_hooks:
        raise ValueError(_HOOKS)
    return cache


def _check_pages(stack: Propagation, pages: Tensor) -> None:
    weight = stack.passes[0].router.lin_qkv.weight
    check_features(pages, stack.channels, "pages", weight)
    if pages.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "updates carry no gradients, but pages requires them; use forward, or pages.detach()"
        )


# Updates ###########################################################################


def update(stack: Propagation, cache: PropagationCache, change: Change) -> None:
    """Brings a cache up to date with pages of which some changed, came, went or moved."""
    pages, num_pages, num_old = change.pages, change.pages.size(0), cache.num_pages
    _check_pages(stack, pages)
    num_appended, new_to_old = 0, None
    if change.edit is not None:
        new_to_old = old_rows(change.edit, num_pages, num_old).to(pages.device)
    elif num_pages > num_old and cache.examples.num_examples == 1:
        num_appended = num_pages - num_old
    elif num_pages != num_old:
        raise ValueError(
            f"pages has {num_pages} rows, but the cache has {num_old} pages in "
            f"{cache.examples.num_examples} examples; say with edit= which old row each comes from"
        )
    setting = _setting(cache, change, is_resized=num_appended > 0 or new_to_old is not None)
    rows = _rows_to_write(cache, change, num_appended, new_to_old)
    fixed = _fixed_neighbourhood(cache, setting, lambda: pages)
    _apply(stack, cache, setting, fixed, rows, rows.take(pages), num_appended, new_to_old)


def append(
    stack: Propagation,
    cache: PropagationCache,
    pages: Tensor,
    attributes: dict[str, Tensor] | None,
) -> None:
    """The same for pages behind the last: in a causal graph nothing is copied or built for all."""
    _check_pages(stack, pages)
    if cache.examples.num_examples != 1:
        raise ValueError(
            f"append is about one example, but the cache holds {cache.examples.num_examples}; use "
            f"update(pages, changed, edit=, batch=)"
        )
    num_old, num_new = cache.num_pages, pages.size(0)
    if num_new == 0:
        return
    examples = Partition.uniform(1, num_old + num_new, pages.device)
    attributes = cache.attributes if attributes is None else attributes
    setting = Setting(examples, cache.shadow_graph, attributes)
    kept = cache.buffers.snapshots[0]
    fixed = _fixed_neighbourhood(cache, setting, lambda: torch.cat([kept, pages]))
    rows = RowSet(num_old, num_old + num_new)
    _apply(stack, cache, setting, fixed, rows, pages, num_new, None)


def _setting(cache: PropagationCache, change: Change, *, is_resized: bool) -> Setting:
    graph = cache.shadow_graph if change.shadow_graph is None else change.shadow_graph
    check_shadow_graph(graph)
    attributes = cache.attributes if change.attributes is None else change.attributes
    examples = cache.examples
    if is_resized and change.batch is None and examples.num_examples != 1:
        raise ValueError(
            f"pages came, went or moved, and there are {examples.num_examples} examples; say with "
            f"batch= where each page belongs"
        )
    if is_resized or change.batch is not None:
        examples = partition_of(change.batch, change.pages)
    return Setting(examples, graph, attributes)


def _rows_to_write(
    cache: PropagationCache, change: Change, num_appended: int, new_to_old: Tensor | None
) -> RowSet:
    pages, old, is_new = change.pages, cache.buffers.snapshots[0], None
    if new_to_old is not None:
        is_new = new_to_old < 0
        if change.changed is None:
            old = old[new_to_old.clamp(min=0)]
    if num_appended == 0:
        return changed_rows(change.changed, pages, old, is_new)
    num_pages, num_old = pages.size(0), old.size(0)
    appended = RowSet(num_old, num_pages)
    compared = pages[:num_old] if change.changed is None else pages
    rows = changed_rows(change.changed, compared, old, None)
    return rows.union(appended, num_pages, pages.device)


def _fixed_neighbourhood(
    cache: PropagationCache, setting: Setting, pages: Callable[[], Tensor]
) -> Neighbourhood | None:
    """The one of every pass, where the shadow graph is no dynamic one.

    It is asked before anything is written: a rule may refuse these pages.
    """
    graph = setting.shadow_graph
    if not is_fixed(graph):
        return None
    inputs = cache.inputs
    is_same = inputs.are_those_of(graph, setting.attributes) and not inputs.is_written()
    if is_same and setting.examples is cache.examples:
        return cache.neighbourhoods[0]
    by_range = range_neighbourhood(graph, 0, setting.examples)
    return neighbourhood_of(graph, setting.ask(pages(), 0)) if by_range is None else by_range


def _apply(
    stack: Propagation,
    cache: PropagationCache,
    setting: Setting,
    fixed: Neighbourhood | None,
    rows: RowSet,
    pages: Tensor,
    num_appended: int,
    new_to_old: Tensor | None,
) -> None:
    """Writes the changed rows ``[R, C]`` of P_0 and computes what depends on them."""
    graph = setting.shadow_graph
    stamp = cache.stamp if graph is cache.shadow_graph else Stamp(stack, graph)
    # What was edited in place, or carried along edges that are not there, has left no trace.
    is_whole = cache.inputs.is_written() or not bool(cache.is_finite)
    inputs = Inputs(graph, setting.attributes)
    cache.is_whole = False
    with torch.no_grad():
        if new_to_old is not None:
            cache.buffers.reorder(new_to_old)
        if num_appended > 0:
            cache.buffers.extend(num_appended)
        rows.put(cache.buffers.snapshots[0], pages)
        steps = Steps(stack, cache, setting, fixed, num_appended, new_to_old, is_whole)
        neighbourhoods = steps.run(rows)
        # The rest was finite; of a whole that is not, more rows than those may be none.
        made = cache.buffers.final if is_whole else steps.last.take(cache.buffers.final)
        cache.is_finite = made.isfinite().all()
    cache.examples, cache.inputs = setting.examples, inputs
    cache.neighbourhoods, cache.stamp, cache.is_whole = neighbourhoods, stamp, True
