"""What a user may say of changed, new, lost and moved pages, and what it means."""

from __future__ import annotations

import torch
from torch import Tensor

from nsm_graph.memory import NodeEdit
from nsm_graph.mmsb.row_set import RowSet
from nsm_graph.partition import holds_integers
from nsm_graph.topology.checks import show_rows


def old_rows(edit: NodeEdit | Tensor | list[int], num_pages: int, num_old: int) -> Tensor:
    """``[P]``, the old row of every page, -1 for a new one, or a ``ValueError``.

    A page that an edit makes of several old ones is a new one.
    """
    if isinstance(edit, NodeEdit):
        if edit.slots_before.numel() != num_old:
            raise ValueError(
                f"the edit starts from {edit.slots_before.numel()} rows, but the cache has "
                f"{num_old} pages"
            )
        new_to_old = edit.new_to_old
        if new_to_old.dim() == 2:
            # Only the old row that a row comes from alone tells its contents.
            is_copy = (new_to_old >= 0).sum(1) == 1
            new_to_old = new_to_old.amax(1).masked_fill(~is_copy, -1)
    else:
        new_to_old = torch.as_tensor(edit)
        if new_to_old.dim() != 1 or (new_to_old.numel() > 0 and not holds_integers(new_to_old)):
            raise ValueError(
                f"edit must name one old row for each page, but has shape "
                f"{tuple(new_to_old.shape)} and dtype {new_to_old.dtype}"
            )
    new_to_old = new_to_old.long()
    if new_to_old.numel() != num_pages:
        raise ValueError(
            f"edit has {new_to_old.numel()} rows, but pages has {num_pages}; name the old row of "
            f"every page, -1 for a new one"
        )
    is_wrong = (new_to_old < -1) | (new_to_old >= num_old)
    if bool(is_wrong.any()):
        raise ValueError(
            f"edit names rows outside the {num_old} pages of the cache: "
            f"{show_rows(new_to_old, is_wrong)}"
        )
    return new_to_old


def changed_rows(
    changed: Tensor | list[int] | slice | None, pages: Tensor, old: Tensor, is_new: Tensor | None
) -> RowSet:
    """Rows of P_0 to write: those that are said to differ, and the new ones.

    Args:
        changed: Indices, a mask or a slice; ``None`` to compare.
        pages: ``[P, C]``.
        old: What the cache has for them, ``[P, C]``; anything for new ones.
        is_new: ``[P]``; ``None`` where no page is new.
    """
    num_pages, device = pages.size(0), pages.device
    if changed is None:
        rows = RowSet.where((pages != old).any(1))
    elif isinstance(changed, slice):
        start, stop, step = changed.indices(num_pages)
        if step != 1:
            raise ValueError(f"changed must be a slice without a step, but is {changed}")
        rows = RowSet(start, max(start, stop))
    else:
        rows = _from_indices(torch.as_tensor(changed, device=device), num_pages)
    return rows if is_new is None else rows.union(RowSet.where(is_new), num_pages, device)


def _from_indices(changed: Tensor, num_pages: int) -> RowSet:
    if changed.dtype == torch.bool:
        if changed.shape != (num_pages,):
            raise ValueError(
                f"changed must have one entry for each of the {num_pages} pages, but has shape "
                f"{tuple(changed.shape)}"
            )
        return RowSet.where(changed)
    if changed.numel() == 0:
        return RowSet(0, 0)
    if changed.dim() != 1 or not holds_integers(changed) or changed.dtype == torch.uint8:
        raise ValueError(
            f"changed must hold row indices or a mask, but has shape {tuple(changed.shape)} and "
            f"dtype {changed.dtype}"
        )
    changed = changed.long()
    is_wrong = (changed < 0) | (changed >= num_pages)
    if bool(is_wrong.any()):
        raise ValueError(
            f"changed names pages outside 0..{num_pages - 1}: {show_rows(changed, is_wrong)}"
        )
    return RowSet.of(changed if changed.numel() == 1 else changed.unique())
