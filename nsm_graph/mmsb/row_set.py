"""Which pages a step is about: a range of rows where they are neighbours, else a list of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowSet:
    """Ascending rows, each once.

    Neighbouring rows are a view of a buffer; others are gathered. The ends are plain numbers, so
    that nothing is read back from a device for the rows of a stream.
    """

    start: int
    stop: int
    index: Tensor | None = None  #: ``[R]``; None for all rows from start up to, without, stop

    @classmethod
    def of(cls, index: Tensor) -> RowSet:
        """From ascending rows, each once."""
        count = index.numel()
        if count == 0:
            return cls(0, 0)
        start, stop = int(index[0]), int(index[-1]) + 1
        return cls(start, stop, None if stop - start == count else index)

    @classmethod
    def where(cls, is_member: Tensor) -> RowSet:
        """The rows of which a mask says so."""
        return cls.of(is_member.nonzero().flatten())

    def is_same_range(self, other: RowSet) -> bool:
        """Whether both are the same range; lists are not compared."""
        if self.index is not None or other.index is not None:
            return False
        return (self.start, self.stop) == (other.start, other.stop)

    @property
    def count(self) -> int:
        return self.stop - self.start if self.index is None else self.index.numel()

    def rows(self, device: torch.device) -> Tensor:
        """``[R]``, as a list."""
        if self.index is not None:
            return self.index
        return torch.arange(self.start, self.stop, device=device)

    def take(self, values: Tensor) -> Tensor:
        """``[P, ...]`` -> ``[R, ...]``; a view where the rows are neighbours."""
        if self.index is None:
            return values[self.start : self.stop]
        return values.index_select(0, self.index)

    def put(self, values: Tensor, rows: Tensor) -> None:
        """Writes ``[R, ...]`` into ``[P, ...]``."""
        if self.index is None:
            values[self.start : self.stop].copy_(rows)
        else:
            values.index_copy_(0, self.index, rows)

    def mask(self, num_rows: int, device: torch.device) -> Tensor:
        """``[P]``, true for its rows."""
        is_member = torch.zeros(num_rows, dtype=torch.bool, device=device)
        is_member[slice(self.start, self.stop) if self.index is None else self.index] = True
        return is_member

    def union(self, other: RowSet, num_rows: int, device: torch.device) -> RowSet:
        """The rows of either."""
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        are_ranges = self.index is None and other.index is None
        if are_ranges and max(self.start, other.start) <= min(self.stop, other.stop):
            return RowSet(min(self.start, other.start), max(self.stop, other.stop))
        return RowSet.where(self.mask(num_rows, device) | other.mask(num_rows, device))
