r"""What a sequence task is: examples of any length, whole or piece by piece."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from nsm_graph.data.tasks.checks import check_at_least

# Label of a token without a label: PyTorch's default `ignore_index`.
IGNORED = -100

# Random numbers are drawn for this many positions at once, whatever the size of the pieces, so
# that the pieces do not change the sequences. Even: an arithmetic block starts at a digit.
BLOCK = 4096

Examples = tuple[Tensor, Tensor]


class SequenceTask(ABC):
    r"""A rule that makes labelled sequences of symbols, as many and as long as asked for.

    Tasks are small immutable objects; all randomness comes from the generator that is handed in.
    The same generator state gives the same sequences, whole or in pieces. Symbols are
    :math:`0, \dots, num\_symbols - 1`, labels :math:`0, \dots, num\_classes - 1`, and
    :data:`IGNORED` where nothing is asked.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The task's name, as in the registry."""

    @property
    @abstractmethod
    def num_symbols(self) -> int | tuple[int, ...]:
        """Number of different tokens; of tokens with several symbols, one number for each."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of different labels."""

    @property
    @abstractmethod
    def min_length(self) -> int:
        """The shortest sequence that the task has."""

    def needed_states(self, x: Tensor) -> Tensor | None:
        """How many things a memory of each sequence has to hold in the end; None if unknown."""
        return None

    @property
    def chance(self) -> float:
        """Accuracy of a uniform guess among the answers that are possible."""
        return 1 / self.num_classes

    def valid_length(self, length: int) -> int:
        r"""The nearest length that the task allows, at most :obj:`length`.

        Raises:
            ValueError: If :obj:`length` is below :attr:`min_length`.
        """
        if length < self.min_length:
            raise ValueError(
                f"{self.name} needs a length of at least {self.min_length}, got {length}; "
                "use longer sequences or a smaller task"
            )
        return length

    def sample(self, num_examples: int, length: int, generator: Generator) -> Examples:
        r"""Fresh examples, all of the same length.

        Args:
            num_examples: Number of sequences, :math:`B`.
            length: Tokens of each, :math:`L`.
            generator: Where the random numbers come from, on the CPU.

        Shapes:
            - **output:** symbols and labels, int64 :math:`(B, L)`; symbols
              :math:`(B, L, F)` where a token has F of them

        Raises:
            ValueError: If the task has no sequences of this length, or :math:`B < 1`.
        """
        self._check(num_examples, length)
        return self._sample(num_examples, length, generator)

    def stream(
        self, num_examples: int, length: int, generator: Generator, piece: int
    ) -> Iterator[Examples]:
        r"""The examples that :meth:`sample` gives, cut into consecutive pieces.

        The generator is read while the pieces are: nobody else may draw from it before the last.

        Args:
            num_examples: Number of sequences, :math:`B`.
            length: Tokens of each in all.
            generator: Where the random numbers come from, on the CPU.
            piece: Tokens of each in a piece, :math:`P`; the last piece holds what is left.

        Shapes:
            - **output:** symbols and labels, int64 :math:`(B, \le P)`, again and again

        Raises:
            ValueError: As for :meth:`sample`, or if :math:`P < 1`.
        """
        self._check(num_examples, length)
        check_at_least(self.name, "piece", piece, 1)
        return recut(self._blocks(num_examples, length, generator), piece)

    def _check(self, num_examples: int, length: int) -> None:
        check_at_least(self.name, "num_examples", num_examples, 1)
        check_at_least(self.name, "length", length, 1)
        nearest = self.valid_length(length)
        if nearest != length:
            raise ValueError(
                f"{self.name} has no sequences of length {length}; use {nearest}, the nearest "
                "that it has"
            )

    @abstractmethod
    def _sample(self, num_examples: int, length: int, generator: Generator) -> Examples:
        """The examples, with all arguments checked."""

    def _blocks(self, num_examples: int, length: int, generator: Generator) -> Iterator[Examples]:
        """The same examples in consecutive blocks of any size."""
        yield self._sample(num_examples, length, generator)


class StreamedTask(SequenceTask):
    r"""A task that is made block by block, in memory that does not grow with the length.

    Subclasses implement :meth:`_blocks` and draw the same numbers for the same block.
    """

    def _sample(self, num_examples: int, length: int, generator: Generator) -> Examples:
        return next(recut(self._blocks(num_examples, length, generator), length))

    @abstractmethod
    def _blocks(self, num_examples: int, length: int, generator: Generator) -> Iterator[Examples]:
        """The examples in consecutive blocks of the sizes that :func:`block_sizes` gives."""


def block_sizes(length: int) -> Iterator[int]:
    """Sizes of the blocks that random numbers are drawn in: all but the last are :data:`BLOCK`."""
    for start in range(0, length, BLOCK):
        yield min(BLOCK, length - start)


def recut(blocks: Iterator[Examples], piece: int) -> Iterator[Examples]:
    """Consecutive blocks of any size, cut into pieces of one size; the last may be shorter."""
    parts: list[Examples] = []
    missing = piece
    for x, y in blocks:
        start = 0
        while start < x.size(1):
            stop = min(start + missing, x.size(1))
            parts.append((x[:, start:stop], y[:, start:stop]))
            missing -= stop - start
            start = stop
            if missing == 0:
                yield _join(parts)
                parts, missing = [], piece
    if parts:
        yield _join(parts)


def _join(parts: list[Examples]) -> Examples:
    # Copies even a single part: a piece that is a view would keep its whole block alive.
    return torch.cat([x for x, _ in parts], dim=1), torch.cat([y for _, y in parts], dim=1)
