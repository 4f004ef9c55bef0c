"""The states of a batch whose examples have node sets of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsm_graph.partition import Partition


class StateRows(NamedTuple):
    """The states of a batch, each example with as many as it needs."""

    states: Tensor  #: ``[N, C]``
    cell: Tensor | None  #: ``[N, C]``, of an LSTM
    slots: Tensor  #: ``[N]``
    log_presence: Tensor  #: ``[N]``, of the decisions that brought each state and let it stay
    log_lasting: Tensor  #: ``[N]``, of those alone that let it stay
    nodes: Partition  #: how the rows fall into examples

    def take(self, index: Tensor, ptr: Tensor) -> StateRows:
        """Some of the rows, in whatever order, and how these fall into examples."""
        cell = None if self.cell is None else self.cell[index]
        columns = (self.states[index], cell, self.slots[index])
        gates = (self.log_presence[index], self.log_lasting[index])
        return StateRows(*columns, *gates, Partition.from_ptr(ptr))

    def stay(self, stays: Tensor) -> StateRows:
        """The rows that stay."""
        kept = torch.cat([stays.new_zeros(1, dtype=torch.long), stays.cumsum(0)])
        return self.take(stays.nonzero().flatten(), kept[self.nodes.ptr])

    def reorder(self, order: Tensor) -> StateRows:
        """The same examples in another order."""
        count = self.nodes.ptr.diff()[order]
        ptr = torch.cat([count.new_zeros(1), count.cumsum(0)])
        shift = (self.nodes.ptr[:-1][order] - ptr[:-1]).repeat_interleave(count)
        return self.take(torch.arange(shift.numel(), device=shift.device) + shift, ptr)

    def split(self, num_examples: int) -> tuple[StateRows, StateRows]:
        """The first examples, and the others."""
        row = int(self.nodes.ptr[num_examples])
        index = torch.arange(self.nodes.num_rows, device=self.slots.device)
        ptr = self.nodes.ptr
        first = self.take(index[:row], ptr[: num_examples + 1])
        return first, self.take(index[row:], ptr[num_examples:] - row)

    def join(self, fresh: StateRows, num_slots: int) -> StateRows:
        """Both rows, example by example, by slot."""
        example = torch.cat([self.nodes.batch, fresh.nodes.batch])
        order = torch.argsort(example * num_slots + torch.cat([self.slots, fresh.slots]))
        return side_by_side([self, fresh]).take(order, self.nodes.ptr + fresh.nodes.ptr)

    def detach(self) -> StateRows:
        """The same rows without their history."""
        cell = None if self.cell is None else self.cell.detach()
        return self._replace(
            states=self.states.detach(), cell=cell, log_presence=self.log_presence.detach(),
            log_lasting=self.log_lasting.detach(),
        )  # fmt: skip


def side_by_side(rows: list[StateRows]) -> StateRows:
    """The rows of several batches, one batch after the other."""
    cells = [part.cell for part in rows if part.cell is not None]
    count = torch.cat([part.nodes.ptr.diff() for part in rows])
    return StateRows(
        torch.cat([part.states for part in rows]),
        torch.cat(cells) if cells else None,
        torch.cat([part.slots for part in rows]),
        torch.cat([part.log_presence for part in rows]),
        torch.cat([part.log_lasting for part in rows]),
        Partition.from_counts(count),
    )
