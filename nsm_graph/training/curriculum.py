"""Fresh sequences for every step, short ones first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch_geometric.data import Batch

from nsm_graph.data import TaskSequences

#: Share of the batches that have the longest length reached so far.
FRONTIER_SHARE = 0.7
#: Memory of the moving average of the training accuracy.
DECAY = 0.9


class FreshSequences:
    r"""Batches of a sequence task that nobody has seen before.

    Lengths grow as they are learned: most batches have the longest length so far, the others any
    length below. When the moving average of the accuracy passes ``curriculum``, the longest
    length grows by a quarter and the average starts anew. Without a curriculum every batch has the
    full length, or any length from ``min_length`` on where that is given.

    Args:
        split: The task, and the longest length.
        batch_size: Sequences in a batch.
        order: Source of everything random here.
        min_length: Shortest length; that of the task if not given.
        curriculum: Accuracy at which lengths grow; ``None`` for no curriculum.
    """

    def __init__(
        self,
        split: TaskSequences,
        batch_size: int,
        order: torch.Generator,
        *,
        min_length: int | None = None,
        curriculum: float | None = None,
    ) -> None:
        self.split, self.batch_size, self.order = split, batch_size, order
        task = split.task
        shortest = task.min_length if min_length is None else max(min_length, task.min_length)
        if shortest > split.length:
            raise ValueError(
                f"train.min_length: expected at most data.max_length={split.length}; got {shortest}"
            )
        self.min_length, self.curriculum = shortest, curriculum
        #: The longest length reached so far.
        self.frontier = split.length if curriculum is None else min(shortest + 1, split.length)
        self.is_fixed = curriculum is None and min_length is None
        self.average = 0.5

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self)):
            length = self._length()
            x, y = self.split.task.sample(self.batch_size, length, self.order)
            ptr = torch.arange(self.batch_size + 1) * length
            batch = torch.arange(self.batch_size).repeat_interleave(length)
            yield Batch(x=x.flatten(0, 1), y=y.flatten(), batch=batch, ptr=ptr)

    def observe(self, out: Tensor, y: Tensor, batch: Tensor) -> None:
        """Learns how well the last batch went, and makes sequences longer if well enough.

        Args:
            out: Predictions for the tokens that have a label, in order.
            y: Their labels.
            batch: Their examples.
        """
        if self.curriculum is None or self.frontier == self.split.length:
            return
        # The last answer of a sequence is the hardest.
        is_last = torch.ones_like(batch, dtype=torch.bool)
        is_last[:-1] = batch[1:] != batch[:-1]
        hit = (out[is_last].argmax(-1) == y[is_last]).double().mean().item()
        self.average = DECAY * self.average + (1 - DECAY) * hit
        if self.average > self.curriculum:
            self.frontier = min(self.frontier + max(1, self.frontier // 4), self.split.length)
            self.average = 0.5

    def _length(self) -> int:
        if self.is_fixed:
            return self.split.length
        is_frontier = self.curriculum is not None and self._random() < FRONTIER_SHARE
        low, high = self.min_length, self.frontier
        length = high if is_frontier else low + int(self._random() * (high - low + 1))
        return self.split.task.valid_length(length)

    def _random(self) -> float:
        return torch.rand((), generator=self.order).item()
