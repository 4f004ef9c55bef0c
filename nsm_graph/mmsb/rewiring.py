"""Which pages hear others than before: after an edit, or where the shadow graph changed.

Conservative: a page whose edges stand in another order counts as one that hears others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.mmsb.neighbourhood import (
    ListedNeighbourhood,
    Neighbourhood,
    RangeNeighbourhood,
    listed_edges,
)
from nsm_graph.mmsb.row_set import RowSet
from nsm_graph.relation import Relation


def is_same_rule(new: Neighbourhood, old: Neighbourhood) -> bool:
    """Whether pages hear the same as before, but for new ones behind the last of one example.

    What a page gains by those is reached from them.
    """
    if new is old:
        return True
    if not (isinstance(new, RangeNeighbourhood) and isinstance(old, RangeNeighbourhood)):
        return False
    is_one = new.examples.num_examples == old.examples.num_examples == 1
    return is_one and (new.before, new.after) == (old.before, old.after)


def differs(new: Neighbourhood, old: Neighbourhood, new_to_old: Tensor | None) -> RowSet:
    """Pages that hear others than before; conservative where that takes less to find out.

    Args:
        new: The pages now.
        old: The pages before.
        new_to_old: ``[P]``, the old row of each page, -1 for a new one; ``None`` for the same rows.
    """
    if isinstance(new, RangeNeighbourhood) and isinstance(old, RangeNeighbourhood):
        num_new, device = new.examples.num_rows, new.examples.ptr.device
        if new_to_old is None:
            new_to_old = torch.arange(num_new, device=device)
        return RowSet.where(~_same_ranges(new, old, new_to_old))
    if isinstance(new, ListedNeighbourhood) and isinstance(old, ListedNeighbourhood):
        if new.relation is old.relation and new_to_old is None:
            return RowSet(0, 0)
        if new_to_old is None:
            new_to_old = torch.arange(new.relation.num_dst, device=new.relation.device)
        return RowSet.where(~_same_lists(new.relation, old.relation, new_to_old))
    size = new.examples.num_rows if isinstance(new, RangeNeighbourhood) else _num_pages(new)
    return RowSet(0, size)


def _num_pages(neighbourhood: Neighbourhood) -> int:
    assert isinstance(neighbourhood, ListedNeighbourhood)
    return neighbourhood.relation.num_dst


def _same_ranges(new: RangeNeighbourhood, old: RangeNeighbourhood, new_to_old: Tensor) -> Tensor:
    """``[P]``, whether the old sources of a page are its sources now, in the same order."""
    page = torch.arange(new_to_old.numel(), device=new_to_old.device)
    first, end = new.ranges(page)
    old_first, old_end = old.ranges(new_to_old.clamp(min=0))
    # How many times up to here the old row of a page is not the one behind that of the page before.
    is_break = torch.ones_like(new_to_old)
    is_break[1:] = (new_to_old[1:] != new_to_old[:-1] + 1) | (new_to_old[1:] < 0)
    num_breaks = is_break.cumsum(0)
    last = (end - 1).clamp(min=0)
    first_row = first.clamp(max=page.numel() - 1)
    is_same = (end - first) == (old_end - old_first)
    is_same &= (new_to_old[first_row] == old_first) & (num_breaks[last] == num_breaks[first_row])
    return (is_same | ((end <= first) & (old_end <= old_first))) & (new_to_old >= 0)


def _same_lists(new: Relation, old: Relation, new_to_old: Tensor) -> Tensor:
    """``[P]``, whether the same edges enter a page, with the same bias, in the same order."""
    num_pages = new.num_dst
    old_row = new_to_old.clamp(min=0)
    ptr, source, perm = new.csr
    old_ptr, old_source, old_perm = old.csr
    degree = ptr.diff().long()
    is_same = (degree == old_ptr.diff().long()[old_row]) & (new_to_old >= 0)
    if (new.bias is None) != (old.bias is None):
        return torch.zeros_like(is_same)
    # Edge by edge, for pages with as many as before.
    rows = is_same.nonzero().flatten()
    edges, degree = listed_edges(ptr, rows)
    old_edges, _ = listed_edges(old_ptr, old_row[rows])
    is_other = new_to_old[source[edges].long()] != old_source[old_edges].long()
    if new.bias is not None and old.bias is not None:
        pair = new.bias[perm[edges]], old.bias[old_perm[old_edges]]
        is_other |= (pair[0] != pair[1]).any(1)
    target = rows.repeat_interleave(degree, output_size=edges.numel())
    num_other = torch.zeros(num_pages, dtype=torch.long, device=rows.device)
    num_other.index_add_(0, target, is_other.long())
    return is_same & (num_other == 0)
