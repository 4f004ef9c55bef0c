"""How the rows of one node set fall into the examples of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Partition:
    """How the rows of one node set fall into examples, with the padded view of it.

    The padded view exists inside operations only; nothing padded crosses the public interface.
    """

    ptr: Tensor
    num_rows: int
    min_count: int
    max_count: int
    position: Tensor | None  #: ``[num_rows]``, each row's place in the flat padded view

    @classmethod
    def from_ptr(cls, ptr: Tensor) -> Partition:
        """Reads the pointer once (one device synchronisation) and keeps what follows from it."""
        counts = ptr.diff()
        num_examples = counts.numel()
        if num_examples == 0:
            return cls(ptr, 0, 0, 0, None)
        least, most, num_rows = torch.stack([counts.min(), counts.max(), ptr[-1]]).tolist()
        if least == most:
            return cls(ptr, num_rows, most, most, None)
        example = torch.repeat_interleave(counts, output_size=num_rows)
        row = torch.arange(num_rows, device=ptr.device)
        return cls(ptr, num_rows, least, most, row - ptr[example] + example * most)

    @classmethod
    def from_counts(cls, counts: Tensor) -> Partition:
        """The same from the number of rows of each example, ``[B]``."""
        return cls.from_ptr(torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    @classmethod
    def uniform(
        cls, num_examples: int, count: int, device: torch.device | str | None = None
    ) -> Partition:
        """``num_examples`` examples of ``count`` rows each; reads nothing back from the device."""
        ptr = torch.arange(num_examples + 1, device=device) * count
        return cls(ptr, num_examples * count, count, count, None)

    @property
    def num_examples(self) -> int:
        return self.ptr.numel() - 1

    @property
    def is_uniform(self) -> bool:
        """Whether every example has the same number of rows (the padded view is then a view)."""
        return self.position is None

    @property
    def batch(self) -> Tensor:
        """The example of every row, ``[num_rows]``."""
        return torch.repeat_interleave(self.ptr.diff(), output_size=self.num_rows)

    @property
    def place(self) -> Tensor:
        """The index of every row inside its example, ``[num_rows]``."""
        return torch.arange(self.num_rows, device=self.ptr.device) - self.ptr[self.batch]

    def has_counts_of(self, other: Partition) -> bool:
        """Whether every example has as many rows here as in the other partition."""
        if other is self:
            return True
        if self.num_examples != other.num_examples or self.num_rows != other.num_rows:
            return False
        if self.is_uniform and other.is_uniform:
            return True  # known without reading anything back from the device
        return self.is_uniform == other.is_uniform and torch.equal(self.ptr, other.ptr)

    def pad(self, rows: Tensor) -> Tensor:
        """``[num_rows, ...]`` -> ``[B, max_count, ...]``, zeros where an example has fewer rows."""
        if self.is_uniform:
            return rows.unflatten(0, (self.num_examples, self.max_count))
        assert self.position is not None
        flat = rows.new_zeros(self.num_examples * self.max_count, *rows.shape[1:])
        flat = flat.index_copy(0, self.position, rows)
        return flat.unflatten(0, (self.num_examples, self.max_count))

    def unpad(self, padded: Tensor) -> Tensor:
        """``[B, max_count, ...]`` -> ``[num_rows, ...]``; the inverse of :meth:`pad`."""
        flat = padded.flatten(0, 1)
        return flat if self.position is None else flat.index_select(0, self.position)

    def mask(self) -> Tensor:
        """``[B, max_count]``, true where the padded view holds a row."""
        place = torch.arange(self.max_count, device=self.ptr.device)
        return place < self.ptr.diff().unsqueeze(1)

    def clone(self) -> Partition:
        """The same with tensors of its own."""
        position = None if self.position is None else self.position.clone()
        return replace(self, ptr=self.ptr.clone(), position=position)

    def to(self, device: torch.device | str) -> Partition:
        position = None if self.position is None else self.position.to(device)
        return Partition(
            self.ptr.to(device), self.num_rows, self.min_count, self.max_count, position
        )


def ptr_from_batch(batch: Tensor, batch_size: int, name: str = "batch") -> Tensor:
    """PyG's ``ptr`` of a sorted ``batch`` vector, examples without rows included."""
    if batch.dim() != 1 or not holds_integers(batch):
        raise ValueError(
            f"{name} must be an integer vector with one example index per row, but has shape "
            f"{tuple(batch.shape)} and dtype {batch.dtype}"
        )
    if batch.numel() > 0:
        # One synchronisation for all three checks.
        steps_back = (batch[1:] < batch[:-1]).sum()
        back, least, most = torch.stack([steps_back, batch[0].long(), batch[-1].long()]).tolist()
        if back > 0:
            raise ValueError(f"{name} must be sorted, but goes back {back} times; sort it and x")
        if least < 0 or most >= batch_size:
            raise ValueError(
                f"{name} holds the example {least if least < 0 else most}, but there are "
                f"{batch_size} examples; examples count from 0"
            )
    counts = torch.bincount(batch, minlength=batch_size)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def check_ptr(ptr: Tensor | list[int], name: str) -> Tensor:
    """The pointer as an int64 tensor, or a ``ValueError``."""
    ptr = torch.as_tensor(ptr)
    if ptr.dim() != 1 or ptr.numel() == 0 or not holds_integers(ptr):
        raise ValueError(
            f"{name} must be an integer vector of size num_examples + 1, but has shape "
            f"{tuple(ptr.shape)} and dtype {ptr.dtype}"
        )
    ptr = ptr.long()
    first = int(ptr[0])
    if first != 0 or bool((ptr.diff() < 0).any()):
        raise ValueError(
            f"{name} must start at 0 and never decrease, but is {ptr[:8].tolist()}"
            f"{'...' if ptr.numel() > 8 else ''}; cumulate the row counts of the examples"
        )
    return ptr


def holds_integers(tensor: Tensor) -> bool:
    """Whether the dtype is an integer type; booleans are not."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
