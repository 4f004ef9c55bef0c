r"""Sequence tasks as datasets: made as they are needed, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch_geometric.data import Data

from nsm_graph.data.info import DatasetInfo, Splits
from nsm_graph.data.tasks import SequenceTask, make_task

# Held-out sequences are the same for every run's seed, so that runs can be compared.
VALIDATION_SEED, TEST_SEED = 1_000_001, 1_000_002


class TaskSequences(Sequence[Data]):
    r"""Sequences of one task and one length, made at the first look.

    Args:
        task: The task.
        num_examples: Number of sequences.
        length: Tokens of each; the longest length, where training draws shorter ones.
        seed: The same seed gives the same sequences.

    Shapes:
        - **output:** :obj:`x` and :obj:`y` long :math:`(L)`, :obj:`x` :math:`(L, F)` where a
          token has F symbols
    """

    def __init__(self, task: SequenceTask, num_examples: int, length: int, seed: int) -> None:
        if num_examples < 0:
            raise ValueError(f"num_examples is {num_examples}; choose 0 or more")
        self.task, self.num_examples, self.seed = task, num_examples, seed
        self.length = task.valid_length(length)
        self._examples: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return self.num_examples

    @overload
    def __getitem__(self, index: int) -> Data: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Data]: ...
    def __getitem__(self, index: int | slice) -> Data | Sequence[Data]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        if self._examples is None:
            generator = torch.Generator().manual_seed(self.seed)
            self._examples = self.task.sample(len(self), self.length, generator)
        x, y = self._examples
        return Data(x=x[index], y=y[index], num_nodes=self.length)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.task}, {len(self)}, length={self.length})"


def load_task(
    name: str,
    *,
    seed: int,
    max_length: int | None = None,
    test_length: int | None = None,
    train_examples: int = 12_800,
    test_examples: int = 256,
    **options: Any,
) -> Splits:
    r"""A sequence task as train, validation and test sequences.

    Args:
        name: A key of :data:`~nsm_graph.data.tasks.TASKS`.
        seed: Of the training sequences, where they are looked at one by one; training draws fresh
            ones of every length up to :obj:`max_length`.
        max_length: Longest training sequences, and the length of the validation sequences; 32, or
            the shortest the task has.
        test_length: Length of the test sequences; :obj:`max_length` if not given.
        train_examples: Sequences in an epoch.
        test_examples: Test sequences, and validation sequences.
        **options: The task's own.
    """
    task = make_task(name, **options)
    longest = max(32, task.min_length) if max_length is None else max_length
    tested = longest if test_length is None else test_length
    symbols = task.num_symbols
    columns = 1 if isinstance(symbols, int) else len(symbols)
    sizes = symbols if isinstance(symbols, int) else list(symbols)
    info = DatasetInfo(
        name, "token_classification", columns, sizes, task.num_classes, is_causal=True
    )
    return Splits(
        TaskSequences(task, train_examples, longest, seed),
        TaskSequences(task, test_examples, longest, VALIDATION_SEED),
        TaskSequences(task, test_examples, tested, TEST_SEED),
        info,
    )
